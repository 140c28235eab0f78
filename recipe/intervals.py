"""Confidence intervals of a study's accuracy, by the population they speak about.

* seeds: another training run, evaluated on the same questions;
* items: other questions of the same kind, answered by the same runs;
* seeds and items: another training run on other questions.

Accuracy of seed s on item p is mean + seed effect + item effect + residual (two-way random effects, one value a cell;
the residual holds the sampling of answers and what a run learnt for that item only).

For seeds and items the variance of the grand mean is estimated by A + C: A = MS_seeds / (S P), which holds seeds and
residual, and C = max(MS_items - MS_residual, 0) / (S P), items alone. With S - 1 degrees of freedom for A the known
intervals miss: Satterthwaite's (1946) covers too little at few seeds, as its degrees of freedom are themselves
estimated; Banerjee's (1960), with squared half-width Σ t²(df_i) V_i, covers too much. Ours takes two thirds of the
first and a third of the second squared half-width (our choice, by simulation); ``docs/evaluation.md`` has the coverage.

Shapes: S seeds, P items. Accuracies are shares in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recipe.score_interval import share_interval
from recipe.student_t import student_t_quantile

Floats: TypeAlias = NDArray[np.float64]
Population: TypeAlias = Literal["seeds", "items", "seeds and items"]

SATTERTHWAITE_SHARE: Final = 2 / 3


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        value, low, high: share of right answers, or difference of shares.
        population: what the interval speaks about, see the module.
        n_seeds: runs behind it; of two groups of runs the smaller number.
        n_items: questions behind it.
        level: of confidence.
    """

    value: float
    low: float
    high: float
    population: Population
    n_seeds: int
    n_items: int
    level: float


@dataclass(frozen=True)
class VariancePart:
    """An independent part of the estimated variance of a mean: [...] values and degrees of freedom (at least 1)."""

    value: float | Floats
    df: float | Floats


def over_seeds(accuracy_SP: ArrayLike, level: float = 0.95) -> Interval:
    """t interval over the seeds' means, for these items.

    Args:
        accuracy_SP: [S, P] accuracy of each run on each item.
        level: of confidence, in (0, 1).

    Raises:
        ValueError: fewer than 2 seeds, another shape, a value outside [0, 1] or a level outside (0, 1).
    """
    accuracy_SP = accuracy_matrix(accuracy_SP)
    return t_interval(accuracy_SP, [seed_part([accuracy_SP])], "seeds", level)


def over_items(accuracy_SP: ArrayLike, level: float = 0.95) -> Interval:
    """Score interval over the items' means, for these runs; see :mod:`recipe.score_interval`.

    Args:
        accuracy_SP: [S, P] accuracy of each run on each item; one run is enough.
        level: of confidence, in (0, 1).

    Raises:
        ValueError: another shape, a value outside [0, 1] or a level outside (0, 1).
    """
    accuracy_SP = accuracy_matrix(accuracy_SP)
    low, high = share_interval(accuracy_SP.mean(axis=0), level)
    seeds, items = accuracy_SP.shape
    return Interval(float(accuracy_SP.mean()), low, high, "items", seeds, items, level)


def over_seeds_and_items(accuracy_SP: ArrayLike, level: float = 0.95) -> Interval:
    """Interval for another training run on other items; see the module.

    Args:
        accuracy_SP: [S, P] accuracy of each run on each item.
        level: of confidence, in (0, 1).

    Raises:
        ValueError: fewer than 2 seeds or items, another shape, a value outside [0, 1] or a level outside (0, 1).
    """
    accuracy_SP = accuracy_matrix(accuracy_SP)
    return t_interval(accuracy_SP, joint_parts([accuracy_SP]), "seeds and items", level)


# ------------------------------------------------------------------------------------------------------ variance parts


def seed_part(groups: Sequence[Floats]) -> VariancePart:
    """Variance of the grand mean over runs: seeds and residual; of two [S, P] groups, of the difference of means.

    Raises:
        ValueError: fewer than 2 seeds in a group.
    """
    for values_SP in groups:
        if len(values_SP) < 2:
            raise ValueError(f"an interval over seeds needs at least 2 seeds, found {len(values_SP)}")
    return sum_of_parts(
        [
            VariancePart(float(values_SP.mean(axis=1).var(ddof=1)) / len(values_SP), len(values_SP) - 1)
            for values_SP in groups
        ]
    )


def sum_of_parts(parts: Sequence[VariancePart]) -> VariancePart:
    """One part for several, with Satterthwaite's degrees of freedom (Welch's, for the seeds of two methods)."""
    if len(parts) == 1:
        return parts[0]
    total = np.asarray(sum(part.value for part in parts), dtype=np.float64)
    square = sum(np.square(part.value) / part.df for part in parts)
    lowest = reduce(np.minimum, (np.asarray(part.df, dtype=np.float64) for part in parts))
    lowest = np.broadcast_to(lowest, total.shape)
    # Without any variance the degrees of freedom do not matter; rounding may put them below the smallest.
    df = np.divide(total**2, square, out=lowest.copy(), where=square > 0)
    return VariancePart(total, np.maximum(df, lowest))


def item_part(means_P: Floats) -> VariancePart:
    """Variance of the grand mean over items: items and residual. ValueError with fewer than 2 items."""
    items = len(means_P)
    if items < 2:
        raise ValueError(f"an interval over items needs at least 2 items, found {items}")
    return VariancePart(float(means_P.var(ddof=1)) / items, items - 1)


def residual_mean_square(values_SP: Floats) -> float:
    """Mean square of what neither seeds nor items explain, (S - 1)(P - 1) degrees of freedom."""
    seeds, items = values_SP.shape
    rest_SP = values_SP - values_SP.mean(axis=0) - values_SP.mean(axis=1)[:, None] + values_SP.mean()
    return float(np.square(rest_SP).sum()) / ((seeds - 1) * (items - 1))


def joint_parts(groups: Sequence[Floats]) -> list[VariancePart]:
    """Parts for seeds and items together: the seeds', with the residual, and the items' own.

    Args:
        groups: one [S, P] matrix, or two of different methods on the same items; the mean is then the first's minus
            the second's.

    Raises:
        ValueError: fewer than 2 seeds in a group, or fewer than 2 items.
    """
    seeds = seed_part(groups)
    means = [values_SP.mean(axis=0) for values_SP in groups]
    items = item_part(means[0] if len(means) == 1 else means[0] - means[1])
    # The residual is in the seeds' part already.
    counted = sum(residual_mean_square(values_SP) / values_SP.size for values_SP in groups)
    return [seeds, VariancePart(max(items.value - counted, 0.0), items.df)]


def half_width(parts: Sequence[VariancePart], level: float) -> Floats:
    """Half-width of the interval of a mean whose variance is the sum of parts; with one part, the t interval's.

    Args:
        parts: of [...] values each.
        level: of confidence, in (0, 1).

    Returns:
        [...] float64.

    Raises:
        ValueError: no part, or a level outside (0, 1).
    """
    if not parts:
        raise ValueError("an interval needs at least one part of variance")
    if not 0 < level < 1:
        raise ValueError(f"the level must lie strictly between 0 and 1, found {level!r}")
    probability = (1 + level) / 2
    banerjee = sum(student_t_quantile(probability, part.df) ** 2 * part.value for part in parts)
    if len(parts) == 1:
        return np.sqrt(banerjee)
    together = sum_of_parts(parts)
    satterthwaite = student_t_quantile(probability, together.df) ** 2 * together.value
    return np.sqrt(SATTERTHWAITE_SHARE * satterthwaite + (1 - SATTERTHWAITE_SHARE) * banerjee)


def t_interval(accuracy_SP: Floats, parts: Sequence[VariancePart], population: Population, level: float) -> Interval:
    """The mean of accuracies with :func:`half_width`, cut at 0 and 1."""
    value, half = float(accuracy_SP.mean()), float(half_width(parts, level))
    seeds, items = accuracy_SP.shape
    return Interval(value, max(0.0, value - half), min(1.0, value + half), population, seeds, items, level)


def accuracy_matrix(accuracy_SP: ArrayLike) -> Floats:
    """[S, P] float64. ValueError for another shape, an empty matrix or a value that is not in [0, 1]."""
    found = np.asarray(accuracy_SP, dtype=np.float64)
    if found.ndim != 2 or not found.size:
        raise ValueError(f"accuracies must have shape [seeds, items], found {list(found.shape)}")
    outside_SP = ~((found >= 0) & (found <= 1))
    if outside_SP.any():
        seed, item = (int(index[0]) for index in np.nonzero(outside_SP))
        raise ValueError(f"accuracies must lie in [0, 1]; seed {seed}, item {item} has {found[seed, item]:g}")
    return found
