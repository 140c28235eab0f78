"""Which rows need no forward pass, and how the others are laid out over mini-batches and ranks.

A row is left out iff *every* term of its loss is exactly zero: then neither loss nor gradient can tell. What a term is
divided by is fixed before anything is left out (``MiniBatch.row_count``, ``token_count``), so compaction changes no
number; dividing by the rows that remain would cancel part of the question weights.

Rows are assigned to mini-batches first and left out inside theirs, so every optimiser step sees the rows it would have
seen. Padding goes to a multiple of the data-parallel ranks only: filling up to the full mini-batch with verl's
synthetic rows would cost more than was saved. A mini-batch without rows is skipped, with no optimiser step.

SDPO's public code (arXiv 2601.20802) runs both forward passes on masked rows too. Shape suffix: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PADDING_ROW = -1
# Length of the synthetic rows that verl's padding appends (prompt and response together).
PADDING_ROW_TOKENS = 128


def keep_rows(
    weights_N: Sequence[float],
    distill_N: Sequence[bool],
    *,
    coefficient: float,
    advantages_N: Sequence[float] | None = None,
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    other_terms_N: Sequence[bool] | None = None,
    padding_N: Sequence[bool] | None = None,
) -> np.ndarray:
    """bool [N]: the row has a term of its loss that may differ from zero.

    The loss is (1 − λ)·policy gradient + λ·distillation, with λ = ``coefficient``. Terms: distillation where λ · weight
    · mask ≠ 0; policy gradient where λ < 1 and the row's advantage is not 0 (``advantages_N``: one value a row, the
    largest absolute one where it varies over tokens; None: not known yet, so every row counts); a KL or entropy
    coefficient other than 0 keeps every row; ``other_terms_N`` marks rows with a term this module does not know.
    Padding rows are never kept.

    Raises ValueError for columns of different length, λ outside [0, 1], or a weight, coefficient or advantage that is
    not a finite number.
    """
    weights = _column("weights", weights_N, np.float64)
    rows = len(weights)
    distill = _column("distill", distill_N, bool, rows)
    if not 0.0 <= coefficient <= 1.0:
        raise ValueError(f"coefficient is {coefficient!r}, expected a number from 0 to 1")
    for name, value in (("kl_coefficient", kl_coefficient), ("entropy_coefficient", entropy_coefficient)):
        if not np.isfinite(value):
            raise ValueError(f"{name} is {value!r}, expected a finite number")
    _refuse_non_finite("weights", weights)

    keep = distill & (coefficient * weights != 0.0)
    if coefficient < 1.0:
        if advantages_N is None:
            keep = np.ones(rows, dtype=bool)
        else:
            advantages = _column("advantages", advantages_N, np.float64, rows)
            _refuse_non_finite("advantages", advantages)
            keep = keep | (advantages != 0.0)
    if kl_coefficient != 0.0 or entropy_coefficient != 0.0:
        keep = np.ones(rows, dtype=bool)
    if other_terms_N is not None:
        keep = keep | _column("other_terms", other_terms_N, bool, rows)
    if padding_N is not None:
        keep = keep & ~_column("padding", padding_N, bool, rows)
    return keep


@dataclass(frozen=True)
class MiniBatch:
    """The rows of one optimiser step.

    Attributes:
        number: its place among all mini-batches of the batch, skipped ones counted.
        ranks: for each data-parallel rank the rows it forwards, the same count on all; PADDING_ROW for a padding row.
        row_count: rows before any was left out, padding rows not counted: the denominator of a mean over rows.
        token_count: response tokens of those rows: the denominator of a mean over tokens.
    """

    number: int
    ranks: tuple[tuple[int, ...], ...]
    row_count: int
    token_count: int

    @property
    def order(self) -> list[int]:
        """Rows rank by rank, as verl's dispatch cuts a batch into equal contiguous pieces; PADDING_ROW at padding."""
        return [row for rank in self.ranks for row in rank]

    @property
    def rows(self) -> list[int]:
        """The rows kept, ascending, without padding."""
        return sorted(row for row in self.order if row != PADDING_ROW)

    @property
    def padding(self) -> int:
        return sum(row == PADDING_ROW for row in self.order)

    @property
    def size(self) -> int:
        """Rows that are forwarded, padding included: the mini-batch size to tell verl."""
        return sum(len(rank) for rank in self.ranks)


@dataclass(frozen=True)
class MiniBatchPlan:
    """Mini-batches with at least one row, in order; ``skipped`` ones had none."""

    mini_batches: tuple[MiniBatch, ...]
    skipped: int
    metrics: dict[str, float]


def plan_mini_batches(
    keep_N: Sequence[bool],
    response_tokens_N: Sequence[int],
    student_lengths_N: Sequence[int],
    teacher_lengths_N: Sequence[int],
    *,
    mini_batch_rows: int,
    ranks: int,
    padding_N: Sequence[bool] | None = None,
) -> MiniBatchPlan:
    """Cut the batch into mini-batches, leave rows out inside each, balance what remains over the ranks.

    Args:
        keep_N: from ``keep_rows``; all true forwards every row, with the same loss.
        response_tokens_N: response tokens under the loss mask.
        student_lengths_N, teacher_lengths_N: tokens of the two forward passes, prompt and response (0: no such pass).
            Ranks are balanced by their sum.
        mini_batch_rows: rows of one optimiser step, before any is left out. Rows are assigned in the order given; the
            last mini-batch may be shorter.
        ranks: data-parallel ranks.
        padding_N: rows that verl appended to the batch already. They are dropped before anything is counted.

    Raises ValueError for columns of different length, negative lengths, or counts below 1.
    """
    keep = _column("keep", keep_N, bool)
    rows = len(keep)
    response_tokens = _lengths("response_tokens", response_tokens_N, rows)
    cost = _lengths("student_lengths", student_lengths_N, rows) + _lengths("teacher_lengths", teacher_lengths_N, rows)
    for name, value in (("mini_batch_rows", mini_batch_rows), ("ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}, expected 1 or more")
    real = np.arange(rows) if padding_N is None else np.flatnonzero(~_column("padding", padding_N, bool, rows))

    planned: list[MiniBatch] = []
    total = 0
    for start in range(0, len(real), mini_batch_rows):
        members = real[start : start + mini_batch_rows]
        kept = members[keep[members]]
        if len(kept):
            planned.append(
                MiniBatch(
                    number=total,
                    ranks=_balance(kept.tolist(), cost, ranks),
                    row_count=len(members),
                    token_count=int(response_tokens[members].sum()),
                )
            )
        total += 1
    return MiniBatchPlan(tuple(planned), total - len(planned), _metrics(planned, total, real, keep, cost))


def _balance(kept: list[int], cost: np.ndarray, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Equal counts, near-equal token sums."""
    padding = -len(kept) % ranks
    rows = kept + [PADDING_ROW] * padding
    if ranks == 1:
        return (tuple(rows),)
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions  # imports much of verl: only where needed

    lengths = [_tokens(row, cost) for row in rows]
    parts = get_seqlen_balanced_partitions(lengths, k_partitions=ranks, equal_size=True)
    return tuple(tuple(rows[position] for position in part) for part in parts)


def _tokens(row: int, cost: np.ndarray) -> int:
    return PADDING_ROW_TOKENS if row == PADDING_ROW else int(cost[row])


def _metrics(
    planned: list[MiniBatch], total: int, real: np.ndarray, keep: np.ndarray, cost: np.ndarray
) -> dict[str, float]:
    # verl reduces metric lists by the substrings "max" and "min" of a name, so "mini_batch" may not be part of one.
    forwarded = [row for batch in planned for row in batch.rows]
    tokens, all_tokens = int(cost[forwarded].sum()) if forwarded else 0, int(cost[real].sum()) if len(real) else 0
    heaviest, mean = 0.0, 0.0
    for batch in planned:
        sums = [sum(_tokens(row, cost) for row in rank) for rank in batch.ranks]
        heaviest += max(sums)
        mean += sum(sums) / len(sums)
    return {
        "compaction/rows": float(len(real)),
        "compaction/rows_forwarded": float(len(forwarded)),
        "compaction/rows_left_out": float(len(real) - len(forwarded)),
        "compaction/padding_rows": float(sum(batch.padding for batch in planned)),
        "compaction/updates": float(len(planned)),
        "compaction/updates_skipped": float(total - len(planned)),
        "compaction/tokens_saved_share": 1.0 - tokens / all_tokens if all_tokens else 0.0,
        # 1: all ranks have the same number of tokens; the step takes as long as its heaviest rank
        "compaction/rank_load_ratio": heaviest / mean if mean else 1.0,
    }


# ----------------------------------------------------------------------------------------------------- checked columns


def _column(name: str, values: Any, dtype: Any, rows: int | None = None) -> np.ndarray:
    column = np.asarray(values, dtype=dtype)
    if column.ndim != 1:
        raise ValueError(f"{name} must be a column, found shape {column.shape}")
    if rows is not None and len(column) != rows:
        raise ValueError(f"{name} has {len(column)} entries for {rows} rows")
    return column


def _lengths(name: str, values: Any, rows: int) -> np.ndarray:
    column = _column(name, values, np.int64, rows)
    if len(column) and column.min() < 0:
        raise ValueError(f"row {int(column.argmin())}: {name} is {int(column.min())}, expected 0 or more tokens")
    return column


def _refuse_non_finite(name: str, column: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(column))
    if len(bad):
        raise ValueError(f"row {int(bad[0])}: {name} is {column[bad[0]]}, expected a finite number")
