"""Quantiles of Student's t distribution, as numpy has none."""

from __future__ import annotations

from functools import cache
from math import exp, lgamma, pi, sqrt
from statistics import NormalDist

import numpy as np
from numpy.polynomial import Chebyshev
from numpy.typing import ArrayLike, NDArray

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_MAX_STEPS = 500


def student_t_quantile(probability: float, df: ArrayLike) -> NDArray[np.float64]:
    """The t with P(T <= t) = probability, to about six digits.

    Args:
        probability: in (0.5, 1).
        df: [...] degrees of freedom, at least 1, not necessarily whole.

    Returns:
        [...] float64 quantiles, above 0.

    Raises:
        ValueError: an argument outside its range.
    """
    if not 0.5 < probability < 1:
        raise ValueError(f"the probability of a quantile must lie in (0.5, 1), found {probability!r}")
    df = np.asarray(df, dtype=np.float64)
    if not (df >= 1).all():
        raise ValueError("degrees of freedom must be at least 1")
    return np.exp(_log_quantile(probability)(1 / df))


@cache
def _log_quantile(probability: float) -> Chebyshev:
    # The quantile's logarithm is so smooth in 1 / df that a polynomial keeps seven digits.
    return Chebyshev.interpolate(lambda inverse: np.log(_quantiles(probability, 1 / inverse)), 20, domain=[0, 1])


def _quantiles(probability: float, df: NDArray[np.float64]) -> NDArray[np.float64]:
    # With t = sqrt(df) tan(angle) the density is cos(angle)^(df - 1) / B(df / 2, 1 / 2) over angles.
    scale = np.array([exp(lgamma((one + 1) / 2) - lgamma(one / 2)) for one in df]) / sqrt(pi)
    # The CDF is concave here and the normal quantile lies below the root: Newton's steps rise to it, never past it.
    found = np.full(df.shape, NormalDist().inv_cdf(probability))
    nodes, weights = (_NODES + 1) / 2, _WEIGHTS / 2
    for _ in range(_MAX_STEPS):
        angle = np.arctan(found / np.sqrt(df))
        below = 0.5 + scale * angle * (np.cos(angle[..., None] * nodes) ** (df - 1)[..., None] @ weights)
        density = scale / np.sqrt(df) * np.cos(angle) ** (df + 1)
        step = (probability - below) / density
        found = found + step
        if np.all(np.abs(step) <= 1e-9 * (1 + found)):
            break
    return found
