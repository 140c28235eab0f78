"""Power of a comparison: the smallest true difference that n seeds and P items would show.

Shapes: S seeds, P items, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from recipe.intervals import Floats, VariancePart, half_width, item_part, residual_mean_square, seed_part, sum_of_parts
from recipe.paired import Pairing

# The error of the result is about 1% with as many draws.
_DRAWS: Final = 20_000


@dataclass(frozen=True)
class VarianceComponents:
    """Variances of a difference of two runs on one item (squares of shares).

    Attributes:
        seed: over pairs of runs, common to all items.
        item: over items, common to all pairs of runs.
        residual: the rest: sampling of answers, and what a run learnt for one item only.
    """

    seed: float
    item: float
    residual: float


def variance_components(differences_SP: ArrayLike) -> VarianceComponents:
    """Components by analysis of variance (two-way random effects), negative estimates set to 0.

    Args:
        differences_SP: [S, P] accuracy of one method's run minus the other's, item by item; for unpaired seeds under
            any pairing. A matrix of accuracies gives the components of a single method.

    Raises:
        ValueError: fewer than 2 seeds or items, another shape or a value that is not finite.
    """
    values_SP = np.asarray(differences_SP, dtype=np.float64)
    if values_SP.ndim != 2 or not np.isfinite(values_SP).all():
        raise ValueError(f"differences must be finite and of shape [seeds, items], found {list(values_SP.shape)}")
    seed, item = seed_part([values_SP]).value, item_part(values_SP.mean(axis=0)).value
    seeds, items = values_SP.shape
    residual = residual_mean_square(values_SP)
    return VarianceComponents(
        max(seed * seeds - residual / items, 0.0), max(item * items - residual / seeds, 0.0), residual
    )


def detectable_difference(
    components: VarianceComponents,
    n_seeds: int,
    n_items: int,
    *,
    power: float = 0.8,
    level: float = 0.95,
    pairing: Pairing = "paired",
    seed: int = 0,
) -> float:
    """The smallest true difference beyond delta for which the verdict is "yes" with the given power.

    It is the quantile ``power`` of half-width minus error, both drawn under normal effects: the verdict is "yes" where
    difference + error > delta + half-width. The interval is the one of :func:`recipe.paired.compare` for seeds and
    items.

    Args:
        components: of the difference, as measured on a first study; a guess of them is a guess of the result.
        n_seeds: runs of each method, at least 2.
        n_items: at least 2.
        power: chance to see it, in (0, 1).
        level: of the interval, in (0, 1).
        pairing: of the seeds; unpaired ones give the interval more degrees of freedom.
        seed: of the drawing.

    Returns:
        A share; 0 where no component has any variance.

    Raises:
        ValueError: a negative component or a setting outside its range.
    """
    if not 0 < power < 1:
        raise ValueError(f"power must lie strictly between 0 and 1, found {power!r}")
    needed_D = _needed_differences(components, n_seeds, n_items, level, pairing, seed)
    return max(0.0, float(np.quantile(needed_D, power)))


def power_of(
    difference: float,
    components: VarianceComponents,
    n_seeds: int,
    n_items: int,
    *,
    level: float = 0.95,
    pairing: Pairing = "paired",
    seed: int = 0,
) -> float:
    """Chance of "yes" for a true difference (beyond delta, a share); arguments of :func:`detectable_difference`."""
    return float((_needed_differences(components, n_seeds, n_items, level, pairing, seed) < difference).mean())


def _needed_differences(
    components: VarianceComponents, n_seeds: int, n_items: int, level: float, pairing: Pairing, seed: int
) -> Floats:
    if min(components.seed, components.item, components.residual) < 0:
        raise ValueError(f"variances must not be negative, found {components}")
    if n_seeds < 2 or n_items < 2:
        raise ValueError(f"at least 2 seeds and 2 items are needed, found {n_seeds} and {n_items}")
    if pairing not in ("paired", "unpaired"):
        raise ValueError(f'pairing must be "paired" or "unpaired", found {pairing!r}')
    rng = np.random.default_rng(seed)
    residual = components.residual / (n_seeds * n_items)
    by_seed, by_item = components.seed / n_seeds + residual, components.item / n_items + residual
    groups = 1 if pairing == "paired" else 2

    def estimates_D(variance: float, df: int) -> Floats:
        return variance * rng.chisquare(df, _DRAWS) / df

    # Each method's runs have half of the variance of a difference of two independent runs.
    seeds = sum_of_parts([VariancePart(estimates_D(by_seed / groups, n_seeds - 1), n_seeds - 1) for _ in range(groups)])
    counted_D = estimates_D(residual, groups * (n_seeds - 1) * (n_items - 1))
    items = VariancePart(np.maximum(estimates_D(by_item, n_items - 1) - counted_D, 0.0), n_items - 1)
    error_D = np.sqrt(by_seed + by_item - residual) * rng.standard_normal(_DRAWS)
    return half_width([seeds, items], level) - error_D
