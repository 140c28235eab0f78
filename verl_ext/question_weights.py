"""From where the pass rates of a step's question weights come: its own rollouts, a store, a running estimate.

With a store (PACED, single pass) the weight of a question is fixed until the store changes: it is normalised once,
over the training set, and questions of weight 0 are not sampled at all.
Shape suffixes: P questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from verl_ext.pass_rates import GroupPassRates
from verl_ext.running_rates import RunningPassRates
from verl_ext.weighting import question_weights


@dataclass(frozen=True, eq=False)
class Weighed:
    """Of the P questions of a batch.

    Attributes:
        weights_P: float64 question weights.
        rates_P: float64 pass rates they were made of; NaN where there is none.
    """

    weights_P: Tensor
    rates_P: Tensor


class Weigher(Protocol):
    """What makes the weights of a batch."""

    def __call__(self, question_ids: Sequence[str], groups: GroupPassRates) -> Weighed:
        """``question_ids``: P stable ids, in the order of ``groups``."""


def weigh(rates_P: Tensor, settings: Any) -> Tensor:
    """float64 [P]; a question without a rate has weight 0 and no part in the normaliser.

    ``settings`` has the attributes of ``WeightingConfig``.
    """
    weights_P = torch.zeros_like(rates_P)
    if len(weights_P) == 0:
        return weights_P
    # By ascending rate, so that the rounding of the normaliser's sum does not depend on the order of the batch.
    order = torch.argsort(rates_P, stable=True)
    weights_P[order] = question_weights(
        rates_P[order],
        alpha=settings.alpha,
        beta=settings.beta,
        kernel=settings.kernel,
        low=settings.low,
        high=settings.high,
        centre=settings.centre,
        width=settings.width,
        normalizer=settings.normalizer,
        cap=settings.cap,
        floor_zero=settings.floor_zero,
        floor_one=settings.floor_one,
        constant=settings.constant,
    )
    return weights_P


class BatchWeigher:
    """SC-SDPO: the rates of the batch's own rollouts."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def __call__(self, question_ids: Sequence[str], groups: GroupPassRates) -> Weighed:
        return Weighed(weigh(groups.rates_P, self._settings), groups.rates_P)


class StoredWeigher:
    """PACED, single pass: fixed rates of the whole training set, normalised over it.

    Args:
        rates: pass rate of every training question by its id; NaN where it was not measured.
        settings: a ``WeightingConfig``. ``mean_active`` divides by the mean over the questions kept.
    """

    def __init__(self, rates: Mapping[str, float], settings: Any) -> None:
        self._rates = dict(rates)
        ids = list(self._rates)
        weights_P = weigh(torch.tensor([self._rates[name] for name in ids], dtype=torch.float64), settings)
        self._weights = dict(zip(ids, weights_P.tolist(), strict=True))

    def keeps(self, question_id: str) -> bool:
        """Whether the question has a weight above 0."""
        return self._weights.get(question_id, 0.0) > 0

    def __call__(self, question_ids: Sequence[str], groups: GroupPassRates) -> Weighed:
        return Weighed(
            torch.tensor([self._weights.get(name, 0.0) for name in question_ids], dtype=torch.float64),
            torch.tensor([self._rates.get(name, math.nan) for name in question_ids], dtype=torch.float64),
        )


class RunningWeigher:
    """A running estimate: the batch's own rollouts are counted first, then its questions are weighed."""

    def __init__(self, estimate: RunningPassRates, settings: Any) -> None:
        self.estimate = estimate
        self._settings = settings

    def __call__(self, question_ids: Sequence[str], groups: GroupPassRates) -> Weighed:
        self.estimate.update(question_ids, groups.successes_P.tolist(), groups.counts_P.tolist())
        rates_P = self.estimate.rates(question_ids)
        return Weighed(weigh(rates_P, self._settings), rates_P)
