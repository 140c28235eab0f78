"""PBSD's live self-check: over fair samples, E[m] = -beta (KL(teacher || student) + KL(student || teacher)).

The margin m comes from four sequence log-probabilities, the two divergences from whole next-token distributions along
the same samples (their sum over a response has the sequence's KL as expectation, by the chain rule). A difference that
does not average out says that y+ or y- was not drawn from the distribution it is scored with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from verl_ext.config import DistillConfig

PAIRS, LIMIT = 200, 6.0
"""The alarm looks from so many pairs on, and rings beyond so many standard errors."""


def reason_without(distill: DistillConfig, config: DictConfig) -> str | None:
    """Why the identity does not hold or is not measured with these settings; None where it is checked."""
    rollout = config.actor_rollout_ref.rollout
    plain = {"top_p": (1.0,), "top_k": (-1, 0), "min_p": (0.0,), "repetition_penalty": (1.0,)}
    for key, allowed in plain.items():
        value = rollout.get(key)
        if value is not None and value not in allowed:
            return f"actor_rollout_ref.rollout.{key}={value}: samples are not drawn from the distributions scored"
    if distill.one_token:
        return "distill.divergence.kind=sampled_token: no divergence over the vocabulary is read"
    if distill.preference.log_prob != "sum":
        return f"distill.preference.log_prob={distill.preference.log_prob}: the identity holds for sums"
    if distill.preference.pair_filter not in ("none", "bt_reward"):
        return f"distill.preference.pair_filter={distill.preference.pair_filter}: filtered pairs are no fair samples"
    return None


class PairCheck:
    """Gathers the differences of a run and warns once."""

    def __init__(self, distill: DistillConfig, config: DictConfig, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.reason = reason_without(distill, config)
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        self._warned = False
        if distill.pairs and self.reason is not None:
            warn(f"the self-check of the pairs is off: {self.reason}")

    def look(self, differences_P: Tensor, *, whole: bool) -> dict[str, float]:
        """Takes the pairs of a step.

        Args:
            differences_P: m + beta J of each pair.
            whole: the step's pairs are all that were sampled; others would be a choice, and are not looked at.

        Returns:
            ``preference/check``: mean difference over the pairs so far; ``preference/check_errors``: the same in
            standard errors.
        """
        if self.reason is not None or not whole or not len(differences_P):
            return {}
        self._count += len(differences_P)
        self._sum += float(differences_P.sum())
        self._squares += float(differences_P.square().sum())
        mean = self._sum / self._count
        variance = max(0.0, self._squares / self._count - mean**2)
        error = math.sqrt(variance / self._count)
        errors = mean / error if error > 0 else 0.0
        if self._count >= PAIRS and abs(errors) > LIMIT and not self._warned:
            self._warned = True
            self._warn(
                f"self-check of the pairs: over {self._count} pairs margin and divergences differ by {mean:.3g} nats, "
                f"{errors:.1f} standard errors from 0: y+ or y- does not come from the distribution it is scored with "
                "(stale weights, another temperature, texts of another teacher)"
            )
        return {"preference/check": mean, "preference/check_errors": errors}

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, in plain JSON types."""
        return {"count": self._count, "sum": self._sum, "squares": self._squares, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        self._count, self._warned = int(state["count"]), bool(state["warned"])
        self._sum, self._squares = float(state["sum"]), float(state["squares"])
