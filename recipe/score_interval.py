"""Interval for a mean share over questions, sane where nearly all shares are 0 or 1.

A t interval has no width where every question is right, although other questions may be wrong. Wilson's score interval
(Wilson 1927) solves (m - μ)² = t² V(μ) / P for μ with the variance V(μ) = D μ(1 - μ) that a mean μ would have. D, the
design effect of survey statistics (Kish 1965), is the variance over questions as a share of the largest possible one:
1 where a question has one sample, smaller where it has many or where pass@k smooths them. The shrinkage of D is ours.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from recipe.student_t import student_t_quantile

# D counts one more question of share 0 and one of share 1, so that it goes to 1 where the sample shows no spread.
_EXTRA = 0.5


def share_interval(shares_P: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Lower and upper bound of the population mean of shares, from P questions drawn from it.

    Args:
        shares_P: [P] one value in [0, 1] a question: a mean, pass@k or maj@k of its samples.
        level: of confidence, in (0, 1).

    Returns:
        Bounds within [0, 1] around the mean; 0 and 1 for a single question, which says nothing about others.

    Raises:
        ValueError: no question, another shape, a share outside [0, 1] or a level outside (0, 1).
    """
    shares_P = np.asarray(shares_P, dtype=np.float64)
    if shares_P.ndim != 1 or not len(shares_P):
        raise ValueError(f"shares must have shape [P] with at least one question, found {list(shares_P.shape)}")
    if not ((shares_P >= 0) & (shares_P <= 1)).all():
        raise ValueError("shares must lie in [0, 1]")
    if not 0 < level < 1:
        raise ValueError(f"the level must lie strictly between 0 and 1, found {level!r}")
    questions = len(shares_P)
    if questions == 1:
        return 0.0, 1.0
    mean = float(shares_P.mean())
    spread = float(np.square(shares_P - mean).sum())
    design = (spread + _EXTRA) / (questions * mean * (1 - mean) + _EXTRA)
    ratio = float(student_t_quantile((1 + level) / 2, questions - 1)) ** 2 * design / questions
    centre = (mean + ratio / 2) / (1 + ratio)
    half = math.sqrt(ratio * mean * (1 - mean) + ratio**2 / 4) / (1 + ratio)
    # Rounding must not put a mean of exactly 0 or 1 outside.
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))
