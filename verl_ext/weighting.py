"""Question weights from pass rates: one Beta kernel p^alpha (1-p)^beta for every method.

* alpha = beta = 0: every question counts 1 (SDPO, arXiv 2601.20802);
* alpha = beta = 1/2: sqrt(p(1-p)) (SC-SDPO, arXiv 2605.27765, abstract; the residual factor of GRPO's gradient);
* alpha = beta = 1: p(1-p) (PACED, arXiv 2603.11178, default exponents; the residual factor of Dr.GRPO's gradient).

Weights are computed once, from the global train batch, before anything splits or reorders it. Normalising inside a
micro-batch would cancel them: a micro-batch of one row then always has weight 1.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

NORMALIZERS: Final[tuple[str, ...]] = ("none", "mean", "mean_active", "half", "max", "constant")
KERNELS: Final[tuple[str, ...]] = ("beta", "interval", "gaussian")
RATE_TOLERANCE: Final[float] = 1e-6


def question_weights(
    pass_rates_P: Tensor,
    *,
    alpha: float,
    beta: float,
    normalizer: str = "mean",
    cap: float | None = None,
    floor_zero: float | None = None,
    floor_one: float | None = None,
    constant: float | None = None,
    kernel: str = "beta",
    low: float = 0.2,
    high: float = 0.8,
    centre: float = 0.5,
    width: float = 0.2,
) -> Tensor:
    """Weight of each question: normalised p^alpha (1-p)^beta, with 0**0 = 1; or another kernel, for comparison.

    Args:
        pass_rates_P: [P] pass rates in [0, 1], one per question. NaN marks a question without a single verified
            rollout: it gets weight 0 and is left out of every normalising mean or maximum.
        alpha: exponent of p, at least 0.
        beta: exponent of 1 - p, at least 0.
        normalizer: ``"none"``; ``"mean"`` (divide by the mean over all questions, so the average weight is 1);
            ``"mean_active"`` (mean over questions with weight > 0); ``"half"`` (times 2; for alpha = beta = 1/2 this is
            GRPO's mean absolute advantage, in [0, 1]); ``"max"`` (divide by the largest); ``"constant"`` (divide by
            ``constant``, e.g. PACED's mean over the questions it kept). SC-SDPO's own batch normaliser is not
            published in detail; ``"mean"`` keeps SDPO's learning rate and loss scale.
        cap: upper bound, applied last and without renormalising. With ``"mean"`` a single active question among P
            gets weight P, which is what a cap is for.
        floor_zero: the raw kernel at p = 0 is raised to at least this. For tasks with textual feedback, where rows
            without any success still carry a signal.
        floor_one: the raw kernel at p = 1 is raised to at least this, to keep distilling solved questions.
        constant: divisor of ``normalizer="constant"``.
        kernel: ``"beta"``; ``"interval"``: 1 where low <= p <= high, else 0 (the hard filter PACED is compared with);
            ``"gaussian"``: exp(-(p - centre)^2 / (2 width^2)).
        low, high: bounds of the interval, both inside.
        centre, width: mean and standard deviation of the gaussian.

    Returns:
        [P] weights, without gradient. float64 stays float64, everything else comes back as float32. A batch whose
        kernel is 0 everywhere returns zeros: no signal, so nothing to divide by.

    Raises:
        ValueError: for a rate outside [0, 1], negative or non-finite settings, an unknown normaliser, or ``constant``
            missing or given without its normaliser.
    """
    rates_P = _checked_rates(pass_rates_P)
    _check_number("alpha", alpha, minimum=0.0)
    _check_number("beta", beta, minimum=0.0)
    for name, value in (("floor_zero", floor_zero), ("floor_one", floor_one)):
        if value is not None:
            _check_number(name, value, minimum=0.0)

    measured_P = ~rates_P.isnan()
    rates_P = rates_P.masked_fill(~measured_P, 0.0)
    if kernel == "beta":
        raw_P = beta_kernel(rates_P, alpha=alpha, beta=beta)
    elif kernel == "interval":
        raw_P = interval_kernel(rates_P, low=low, high=high)
    elif kernel == "gaussian":
        raw_P = gaussian_kernel(rates_P, centre=centre, width=width)
    else:
        raise ValueError(f"kernel {kernel!r} is unknown; allowed: {', '.join(KERNELS)}")
    if floor_zero is not None:
        raw_P = torch.where(rates_P == 0, raw_P.clamp(min=floor_zero), raw_P)
    if floor_one is not None:
        raw_P = torch.where(rates_P == 1, raw_P.clamp(min=floor_one), raw_P)
    return normalize(raw_P.masked_fill(~measured_P, 0.0), measured_P, normalizer=normalizer, cap=cap, constant=constant)


def beta_kernel(rates_P: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Raw kernel p^alpha (1-p)^beta (PACED, arXiv 2603.11178; SC-SDPO at 1/2), with 0**0 = 1.

    Args:
        rates_P: [P] floating-point rates in [0, 1], not NaN. Negative exponents give inf at the end points.

    Returns:
        [P] kernel values. An exponent of 0 contributes a factor of exactly 1.
    """
    return rates_P.pow(alpha) * (1.0 - rates_P).pow(beta)


def interval_kernel(rates_P: Tensor, *, low: float, high: float) -> Tensor:
    """1 where low <= p <= high, else 0: the hard filter that PACED is compared with.

    Raises:
        ValueError: bounds outside [0, 1] or in the wrong order.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low and high must be ordered and lie in [0, 1], found {low} and {high}")
    # A rate k/K and a bound written in decimals may differ in the last bit.
    inside_P = (rates_P >= low - RATE_TOLERANCE) & (rates_P <= high + RATE_TOLERANCE)
    return inside_P.to(rates_P.dtype)


def gaussian_kernel(rates_P: Tensor, *, centre: float, width: float) -> Tensor:
    """exp(-(p - centre)^2 / (2 width^2)): a bell that, unlike the Beta kernel, is not 0 at p = 0 and p = 1.

    Raises:
        ValueError: ``width`` is not positive.
    """
    _check_number("centre", centre)
    _check_number("width", width, above=0.0)
    return torch.exp(-0.5 * ((rates_P - centre) / width).square())


def normalize(
    raw_P: Tensor,
    measured_P: Tensor,
    *,
    normalizer: str,
    cap: float | None = None,
    constant: float | None = None,
) -> Tensor:
    """Apply a normaliser of :func:`question_weights`, then the cap.

    Args:
        raw_P: [P] finite, non-negative kernel values; 0 where not measured.
        measured_P: [P] bool; questions that take part in means.

    Returns:
        [P] weights; all zeros if ``raw_P`` is.

    Raises:
        ValueError: for an unknown normaliser or a bad ``cap`` or ``constant``.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer {normalizer!r} is unknown; allowed: {', '.join(NORMALIZERS)}")
    if normalizer == "constant":
        if constant is None:
            raise ValueError("normalizer 'constant' needs `constant`, the mean to divide by")
        _check_number("constant", constant, above=0.0)
    elif constant is not None:
        raise ValueError(f"constant={constant} is only used by normalizer 'constant', found normalizer {normalizer!r}")
    if cap is not None:
        _check_number("cap", cap, above=0.0)

    weights_P = raw_P
    if raw_P.numel() and bool((raw_P > 0).any()):
        if normalizer in ("mean", "mean_active"):
            counted_P = measured_P if normalizer == "mean" else raw_P > 0
            # Multiplying before dividing keeps equal weights at exactly 1 (needed for alpha = beta = 0).
            weights_P = raw_P * counted_P.sum() / raw_P.sum()
        elif normalizer == "half":
            weights_P = raw_P * 2.0
        elif normalizer == "max":
            weights_P = raw_P / raw_P.max()
        elif normalizer == "constant":
            weights_P = raw_P / constant
    return weights_P if cap is None else weights_P.clamp(max=cap)


def effective_sample_size(weights_P: Tensor) -> float:
    """Kish's effective number of questions, (sum w)^2 / sum w^2; 0.0 for an all-zero or empty batch.

    Raises:
        ValueError: if a weight is negative or not finite.
    """
    weights_P = weights_P.detach().to(torch.float64)
    if not bool((weights_P.isfinite() & (weights_P >= 0)).all()):
        raise ValueError("weights must be finite and not negative")
    if weights_P.numel() == 0 or not bool((weights_P > 0).any()):
        return 0.0
    scaled_P = weights_P / weights_P.max()
    return float(scaled_P.sum().square() / scaled_P.square().sum())


def _checked_rates(pass_rates_P: Tensor) -> Tensor:
    if not isinstance(pass_rates_P, Tensor):
        raise ValueError(f"pass_rates_P must be a tensor, found {type(pass_rates_P).__name__}")
    if pass_rates_P.dim() != 1:
        raise ValueError(f"pass_rates_P must have shape [P], found {list(pass_rates_P.shape)}")
    if pass_rates_P.is_complex():
        raise ValueError("pass_rates_P must be real")
    rates_P = pass_rates_P.detach()
    if rates_P.dtype != torch.float64:
        rates_P = rates_P.to(torch.float32)
    outside_P = (rates_P < 0) | (rates_P > 1)
    if bool(outside_P.any()):
        first = int(outside_P.nonzero()[0])
        raise ValueError(f"pass rates must lie in [0, 1] (or be NaN); question {first} has {float(rates_P[first])}")
    return rates_P


def _check_number(name: str, value: float, *, minimum: float | None = None, above: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, found {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum:g}, found {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be greater than {above:g}, found {value}")
