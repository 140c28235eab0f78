"""Metrics of a step from the statistics of its distilled rows: by outcome, and by the pass rate of their question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_ext.loss import ROW_STATISTICS, TOKEN_DIVERGENCE

# Upper bounds of the pass-rate bins, and their names: p = 0 to 0.25, above it to 0.5, ...
PASS_RATE_BINS = ((0.25, "p0_25"), (0.5, "p25_50"), (0.75, "p50_75"), (1.0, "p75_100"))

# Statistics of a row that become metrics; the gap is treated by outcome as well.
MEANS = {
    "divergence": "distill/divergence",
    "top_share": "distill/top5_share",
    "teacher_entropy": "teacher/entropy",
    "student_nll": "student/nll",
    "teacher_mass": "teacher/topk_mass",
    "student_mass": "student/topk_mass",
}


def take_row_statistics(metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    """Takes the lists of :func:`verl_ext.loss.row_statistics` out of the update's metrics, as columns."""
    names = [name for name in metrics if name.startswith(ROW_STATISTICS)]
    names = [name for name in names if name != ROW_STATISTICS + TOKEN_DIVERGENCE]
    return {name.removeprefix(ROW_STATISTICS): _column(metrics.pop(name)) for name in names}


def take_token_divergences(metrics: dict[str, Any]) -> dict[int, tuple[float, ...]]:
    """Takes the divergence of recorded rows out of the update's metrics: by row id, one number per response token.

    To be called before :func:`take_row_statistics`, which takes the ids.
    """
    tokens = _flat(metrics.pop(ROW_STATISTICS + TOKEN_DIVERGENCE, []))
    ids = _flat(metrics.get(ROW_STATISTICS + "id", []))
    return {int(row): values for row, values in zip(ids, tokens, strict=True) if values}


def _flat(values: Sequence[Any]) -> list[Any]:
    # Several mini-batches: a list each.
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _column(values: Sequence[Any]) -> np.ndarray:
    return np.asarray(_flat(values), dtype=np.float64)


def row_metrics(
    rows: Mapping[str, np.ndarray],
    *,
    right_N: Sequence[bool],
    pass_rates_N: Sequence[float],
    on_support: bool,
) -> dict[str, float]:
    """Flat metrics.

    ``teacher/gap`` is the median over right rows of mean_t log pi_T(y_t) - log pi_S(y_t) (``gap_wrong``: wrong ones);
    the median, because a few answers that are right by luck, with wrong steps, decide a mean (kept as ``*_mean``). The
    other statistics are means over the distilled rows. ``by_pass_rate/<statistic>/<bin>`` are means within a bin.

    Args:
        rows: columns by name, one entry per distilled row, ``gap`` at least; ``id`` indexes the two others.
        right_N: whether the answer is right, by row id.
        pass_rates_N: pass rate of the row's question, by row id.
        on_support: whether there are masses of a support.
    """
    ids = rows.get("id", np.zeros(0)).astype(int)
    if not len(ids):
        return {}
    right, rates = np.asarray(right_N, dtype=bool)[ids], np.asarray(pass_rates_N, dtype=np.float64)[ids]
    metrics: dict[str, float] = {}
    for name, chosen in (("gap", right), ("gap_wrong", ~right)):
        if chosen.any():
            metrics[f"teacher/{name}"] = float(np.median(rows["gap"][chosen]))
            metrics[f"teacher/{name}_mean"] = float(rows["gap"][chosen].mean())
    # Where the teacher disagrees (SD-Zero's self-localisation): how much, and on how few tokens, by outcome.
    for outcome, chosen in (("right", right), ("wrong", ~right)):
        for name in ("divergence", "top_share"):
            if chosen.any() and name in rows:
                metrics[f"{MEANS[name]}_{outcome}"] = float(rows[name][chosen].mean())
    names = [name for name in MEANS if name in rows and (on_support or not name.endswith("_mass"))]
    for name in names:
        metrics[MEANS[name]] = float(rows[name].mean())
    low = -1.0
    for high, bin_name in PASS_RATE_BINS:
        inside = (rates > low) & (rates <= high)
        low = high
        if inside.any():
            for name in ["gap", *names]:
                metrics[f"by_pass_rate/{name}/{bin_name}"] = float(rows[name][inside].mean())
    return metrics
