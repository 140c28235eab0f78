"""Signal-to-noise ratio of per-question gradients by pass rate: the measurement behind PACED's weights.

PACED (arXiv 2603.11178 v3) states SNR²(p) = p^a (1-p)^b e^{r(p)} with bounded r, takes the Beta kernel p^a (1-p)^b as
the question weight, and shows SNR² by pass rate with one gradient a question, equal-width bins and values divided by
the bin maximum. How SNR² and its errors are estimated is our reconstruction.

Shapes: P questions, N questions of one bin, D components of a (projected) gradient, B bins, R resamples. Arrays are
numpy or torch; everything is computed in float64. Rates and SNR² have no unit; signal and noise have the gradient's
unit squared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from recipe.run_files import to_plain
from recipe.snr_shape import BellVerdict, Edges, ExponentFit, TooFewBins, fit_exponents, is_bell

Floats: TypeAlias = NDArray[np.float64]
Centre: TypeAlias = Literal["mean", "midpoint"]

EXACT: Final = "exact"
LEFT_OUT: Final = -1
# Below this a resample often repeats one pair of questions, and the spread of two questions is always zero.
MIN_QUESTIONS_FOR_SPREAD: Final = 5


# ------------------------------------------------------------------------------------------------------------- bins


def bin_questions(
    rates_P: ArrayLike | Tensor, bins: int | str = 10, *, samples: int | None = None
) -> NDArray[np.int64]:
    """The bin of each question.

    Args:
        rates_P: [P] pass rates in [0, 1]; NaN marks a question that was not measured.
        bins: the number of bins of equal width over [0, 1], each closed on the left, the last one on both sides
            (PACED's figure); or ``"exact"``: one bin for each number of successes k = 0 … K.
        samples: K, the rollouts behind each rate; needed by ``"exact"``.

    Returns:
        [P] int64 index of the bin, -1 where the rate is NaN.

    Raises:
        ValueError: for a rate outside [0, 1], bad settings, or, with ``"exact"``, a rate that is no multiple of 1/K.
    """
    rates_P = _rates(rates_P)
    edges = bin_edges(bins, samples=samples)
    measured_P = ~np.isnan(rates_P)
    known_P = np.where(measured_P, rates_P, 0.0)
    if bins == EXACT:
        successes_P = known_P * samples
        index_P = np.rint(successes_P)
        # Rates may have been stored as float32.
        uneven_P = np.abs(successes_P - index_P) > 1e-4
        if uneven_P.any():
            first = int(np.flatnonzero(uneven_P)[0])
            raise ValueError(
                f"question {first} has pass rate {rates_P[first]:g}, which is no multiple of 1/{samples} "
                f"({int(uneven_P.sum())} such questions); set them to NaN or use bins of equal width"
            )
    else:
        # The small shift puts a rate such as 29/100 into the bin that starts there, in spite of rounding.
        index_P = np.minimum(np.floor(known_P * (len(edges) - 1) + 1e-9), len(edges) - 2)
    return np.where(measured_P, index_P, LEFT_OUT).astype(np.int64)


def bin_edges(bins: int | str = 10, *, samples: int | None = None) -> Floats:
    """[B + 1] edges of the bins of :func:`bin_questions`, from 0 to 1.

    An exact bin reaches half way to its neighbours. Raises ValueError for bad settings.
    """
    if bins == EXACT:
        if samples is None:
            raise ValueError('bins="exact" needs `samples`, the rollouts behind each pass rate')
        _check_count("samples", samples, 1)
        inner = (np.arange(samples) + 0.5) / samples
        return np.concatenate([[0.0], inner, [1.0]])
    _check_count("bins", bins, 1)
    return np.arange(bins + 1) / bins


# -------------------------------------------------------------------------------------------------------------- SNR²


@dataclass(frozen=True)
class SnrParts:
    """SNR² of one bin and what it is made of.

    Attributes:
        snr2: max(signal, 0) / noise; NaN with fewer than 2 questions or where every gradient is zero, inf where all
            gradients are equal and not zero.
        signal: unbiased estimate of the squared norm of the mean gradient; may be negative.
        noise: tr S, the trace of the sample covariance: the variance of one question's gradient.
        n: questions.
    """

    snr2: float
    signal: float
    noise: float
    n: int


def snr_squared(gradients_ND: ArrayLike | Tensor) -> float:
    """SNR² of N gradients, see :func:`snr_parts`."""
    return snr_parts(gradients_ND).snr2


def snr_parts(gradients_ND: ArrayLike | Tensor) -> SnrParts:
    """SNR² = max(|mean g|² - tr S / N, 0) / tr S, with S the sample covariance (our reconstruction).

    The norm of a mean of N noisy vectors is too large by tr S / N on average; without the subtraction, bins with few
    questions would seem to have signal.

    Args:
        gradients_ND: [N, D] one gradient a question, any floating type.

    Raises:
        ValueError: for another shape or a value that is not finite.
    """
    gradients_ND = _gradients(gradients_ND)
    n = len(gradients_ND)
    if n < 2:
        return SnrParts(math.nan, math.nan, math.nan, n)
    mean_D = gradients_ND.mean(axis=0)
    noise = float(np.square(gradients_ND - mean_D).sum()) / (n - 1)
    signal = float(mean_D @ mean_D) - noise / n
    if noise > 0:
        snr2 = max(signal, 0.0) / noise
    else:
        snr2 = math.inf if signal > 0 else math.nan
    return SnrParts(snr2, signal, noise, n)


@dataclass(frozen=True)
class Spread:
    """Standard error and percentile interval of SNR²; NaN where there are too few questions."""

    se: float
    low: float
    high: float


def bootstrap_snr(
    gradients_ND: ArrayLike | Tensor, *, resamples: int = 1000, confidence: float = 0.95, seed: int | Sequence[int] = 0
) -> Spread:
    """Standard error and percentile interval of SNR² by resampling questions (our choice; the paper states none).

    The interval is cut at 0, as the estimate is; the standard error is that of the estimate before it is cut. On
    Gaussian gradients the error is right within a few percent once N · SNR² is well above 1; towards no signal it
    becomes too large, by up to sqrt(3) (the statistic is then a degenerate U-statistic): errors are on the safe side.

    Args:
        gradients_ND: [N, D] one gradient a question.
        confidence: of the interval, in (0, 1).
        seed: of the resampling, anything that ``numpy.random.default_rng`` takes.

    Returns:
        NaN values with fewer than ``MIN_QUESTIONS_FOR_SPREAD`` questions or without any variance.

    Raises:
        ValueError: for bad settings, another shape or a value that is not finite.
    """
    _check_count("resamples", resamples, 2)
    _check_share("confidence", confidence)
    gradients_ND = _gradients(gradients_ND)
    parts = snr_parts(gradients_ND)
    if parts.n < MIN_QUESTIONS_FOR_SPREAD or not parts.noise > 0:
        return Spread(math.nan, math.nan, math.nan)
    replicates_R = resampled_snr(gradients_ND, resamples=resamples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.maximum(np.nanquantile(replicates_R, [tail, 1 - tail]), 0.0)
    return Spread(float(np.nanstd(replicates_R, ddof=1)), float(low), float(high))


def resampled_snr(gradients_ND: ArrayLike | Tensor, *, resamples: int, seed: int | Sequence[int] = 0) -> Floats:
    """[R] SNR² of resamples of the questions, not cut at 0; NaN where a resample holds a single question only.

    Signal and noise are means over pairs of questions, of g_i·g_j and of |g_i - g_j|²/2. A resample holds a question
    several times, and the pair of a question with itself is no evidence of a common direction: it would raise every
    signal by tr S / N and, in high dimension, swamp the spread. Such pairs are left out. All pairs come from the Gram
    matrix, so a resample costs O(N²) whatever D is.
    """
    gradients_ND = _gradients(gradients_ND)
    n = len(gradients_ND)
    gram_NN = gradients_ND @ gradients_ND.T
    square_N = np.diagonal(gram_NN)
    counts_RN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    own_RN = np.square(counts_RN)
    pairs_R = n**2 - own_RN.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        signal_R = (np.einsum("rn,rn->r", counts_RN @ gram_NN, counts_RN) - own_RN @ square_N) / pairs_R
        noise_R = (n * counts_RN - own_RN) @ square_N / pairs_R - signal_R
        ratio_R = signal_R / noise_R
    return np.where(np.isfinite(ratio_R), ratio_R, np.nan)


# --------------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class SnrBin:
    """One bin of questions: its pass rates, and its SNR² with signal and noise as in :class:`SnrParts`.

    Attributes:
        lower, upper: edges.
        centre: pass rate the bin stands for.
        n: questions.
        se, low, high: spread of ``snr2``, see :class:`Spread`.
    """

    lower: float
    upper: float
    centre: float
    n: int
    snr2: float
    se: float
    low: float
    high: float
    signal: float
    noise: float


@dataclass(frozen=True)
class SnrReport:
    """The analysis of one checkpoint.

    Attributes:
        bins: in the order of the pass rate, empty ones included.
        fit: the exponents, or None.
        no_fit: why there is no fit, else empty.
        verdict: bell or no bell.
        settings: what the caller says about model, data and step, then what was used.
    """

    bins: tuple[SnrBin, ...]
    fit: ExponentFit | None
    no_fit: str
    verdict: BellVerdict
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite becomes None."""
        return to_plain(self, "snr")


def analyse(
    rates_P: ArrayLike | Tensor,
    gradients_PD: NDArray[np.floating] | Tensor,
    *,
    bins: int | str = 10,
    samples: int | None = None,
    centre: Centre = "mean",
    edges: Edges = "exclude",
    resamples: int = 1000,
    confidence: float = 0.95,
    level: float = 0.05,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> SnrReport:
    """SNR² by pass rate, its exponents and whether it is a bell.

    Args:
        rates_P: [P] pass rates; questions with NaN are left out and counted in the settings.
        gradients_PD: [P, D] one gradient a question. Only one bin at a time is held in float64.
        bins, samples: as in :func:`bin_questions`.
        centre: the pass rate of a bin: the ``"mean"`` of its questions, or the ``"midpoint"`` of its edges (PACED's
            figure, inferred). With K a multiple of the bins' number all rates stand on lower edges, and the mid-points
            are off by half a bin.
        edges: as in :func:`fit_exponents`.
        resamples, confidence, seed: as in :func:`bootstrap_snr`; each bin draws from its own stream.
        level: as in :func:`is_bell`.
        about: further plain values for the settings.

    Raises:
        ValueError: for bad settings, differing lengths, a rate outside [0, 1] or a gradient that is not finite. Too
            few bins for a fit are no error: ``no_fit`` says why.
    """
    if centre not in ("mean", "midpoint"):
        raise ValueError(f'centre must be "mean" or "midpoint", found {centre!r}')
    rates_P = _rates(rates_P)
    if len(gradients_PD) != len(rates_P):
        raise ValueError(
            f"{len(rates_P)} pass rates for {len(gradients_PD)} gradients; expected one of each a question"
        )
    index_P = bin_questions(rates_P, bins, samples=samples)
    edges_B = bin_edges(bins, samples=samples)
    found: list[SnrBin] = []
    for index, (lower, upper) in enumerate(zip(edges_B[:-1].tolist(), edges_B[1:].tolist(), strict=True)):
        members = np.flatnonzero(index_P == index)
        if bins == EXACT:
            at = index / samples
        elif centre == "mean" and len(members):
            at = float(rates_P[members].mean())
        else:
            at = (lower + upper) / 2
        gradients_ND = _gradients(gradients_PD[members])
        parts = snr_parts(gradients_ND)
        spread = bootstrap_snr(gradients_ND, resamples=resamples, confidence=confidence, seed=[seed, index])
        found.append(
            SnrBin(
                lower=lower,
                upper=upper,
                centre=at,
                n=parts.n,
                snr2=parts.snr2,
                se=spread.se,
                low=spread.low,
                high=spread.high,
                signal=parts.signal,
                noise=parts.noise,
            )
        )
    centres, values, errors = ([getattr(one, name) for one in found] for name in ("centre", "snr2", "se"))
    fit, no_fit = None, ""
    try:
        fit = fit_exponents(centres, values, np.square(errors), edges=edges, samples=samples)
    except TooFewBins as error:
        no_fit = str(error)
    settings = {
        **(about or {}),
        "questions": int((index_P != LEFT_OUT).sum()),
        "unmeasured": int((index_P == LEFT_OUT).sum()),
        "dimensions": int(gradients_PD.shape[1]),
        "bins": bins,
        "samples": samples,
        "centre": centre,
        "edges": edges,
        "resamples": resamples,
        "confidence": confidence,
        "level": level,
        "seed": seed,
    }
    return SnrReport(tuple(found), fit, no_fit, is_bell(centres, values, errors, level=level), settings)


# ------------------------------------------------------------------------------------------------------------ checks


def _rates(rates_P: ArrayLike | Tensor) -> Floats:
    found = _float64(rates_P)
    if found.ndim != 1:
        raise ValueError(f"pass rates must have shape [P], found {list(found.shape)}")
    outside_P = (found < 0) | (found > 1)
    if outside_P.any():
        first = int(np.flatnonzero(outside_P)[0])
        raise ValueError(f"pass rates must lie in [0, 1] (or be NaN); question {first} has {found[first]:g}")
    return found


def _gradients(gradients_ND: ArrayLike | Tensor) -> Floats:
    found = _float64(gradients_ND)
    if found.ndim != 2:
        raise ValueError(f"gradients must have shape [N, D], found {list(found.shape)}")
    broken_N = ~np.isfinite(found).all(axis=1)
    if broken_N.any():
        first = int(np.flatnonzero(broken_N)[0])
        raise ValueError(f"gradient {first} is not finite ({int(broken_N.sum())} such gradients)")
    return found


def _float64(values: ArrayLike | Tensor) -> Floats:
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _check_count(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        allowed = f"a whole number of at least {minimum}" + (' or "exact"' if name == "bins" else "")
        raise ValueError(f"{name} must be {allowed}, found {value!r}")


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, found {value!r}")
