"""Permutation tests of "no difference": signs of paired differences, labels of unpaired runs.

Under the hypothesis the difference of a pair is as likely to have the other sign (Fisher's randomisation test), and a
run is as likely to be of the other method. Seeds and items are never permuted together: flipping both signs of a
seed-by-item matrix would break up the seeds' common effect and reject too often.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Up to here all permutations are gone through: at most 4,096.
EXACT_UNITS: Final = 12
_CHUNK = 1000


def sign_flip_p_value(differences_N: ArrayLike, *, permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference of 0, from N pairs.

    Args:
        differences_N: [N] one difference a pair: a seed's over items, or an item's over seeds.
        permutations: drawn where there are more than ``EXACT_UNITS`` pairs; then the p-value is at least
            1 / (permutations + 1). The exact one is at least 2^(1 - N): .25 for three seeds.
        seed: of the drawing.

    Raises:
        ValueError: no pair, another shape, a value that is not finite or fewer than 1 permutation.
    """
    differences_N = _finite(differences_N, permutations)
    number = len(differences_N)
    observed = abs(differences_N.sum())
    if number <= EXACT_UNITS:
        signs = 1 - 2 * ((np.arange(2**number)[:, None] >> np.arange(number)) & 1)
        return float(_at_least(np.abs(signs @ differences_N), observed).mean())
    rng = np.random.default_rng(seed)
    found = sum(
        int(_at_least(np.abs((1 - 2 * rng.integers(0, 2, (size, number))) @ differences_N), observed).sum())
        for size in _chunks(permutations)
    )
    return (found + 1) / (permutations + 1)


def label_p_value(first_N: ArrayLike, second_N: ArrayLike, *, permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of equal means of two groups of runs, from all ways to deal out the labels.

    Args:
        first_N, second_N: one mean a run; the groups may differ in size.
        permutations, seed: as in :func:`sign_flip_p_value`, for more than ``EXACT_UNITS`` runs together.

    Raises:
        ValueError: an empty group, another shape, a value that is not finite or fewer than 1 permutation.
    """
    first_N, second_N = _finite(first_N, permutations), _finite(second_N, permutations)
    pooled = np.concatenate([first_N, second_N])
    size = len(first_N)

    def statistic(firsts: NDArray[np.int64]) -> NDArray[np.float64]:
        means = pooled[firsts].mean(axis=-1)
        return np.abs(means - (pooled.sum() - size * means) / len(second_N))

    observed = float(statistic(np.arange(size)))
    if len(pooled) <= EXACT_UNITS:
        return float(_at_least(statistic(np.array(list(combinations(range(len(pooled)), size)))), observed).mean())
    rng = np.random.default_rng(seed)
    found = sum(
        int(_at_least(statistic(rng.random((chunk, len(pooled))).argsort(axis=1)[:, :size]), observed).sum())
        for chunk in _chunks(permutations)
    )
    return (found + 1) / (permutations + 1)


def _at_least(statistics: NDArray[np.float64], observed: float) -> NDArray[np.bool_]:
    # Sums in another order differ by rounding; ties must count.
    return statistics >= observed - 1e-12 * max(1.0, observed)


def _chunks(permutations: int) -> Iterator[int]:
    for start in range(0, permutations, _CHUNK):
        yield min(_CHUNK, permutations - start)


def _finite(values: ArrayLike, permutations: int) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"a permutation test needs values of shape [N] with N at least 1, found {list(found.shape)}")
    if not np.isfinite(found).all():
        raise ValueError("a permutation test needs finite values")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, found {permutations}")
    return found
