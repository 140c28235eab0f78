"""Accuracy of k samples per question: mean@k, maj@k and the unbiased pass@k.

Shapes: P questions, K samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb


def mean_at_k(correct_PK: Sequence[Sequence[float]]) -> float:
    """Mean over questions of the share of right samples."""
    _refuse_empty(correct_PK)
    return sum(sum(row) / len(row) for row in correct_PK) / len(correct_PK)


def majority_correct(correct_K: Sequence[float], answers_K: Sequence[Hashable | None]) -> float:
    """Is the most frequent answer right? Ties: the expected value of a fair draw among them.

    Samples without an answer (None or an empty text) do not vote; without any vote the question counts as wrong.

    Raises:
        ValueError: lengths differ.
    """
    if len(correct_K) != len(answers_K):
        raise ValueError(f"{len(correct_K)} verdicts for {len(answers_K)} answers")
    votes = Counter(answer for answer in answers_K if answer not in (None, ""))
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, count in votes.items() if count == most}
    verdicts: dict[Hashable, list[float]] = {answer: [] for answer in winners}
    for verdict, answer in zip(correct_K, answers_K, strict=True):
        if answer in winners:
            verdicts[answer].append(float(verdict))
    return sum(sum(part) / len(part) for part in verdicts.values()) / len(winners)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate 1 - C(n - c, k) / C(n, k) that at least one of k samples is right.

    Raises:
        ValueError: k larger than the number of samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, found {samples}")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def _refuse_empty(rows: Sequence[Sequence[float]]) -> None:
    if not rows or not all(len(row) for row in rows):
        raise ValueError("no samples to average over")
