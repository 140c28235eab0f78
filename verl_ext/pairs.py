"""The pairs of a batch: which rows belong together, which pairs train, and the coefficient of each row (PBSD).

A question's rollouts come in pairs of one sample of the teacher, who reads the privileged context (y+), and one of the
student (y-): rollout numbers 0 and 1, 2 and 3, and so on. Pure functions on the driver; the loss is
:mod:`verl_ext.preference`, source arXiv 2605.05040.
Shape suffixes: N rows, P pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl_ext.batch_plan import RowBatch
from verl_ext.config_axes import PreferenceConfig
from verl_ext.preference import (
    bradley_terry_labels,
    kept_pairs,
    margins,
    pair_coefficients,
    pair_loss,
    reweighted_target,
)

LEFT_OUT = ("lost", "without_context", "without_weight", "empty", "cut", "unjudged", "filtered")
"""Reasons for a pair not to train, the first that holds."""
POSITIVE, NEGATIVE, NEITHER = 1, -1, 0
"""Sides of a row."""


def is_teacher_sample(rollout_index: int) -> bool:
    """Whether a rollout of a question is the teacher's."""
    return rollout_index % 2 == 0


@dataclass(frozen=True)
class PairPlan:
    """The pairs that train.

    Attributes:
        positive_P, negative_P: rows of y+ and y-.
        labels_P: float32 in [0, 1], how much a pair prefers y+; None: 1 for all.
        sides_N: POSITIVE, NEGATIVE, or NEITHER where the row's pair does not train.
        whole: no pair was left out for what its samples are, so that the pairs are fair samples of both sides.
        metrics: flat floats.
    """

    positive_P: list[int]
    negative_P: list[int]
    labels_P: Tensor | None
    sides_N: list[int]
    whole: bool
    metrics: dict[str, float]

    @property
    def keep_N(self) -> Tensor:
        """bool [N]: the row trains."""
        return torch.tensor([side != NEITHER for side in self.sides_N], dtype=torch.bool)

    def left_out(self) -> dict[str, int]:
        """Pairs that do not train, by reason."""
        counts = {reason: int(self.metrics[f"preference/pairs_{reason}"]) for reason in LEFT_OUT}
        return {reason: count for reason, count in counts.items() if count}


@dataclass(frozen=True)
class PairScores:
    """What the workers' passes found of the rows of a step, [N] each, float64; NaN where a row was not scored.

    Attributes:
        student_N, teacher_N: log-probability of the response, a sum over its tokens in nats.
        divergence_N: sum over the response of KL(teacher || student) for y+, of KL(student || teacher) for y-.
        sampler_gap_N: mean over the tokens of |log-probability of the sampler - that of the side's own scorer|.
    """

    student_N: Tensor
    teacher_N: Tensor
    divergence_N: Tensor
    sampler_gap_N: Tensor


def plan_pairs(
    batch: RowBatch,
    *,
    taught_N: Sequence[bool],
    weights_N: Sequence[float],
    settings: PreferenceConfig,
    beta: float,
    success_threshold: float,
    response_limit: int,
) -> PairPlan:
    """Finds the pairs of a batch and those that train.

    A pair is left out where a side is missing (``lost``: its rollout failed), the teacher has no prompt for either
    (``without_context``), the question's weight is 0, a sample is blank or cut at ``response_limit`` tokens, the filter
    needs a verdict that the verifier could not give, or the filter refuses it.

    Raises:
        ValueError: columns of different length, or an unknown filter.
    """
    if not len(taught_N) == len(weights_N) == len(batch):
        raise ValueError(f"{len(taught_N)} flags and {len(weights_N)} weights for {len(batch)} rows")
    found: dict[tuple[str, int], dict[bool, int]] = {}
    for i, (uid, rollout, padded) in enumerate(zip(batch.uids, batch.rollout_index, batch.is_padding(), strict=True)):
        if not padded:
            found.setdefault((str(uid), int(rollout) // 2), {})[is_teacher_sample(int(rollout))] = i
    reasons: Counter[str] = Counter()
    pairs: list[tuple[int, int]] = []
    for sides in found.values():
        reason = _unfit(batch, sides, taught_N, weights_N, settings, response_limit)
        if reason is not None:
            reasons[reason] += 1
        else:
            pairs.append((sides[True], sides[False]))
    rewards_N = torch.tensor([0.0 if e else float(r) for e, r in zip(batch.errors, batch.rewards, strict=True)])
    right_N = rewards_N >= success_threshold
    positive, negative = [pos for pos, _ in pairs], [neg for _, neg in pairs]
    kept = kept_pairs(settings.pair_filter, right_N[positive], right_N[negative]).tolist()
    reasons["filtered"] = kept.count(False)
    positive = [row for row, keep in zip(positive, kept, strict=True) if keep]
    negative = [row for row, keep in zip(negative, kept, strict=True) if keep]
    labels = None
    if settings.pair_filter == "bt_reward":
        labels = bradley_terry_labels(rewards_N[positive], rewards_N[negative])
    sides_N = [NEITHER] * len(batch)
    for row in positive:
        sides_N[row] = POSITIVE
    for row in negative:
        sides_N[row] = NEGATIVE
    metrics = {
        "preference/pairs": float(len(found)),
        "preference/pairs_trained": float(len(positive)),
        **{f"preference/pairs_{reason}": float(reasons[reason]) for reason in LEFT_OUT},
        **_side_metrics(batch, found.values(), rewards_N, right_N, beta),
    }
    return PairPlan(positive, negative, labels, sides_N, not (reasons["empty"] or reasons["cut"]), metrics)


def _unfit(
    batch: RowBatch,
    sides: dict[bool, int],
    taught_N: Sequence[bool],
    weights_N: Sequence[float],
    settings: PreferenceConfig,
    response_limit: int,
) -> str | None:
    """Why a pair cannot train, its filter aside."""
    rows = list(sides.values())
    if len(rows) < 2:
        return "lost"
    if not all(taught_N[row] for row in rows):
        return "without_context"
    if any(weights_N[row] == 0 for row in rows):
        return "without_weight"
    if any(not batch.responses[row].strip() for row in rows):
        return "empty"
    if any(int(batch.response_lengths[row]) >= response_limit for row in rows):
        return "cut"
    if settings.pair_filter != "none" and any(batch.errors[row] for row in rows):
        return "unjudged"
    return None


def _side_metrics(
    batch: RowBatch, found: Sequence[dict[bool, int]], rewards_N: Tensor, right_N: Tensor, beta: float
) -> dict[str, float]:
    """Pass rate and length of both sides, and what the reward-reweighted teacher would score, over judged rows."""
    metrics = {}
    for name, teacher in (("positive", True), ("negative", False)):
        rows = [sides[teacher] for sides in found if teacher in sides]
        judged = [row for row in rows if not batch.errors[row]]
        if judged:
            metrics[f"preference/pass_rate_{name}"] = float(right_N[judged].float().mean())
        if rows:
            metrics[f"response/tokens_{name}"] = float(np.mean([batch.response_lengths[row] for row in rows]))
        if judged and teacher:
            target = reweighted_target(rewards_N[judged], beta=beta)
            metrics["preference/target_reward"] = target["reward"]
            metrics["preference/target_objective"] = target["objective"]
    return metrics


def weigh_pairs(
    plan: PairPlan,
    scores: PairScores,
    weights_N: Tensor,
    response_lengths_N: Sequence[int],
    *,
    beta: float,
    log_prob: str = "sum",
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Coefficients of the rows' log-probabilities, the self-check's differences, and metrics.

    The gradient of sum_P w L is that of -sum_N coefficient * sum_t log pi(y_t). With ``log_prob="mean"`` the
    coefficient carries the 1/|y| of its row.

    Returns:
        float64 [N] (0 for rows of no pair), float64 [P] (m + beta times both divergences, whose expectation is 0 for
        fair samples and sums of log-probabilities: the identity E[m] = -beta J), and metrics.

    Raises:
        ValueError: as :func:`verl_ext.preference.margins`, or an unknown ``log_prob``.
    """
    if log_prob not in ("sum", "mean"):
        raise ValueError(f"log_prob is {log_prob!r}; allowed: sum, mean")
    pos, neg = plan.positive_P, plan.negative_P
    lengths_N = torch.tensor([max(1, int(length)) for length in response_lengths_N], dtype=torch.float64)
    scale_N = 1 / lengths_N if log_prob == "mean" else torch.ones_like(lengths_N)
    student_N, teacher_N = scores.student_N.double() * scale_N, scores.teacher_N.double() * scale_N
    four = (student_N[pos], student_N[neg], teacher_N[pos], teacher_N[neg])
    m_P = margins(*four, beta=beta)
    positive_P, negative_P = pair_coefficients(*four, beta=beta, labels_P=plan.labels_P)
    coefficients_N = torch.zeros(len(lengths_N), dtype=torch.float64)
    weights_N = weights_N.double()
    coefficients_N[pos] = positive_P * scale_N[pos] * weights_N[pos]
    coefficients_N[neg] = negative_P * scale_N[neg] * weights_N[neg]
    jeffreys_P = scores.divergence_N[pos].double() + scores.divergence_N[neg].double()
    metrics = {
        "preference/beta": beta,
        "distill/loss": float(pair_loss(m_P, plan.labels_P).mean()),
        "preference/margin": float(m_P.mean()),
        "preference/accuracy": float((m_P > 0).double().mean()),
        "preference/log_ratio_positive": float((four[0] - four[2]).mean()),
        "preference/log_ratio_negative": float((four[1] - four[3]).mean()),
        "preference/one_less_sigma": float(torch.sigmoid(-m_P).mean()),
    }
    for name, rows in (("positive", pos), ("negative", neg)):
        gaps = scores.sampler_gap_N[rows]
        if bool(gaps.isfinite().all()):
            metrics[f"preference/sampler_gap_{name}"] = float(gaps.mean())
    if bool(jeffreys_P.isfinite().all()):
        metrics["preference/jeffreys"] = float(jeffreys_P.mean())
        metrics["preference/margin_expected"] = -beta * float(jeffreys_P.mean())
    return coefficients_N, m_P + beta * jeffreys_P, metrics
