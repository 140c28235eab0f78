"""The shape of SNR² over the pass rate: the exponents of a Beta kernel, and whether it is a bell at all.

Shapes: B bins, M of them measured, U of them used in the fit. All in float64; no value has a unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Edges: TypeAlias = Literal["exclude", "shrink"]

PARAMETERS: Final = 3


class TooFewBins(ValueError):
    """The data do not determine the exponents; the message says what is missing."""


# ----------------------------------------------------------------------------------------------------- exponents


@dataclass(frozen=True)
class ExponentFit:
    """SNR² ≈ scale · p^alpha (1-p)^beta.

    Attributes:
        alpha_se, beta_se, scale_se: standard errors; NaN where three bins were used, which any three parameters fit.
        bins_used: bins in the fit.
        bins_left_out: bins without signal (SNR² of 0), not measured, without an error, or at p = 0 or 1.
        r_squared: weighted share of the variance of log SNR² that the fit explains; NaN with three bins.
        reduced_chi2: squared misfit in units of the bins' errors, per degree of freedom; about 1 where the kernel fits.
    """

    alpha: float
    beta: float
    scale: float
    alpha_se: float
    beta_se: float
    scale_se: float
    bins_used: int
    bins_left_out: int
    r_squared: float
    reduced_chi2: float

    def __str__(self) -> str:
        error = "" if math.isnan(self.alpha_se) else f" ± {self.alpha_se:.2f}"
        other = "" if math.isnan(self.beta_se) else f" ± {self.beta_se:.2f}"
        if math.isnan(self.r_squared):
            quality = "three bins: no estimate of the error"
        else:
            quality = f"{self.bins_used} bins, R² {self.r_squared:.2f}, reduced χ² {self.reduced_chi2:.1f}"
        return f"α = {self.alpha:.2f}{error}, β = {self.beta:.2f}{other} ({quality})"


def fit_exponents(
    centres_B: ArrayLike,
    snr2_B: ArrayLike,
    variances_B: ArrayLike,
    *,
    edges: Edges = "exclude",
    samples: int | None = None,
) -> ExponentFit:
    """Weighted least squares of log SNR² on (1, log p, log(1-p)) (PACED's form of SNR²; the fit is our reconstruction).

    The weight of a bin is the inverse variance of its log SNR², by the delta method SNR²² / variance. Where the misfit
    is larger than the bins' errors explain, the standard errors are scaled up by the square root of the reduced χ².
    Leaving out bins whose estimate is 0 favours those that came out high by chance: with many such bins the exponents
    are too small. Pass rates from few rollouts have the same effect: the bins blur into each other.

    Args:
        centres_B: [B] pass rates of the bins, in [0, 1].
        snr2_B: [B] SNR²; bins with 0, NaN or inf are left out and counted.
        variances_B: [B] variance of each SNR² (the squared bootstrap standard error); bins with NaN or 0 are left out.
        edges: ``"exclude"`` leaves out p = 0 and p = 1, where the logarithms are infinite; ``"shrink"`` replaces every
            p by (K p + ½) / (K + 1).
        samples: K, the rollouts behind each rate; needed by ``"shrink"``.

    Raises:
        ValueError: for differing lengths, a centre outside [0, 1] or bad settings.
        TooFewBins: fewer than three usable bins at different pass rates; the message says how many there are and why
            others are missing.
    """
    centres_B, snr2_B, variances_B = (np.asarray(one, dtype=np.float64) for one in (centres_B, snr2_B, variances_B))
    if centres_B.ndim != 1 or not centres_B.shape == snr2_B.shape == variances_B.shape:
        shapes = ", ".join(str(list(one.shape)) for one in (centres_B, snr2_B, variances_B))
        raise ValueError(f"centres, SNR² and variances must have one shape [B], found {shapes}")
    if not ((centres_B >= 0) & (centres_B <= 1)).all():
        raise ValueError(f"centres must lie in [0, 1], found {centres_B.tolist()}")
    if edges == "shrink":
        if samples is None:
            raise ValueError('edges="shrink" needs `samples`, the rollouts behind each pass rate')
        if samples < 1:
            raise ValueError(f"samples must be at least 1, found {samples!r}")
        centres_B = (samples * centres_B + 0.5) / (samples + 1)
    elif edges != "exclude":
        raise ValueError(f'edges must be "exclude" or "shrink", found {edges!r}')

    signal_B = np.isfinite(snr2_B) & (snr2_B > 0)
    error_B = np.isfinite(variances_B) & (variances_B > 0)
    inside_B = (centres_B > 0) & (centres_B < 1)
    used_B = signal_B & error_B & inside_B
    found = len(np.unique(centres_B[used_B]))
    if found < PARAMETERS:
        raise TooFewBins(
            f"the fit needs at least {PARAMETERS} bins at different pass rates strictly between 0 and 1, with SNR² > 0 "
            f"and a standard error; found {found} of {len(centres_B)} (no signal or not measured: {(~signal_B).sum()}, "
            f"no standard error: {(signal_B & ~error_B).sum()}, at 0 or 1: {(signal_B & error_B & ~inside_B).sum()})"
        )

    p_U, target_U = centres_B[used_B], np.log(snr2_B[used_B])
    weight_U = np.square(snr2_B[used_B]) / variances_B[used_B]
    design_U3 = np.stack([np.ones_like(p_U), np.log(p_U), np.log1p(-p_U)], axis=1)
    root_U = np.sqrt(weight_U)
    solution, *_ = np.linalg.lstsq(design_U3 * root_U[:, None], target_U * root_U, rcond=None)
    log_scale, alpha, beta = solution.tolist()

    freedom = len(p_U) - PARAMETERS
    errors, r_squared, reduced = [math.nan] * PARAMETERS, math.nan, math.nan
    if freedom > 0:
        misfit = float(weight_U @ np.square(target_U - design_U3 @ solution))
        total = float(weight_U @ np.square(target_U - np.average(target_U, weights=weight_U)))
        r_squared = 1 - misfit / total if total > 0 else math.nan
        reduced = misfit / freedom
        covariance = np.linalg.inv(design_U3.T @ (design_U3 * weight_U[:, None]))
        errors = np.sqrt(np.diagonal(covariance) * max(1.0, reduced)).tolist()
    return ExponentFit(
        alpha=alpha,
        beta=beta,
        scale=math.exp(log_scale),
        alpha_se=errors[1],
        beta_se=errors[2],
        scale_se=math.exp(log_scale) * errors[0],
        bins_used=len(p_U),
        bins_left_out=len(centres_B) - len(p_U),
        r_squared=r_squared,
        reduced_chi2=reduced,
    )


# ------------------------------------------------------------------------------------------------------- is it a bell


@dataclass(frozen=True)
class BellVerdict:
    """Whether SNR² rises and falls with the pass rate.

    Attributes:
        kind: ``"bell"``, ``"no bell"`` or ``"undecided"`` (fewer than three measured bins).
        sentence: the finding with its numbers, for a person.
        peak: pass rate of the summit of a bell, else None.
    """

    kind: Literal["bell", "no bell", "undecided"]
    sentence: str
    peak: float | None = None


def is_bell(centres_B: ArrayLike, snr2_B: ArrayLike, errors_B: ArrayLike, *, level: float = 0.05) -> BellVerdict:
    """Decide whether SNR² over the pass rate is a bell (our own test; the paper shows a figure).

    It is a bell if some inner bin (1) is above the lowest and above the highest measured pass rate and (2) SNR² nowhere
    falls before it and nowhere rises after it. Differences count when they exceed their standard error by the normal
    quantile of ``level``, one-sided, divided by the number of inner bins in (1), because the summit is chosen after
    seeing the data, and by the number of pairs of bins in (2). A flat curve is therefore called a bell with a
    probability below ``level``. "No bell" means that none was shown: with large errors there may be one.

    Args:
        centres_B: [B] pass rates of the bins.
        snr2_B: [B] SNR²; bins that are not finite are left out.
        errors_B: [B] standard errors of SNR²; bins without one (NaN, 0) are left out.
        level: in (0, 1).

    Raises:
        ValueError: for differing lengths or a bad level.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, found {level!r}")
    columns = [np.asarray(one, dtype=np.float64) for one in (centres_B, snr2_B, errors_B)]
    if columns[0].ndim != 1 or len({one.shape for one in columns}) != 1:
        raise ValueError("centres, SNR² and errors must have one shape [B]")
    rows = np.stack(columns)
    rows = rows[:, np.isfinite(rows).all(axis=0) & (rows[2] > 0)]
    p_M, snr2_M, error_M = rows[:, np.argsort(rows[0], kind="stable")]
    count = len(p_M)
    if count < 3:
        return BellVerdict(
            "undecided",
            f"undecided: {count} of {columns[0].size} bins have a standard error; at least 3 are needed to see a bell",
        )

    # [i, j]: by how many standard errors bin j is above bin i.
    rise_MM = (snr2_M[None, :] - snr2_M[:, None]) / np.hypot(error_M[None, :], error_M[:, None])
    needed = NormalDist().inv_cdf(1 - level / (count - 2))
    needed_within = NormalDist().inv_cdf(1 - level / (count * (count - 1) / 2))
    inner = range(1, count - 1)
    clear = [j for j in inner if min(rise_MM[0, j], rise_MM[-1, j]) > needed]
    if not clear:
        return BellVerdict("no bell", _why_no_summit(p_M, snr2_M, rise_MM, needed))
    smooth = [j for j in clear if _one_summit(rise_MM, j, needed_within)]
    if not smooth:
        summits = _valley(p_M, snr2_M, rise_MM)
        return BellVerdict("no bell", f"no bell: SNR² rises more than once, {summits} (level {level:g})")
    summit = max(smooth, key=lambda j: snr2_M[j])
    return BellVerdict(
        "bell",
        f"a bell: summit at p={p_M[summit]:.2g}, above p={p_M[0]:.2g} by {rise_MM[0, summit]:.1f} and above "
        f"p={p_M[-1]:.2g} by {rise_MM[-1, summit]:.1f} standard errors ({needed:.1f} needed)",
        float(p_M[summit]),
    )


def _one_summit(rise_MM: Floats, summit: int, needed: float) -> bool:
    """No fall before the summit and no rise after it."""
    before = np.triu(-rise_MM[: summit + 1, : summit + 1], 1)
    after = np.triu(rise_MM[summit:, summit:], 1)
    return bool(before.max() <= needed and after.max() <= needed)


def _why_no_summit(p_M: Floats, snr2_M: Floats, rise_MM: Floats, needed: float) -> str:
    top = int(np.argmax(snr2_M))
    if top in (0, len(p_M) - 1):
        return f"no bell: highest at p={p_M[top]:.2g}, an end of the measured range"
    end = min((0, -1), key=lambda one: rise_MM[one, top])
    return (
        f"no bell: highest at p={p_M[top]:.2g}, but only {rise_MM[end, top]:.1f} standard errors above "
        f"p={p_M[end]:.2g} ({needed:.1f} needed)"
    )


def _valley(p_M: Floats, snr2_M: Floats, rise_MM: Floats) -> str:
    """The bin that is most clearly below a bin on its left and one on its right."""
    inner = range(1, len(p_M) - 1)
    low = max(inner, key=lambda j: min((-rise_MM[:j, j]).max(), rise_MM[j, j + 1 :].max()))
    left, right = int(np.argmax(snr2_M[:low])), low + 1 + int(np.argmax(snr2_M[low + 1 :]))
    return f"with summits at p={p_M[left]:.2g} and p={p_M[right]:.2g} and less at p={p_M[low]:.2g}"
