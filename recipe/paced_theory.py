"""Closed forms of PACED's analysis (arXiv 2603.11178 v3): what a question weight gains and what a wrong one costs."""

from __future__ import annotations

import math


def variance_ratio(signal_exponent: float) -> float:
    """Variance of the weighted gradient over that of the unweighted one, R = E[(w/Ew)² σ²] / E[σ²].

    With w = p(1-p), a signal ∝ [p(1-p)]^a, σ² ∝ [p(1-p)]^γ, γ = 2a - 1, and p uniform, R is
    B(3+γ, 3+γ) / (B(2,2)² B(1+γ, 1+γ)). PACED (arXiv 2603.11178 v3) states R ≈ 0.84 at a = 1/4, ≈ 1.00 at 0.34 and > 1
    from 1/2; the closed form, with weights of mean 1, is our reconstruction and gives all three.

    Args:
        signal_exponent: a, above 0; at 0 the unweighted variance is infinite.

    Raises:
        ValueError: for an exponent that is not a finite number above 0.
    """
    if not (math.isfinite(signal_exponent) and signal_exponent > 0):
        raise ValueError(f"the signal exponent must be a finite number above 0, found {signal_exponent!r}")
    gamma = 2 * signal_exponent - 1
    return math.exp(_log_beta(3 + gamma) - 2 * _log_beta(2.0) - _log_beta(1 + gamma))


def minimax_loss_bound(delta: float) -> float:
    """Largest loss of efficiency, tanh² δ, with weights within a factor e^±δ of the optimal ones.

    For u = w/w* in [e^-δ, e^δ] the efficiency (E u)² / E[u²] is at least 1/cosh² δ. PACED (arXiv 2603.11178 v3) states
    O(δ²); the exact bound is our reconstruction.

    Raises:
        ValueError: for a negative δ or NaN.
    """
    if not delta >= 0:
        raise ValueError(f"delta must be at least 0, found {delta!r}")
    return math.tanh(delta) ** 2


def optimal_weight(snr2: float) -> float:
    """Weight of one question that lowers the loss most in a step, SNR² / (1 + SNR²), up to the learning rate.

    It minimises -η w μ² + (L/2) η² w² (μ² + σ²); about SNR² where that is small, which is why PACED (arXiv 2603.11178
    v3) weights by it. Our reconstruction.

    Raises:
        ValueError: for a negative SNR² or NaN.
    """
    if not snr2 >= 0:
        raise ValueError(f"SNR² must be at least 0, found {snr2!r}")
    return 1.0 / (1.0 + 1.0 / snr2) if snr2 > 0 else 0.0


def _log_beta(argument: float) -> float:
    """log B(x, x)."""
    return 2 * math.lgamma(argument) - math.lgamma(2 * argument)
