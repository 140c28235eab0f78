"""Empirical pass rates of question groups, and the numbers that describe their spread.

A rate counts *all* verified rollouts of a question, with the threshold that also decides which rollouts may serve as
demonstrations (SDPO, arXiv 2601.20802, shipped value 0.5). A verifier that crashed has said nothing: such rows are left
out of both numerator and denominator and are counted on their own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GroupPassRates:
    """Pass rates of P questions seen in N rows.

    Attributes:
        keys: the P distinct question keys, in order of first appearance.
        index_N: [N] int64; row -> position of its question in ``keys``.
        successes_P: [P] int64; verified rows at or above the threshold.
        counts_P: [P] int64; verified rows (verifier errors excluded).
        rates_P: [P] float64; successes / counts, NaN where no row was verified.
        errors_P: [P] int64; rows whose verifier failed.
    """

    keys: tuple[Hashable, ...]
    index_N: Tensor
    successes_P: Tensor
    counts_P: Tensor
    rates_P: Tensor
    errors_P: Tensor

    def to_rows(self, values_P: Tensor) -> Tensor:
        """Spread one value per question over its rows: [P, ...] -> [N, ...]."""
        if values_P.shape[:1] != self.rates_P.shape:
            raise ValueError(f"expected {len(self.keys)} values, one per question, found {list(values_P.shape)}")
        return values_P[self.index_N.to(values_P.device)]


def success_mask(rewards_N: Tensor, *, threshold: float = 0.5) -> Tensor:
    """[N] bool: reward >= threshold.

    The comparison happens in the rewards' own precision, so that a float32 reward of 0.7 meets a threshold of 0.7.
    Use this for the demonstration pool too; two notions of success would make p and the pool disagree.
    """
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, found {threshold}")
    return rewards_N >= torch.tensor(threshold, dtype=_comparison_dtype(rewards_N), device=rewards_N.device)


def group_pass_rates(
    question_keys: Sequence[Hashable],
    rewards_N: Tensor,
    errors_N: Tensor | None = None,
    *,
    threshold: float = 0.5,
) -> GroupPassRates:
    """Pass rate of every question, over all its verified rows. Linear in the number of rows.

    Args:
        question_keys: N hashable keys, one per row; rows of one question need not be adjacent.
        rewards_N: [N] sequence-level rewards. Must be finite on verified rows.
        errors_N: [N] bool, true where the verifier failed; None means it never did.
        threshold: a row succeeds if its reward is at least this.

    Raises:
        ValueError: for differing lengths, wrong shapes or types, a missing (None) or non-hashable key, or a non-finite
            reward on a row that is not marked as an error (a broken verifier must not pass for a wrong answer).
    """
    if rewards_N.dim() != 1:
        raise ValueError(f"rewards_N must have shape [N], found {list(rewards_N.shape)}")
    num_rows = rewards_N.shape[0]
    if errors_N is None:
        errors_N = torch.zeros(num_rows, dtype=torch.bool, device=rewards_N.device)
    if errors_N.dtype != torch.bool or errors_N.shape != rewards_N.shape:
        raise ValueError(f"errors_N must be bool of shape [{num_rows}], found {errors_N.dtype} {list(errors_N.shape)}")
    errors_N = errors_N.to(rewards_N.device)

    keys, index_N = _enumerate_keys(question_keys, num_rows)
    index_N = index_N.to(rewards_N.device)

    verified_N = ~errors_N
    broken_N = verified_N & ~rewards_N.isfinite()
    if bool(broken_N.any()):
        row = int(broken_N.nonzero()[0])
        raise ValueError(
            f"row {row} has reward {float(rewards_N[row])} but is not marked as a verifier error "
            f"({int(broken_N.sum())} such rows); mark it in errors_N"
        )

    def count(mask_N: Tensor) -> Tensor:
        return torch.bincount(index_N[mask_N], minlength=len(keys))

    successes_P = count(verified_N & success_mask(rewards_N, threshold=threshold))
    counts_P = count(verified_N)
    # 0 / 0 is NaN on purpose: "never verified" must stay distinguishable from "never solved".
    rates_P = successes_P.to(torch.float64) / counts_P.to(torch.float64)
    return GroupPassRates(keys, index_N, successes_P, counts_P, rates_P, count(errors_N))


def pass_rate_metrics(rates_P: Tensor) -> dict[str, float]:
    """Plain numbers that describe a batch of pass rates; NaN rates are counted as ``unmeasured`` and left out.

    Returns:
        ``questions`` (measured), ``unmeasured``, ``mean``, ``std`` (population: the spread), ``share_zero``,
        ``share_one``, ``share_active`` (strictly between; the questions with a non-zero weight under any kernel with
        positive exponents). Means and shares are NaN if nothing was measured.

    Raises:
        ValueError: if a rate lies outside [0, 1].
    """
    measured_P = _measured(rates_P)
    count = measured_P.numel()
    unmeasured = float(rates_P.numel() - count)
    if count == 0:
        nan = math.nan
        described = {"mean": nan, "std": nan, "share_zero": nan, "share_one": nan, "share_active": nan}
    else:
        zero = float((measured_P == 0).sum()) / count
        one = float((measured_P == 1).sum()) / count
        active = float(((measured_P > 0) & (measured_P < 1)).sum()) / count
        described = {
            "mean": float(measured_P.mean()),
            "std": float(measured_P.std(correction=0)),
            "share_zero": zero,
            "share_one": one,
            "share_active": active,
        }
    return {"questions": float(count), "unmeasured": unmeasured, **described}


def pass_rate_histogram(rates_P: Tensor, bins: int = 10) -> tuple[list[float], list[int]]:
    """Histogram of the measured rates over [0, 1].

    Args:
        rates_P: [P] rates; NaN is left out.
        bins: number of intervals of equal width, each closed on the left, the last one on both sides.

    Returns:
        ``bins + 1`` edges and ``bins`` counts.

    Raises:
        ValueError: if ``bins`` is not a positive integer or a rate lies outside [0, 1].
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be a positive integer, found {bins!r}")
    # The small shift puts a rate such as 29/100 into the bin that starts there, in spite of rounding.
    slots = (_measured(rates_P) * bins + 1e-9).floor().to(torch.int64).clamp(max=bins - 1)
    edges = [i / bins for i in range(bins + 1)]
    return edges, torch.bincount(slots, minlength=bins).tolist()


def _measured(rates_P: Tensor) -> Tensor:
    rates_P = rates_P.detach().to(torch.float64)
    measured_P = rates_P[~rates_P.isnan()]
    if bool(((measured_P < 0) | (measured_P > 1)).any()):
        raise ValueError("pass rates must lie in [0, 1] (or be NaN)")
    return measured_P


def _comparison_dtype(rewards_N: Tensor) -> torch.dtype:
    return rewards_N.dtype if rewards_N.is_floating_point() else torch.float64


def _enumerate_keys(question_keys: Sequence[Hashable], num_rows: int) -> tuple[tuple[Hashable, ...], Tensor]:
    """Distinct keys in order of first appearance, and the [N] position of each row's key among them."""
    if isinstance(question_keys, (np.ndarray, Tensor)):
        question_keys = question_keys.tolist()
    if len(question_keys) != num_rows:
        raise ValueError(f"{len(question_keys)} question keys for {num_rows} rewards; expected one key per row")
    # A tensor hashes by identity, so every row would silently become a question of its own.
    if any(kind is type(None) or issubclass(kind, Tensor) for kind in set(map(type, question_keys))):
        row = next(i for i, key in enumerate(question_keys) if key is None or isinstance(key, Tensor))
        raise ValueError(f"row {row} has question key {question_keys[row]!r}; expected a hashable identifier")
    try:
        keys = tuple(dict.fromkeys(question_keys))
    except TypeError as error:
        row = next(i for i, key in enumerate(question_keys) if not _is_hashable(key))
        raise ValueError(f"row {row} has a question key that cannot be hashed: {question_keys[row]!r}") from error
    positions = {key: position for position, key in enumerate(keys)}
    index = np.fromiter(map(positions.__getitem__, question_keys), dtype=np.int64, count=num_rows)
    return keys, torch.from_numpy(index)


def _is_hashable(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
