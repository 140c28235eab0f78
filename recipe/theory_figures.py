"""The pictures of ``docs/theory.md``: each a function of its own, from the functions that training and analysis use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from recipe.paced_theory import minimax_loss_bound, optimal_weight, variance_ratio
from recipe.svg_plot import Curve, Panel, plot_svg
from recipe.theory_gradients import distillation_norms, expected_weights, policy_gradient_norms
from recipe.theory_learnability import leading_order, learnability
from recipe.theory_snr import bell_report
from verl_ext.weighting import beta_kernel

LAW, BLUE, ORANGE, GREEN, PURPLE, RED = "#858b94", "#2a78d6", "#c26a12", "#2f8f57", "#9a5fd0", "#d24a5c"
SIZES: Final = ((2, PURPLE), (4, GREEN), (8, BLUE), (16, ORANGE))
# Closer together at the ends, where √(p(1-p)) is steep.
RATES: Final = (1 - torch.linspace(0.02 * torch.pi, 0.98 * torch.pi, 97, dtype=torch.float64).cos()) / 2
RATE_LABEL = "pass rate p"
SHARE = (0.0, 1.0)
HIGHEST: Final = {0.5: 0.5, 1.0: 0.25}  # of [p(1-p)]^exponent


def gradient_laws() -> str:
    """Norm of the expected policy gradient, without and with division by the standard deviation."""
    panels = []
    for exponent, estimator, law, title in (
        (1.0, "grpo_without_std", "p(1−p)", "GRPO without std, REINFORCE"),
        (0.5, "grpo", "√(p(1−p))", "GRPO with std"),
    ):
        curves = [_curve(law, _kernel(exponent), LAW, width=5)]
        curves += [_curve(f"G = {size}", policy_gradient_norms(RATES, size, estimator), color) for size, color in SIZES]
        if estimator == "grpo":
            curves.append(_curve("G = 128", policy_gradient_norms(RATES, 128, estimator), RED, dash="5 4"))
        else:
            curves.append(_curve("REINFORCE, G = 2", policy_gradient_norms(RATES, 2, "reinforce"), RED, dash="5 4"))
        panels.append(Panel(title, RATE_LABEL, "‖gradient‖ / ‖Δ‖", curves, SHARE, (0.0, HIGHEST[exponent])))
    return plot_svg("Expected gradient norm by pass rate and group size", panels)


def weight_bias() -> str:
    """The weight of an estimated pass rate, on average, and its share of the weight of the true one."""
    panels = []
    for exponent, name in ((0.5, "√(p(1−p))"), (1.0, "p(1−p)")):
        curves = [_curve(name, _kernel(exponent), LAW, width=5)]
        curves += [_curve(f"G = {size}", expected_weights(RATES, size, exponent), color) for size, color in SIZES]
        title = f"mean weight of p̂, exponent {'½, SC-SDPO' if exponent == 0.5 else '1, PACED'}"
        panels.append(Panel(title, RATE_LABEL, "E[weight of p̂]", curves, SHARE, (0.0, HIGHEST[exponent])))
    for exponent in (0.5, 1.0):
        curves = [
            _curve(f"G = {size}", expected_weights(RATES, size, exponent) / _kernel(exponent), color)
            for size, color in SIZES
        ]
        panels.append(Panel("its share of the weight of p", RATE_LABEL, "E[w(p̂)] / w(p)", curves, SHARE, SHARE))
    return plot_svg("Bias of weights from G rollouts", panels)


def self_distillation() -> str:
    """Gradient of SDPO's divergences in a toy, and the same under SC-SDPO's weight."""
    panels = []
    for exponent, title in ((0.0, "SDPO: every question 1"), (0.5, "SC-SDPO: times √(p(1−p))")):
        curves = [
            _curve(name, distillation_norms(RATES, kind, exponent=exponent), color)
            for kind, name, color in (
                ("forward_kl", "forward KL", BLUE),
                ("reverse_kl", "reverse KL", ORANGE),
                ("jsd", "JSD ½", GREEN),
            )
        ]
        highest = max(max(curve.y) for curve in curves)
        panels.append(Panel(title, RATE_LABEL, "‖gradient‖ / ‖Δ‖", curves, SHARE, (0.0, highest)))
    return plot_svg("Gradient norm of self-distillation by pass rate", panels)


def learnability_expansions() -> str:
    """KL to the regularised optimum and its gain of pass rate, exact and to leading order, times 2 b² and b."""
    size = 100
    counts = range(2, size - 1)
    rates = [k / size for k in counts]
    # A normalised reward of a rare outcome is large; its expansion needs a larger b.
    temperatures = {
        False: ((0.5, PURPLE), (1.0, GREEN), (5.0, BLUE)),
        True: ((2.0, PURPLE), (5.0, GREEN), (20.0, BLUE)),
    }
    panels = []
    for what, power, factor, label in (
        ("divergence", 2, 2.0, "2 b² · KL(π₀ ‖ π*)"),
        ("gain", 1, 1.0, "b · (p* − p)"),
    ):
        for normalised in (False, True):
            law = [factor * getattr(leading_order(p, 1.0, normalised=normalised), what) for p in rates]
            curves = [Curve("leading order", rates, law, LAW, width=5)]
            for b, color in temperatures[normalised]:
                exact = [
                    factor * b**power * getattr(learnability(k, size, b, normalised=normalised), what) for k in counts
                ]
                curves.append(Curve(f"b = {b:g}", rates, exact, color))
            title = f"{'learnability' if what == 'divergence' else 'gain of pass rate'}, "
            title += "normalised reward" if normalised else "outcome as reward"
            highest = 2.0 if normalised and what == "divergence" else 1.3 * max(law)
            panels.append(Panel(title, RATE_LABEL, label, curves, SHARE, (0.0, highest)))
    return plot_svg("Learnability by pass rate, exact and to leading order", panels)


def snr_bell() -> str:
    """PACED's bell as it is, as it is measured, and what follows from it for weights."""
    alpha, beta, level, rollouts = 1.3, 0.8, 0.5, 10
    kernel = beta_kernel(RATES, alpha=alpha, beta=beta)
    truth = level * kernel / beta_kernel(torch.tensor([alpha / (alpha + beta)]).double(), alpha=alpha, beta=beta)
    panels = []
    for samples, title, color in (
        (None, "pass rates known", BLUE),
        (rollouts, f"pass rates from K = {rollouts} rollouts", ORANGE),
    ):
        report = bell_report(alpha, beta, level=level, samples=samples)
        bins = [one for one in report.bins if math.isfinite(one.snr2) and math.isfinite(one.se)]
        curves = [_curve(f"true, p^{alpha:g} (1−p)^{beta:g}", truth, LAW, width=5)]
        if report.fit is not None:
            fit = report.fit
            fitted = fit.scale * beta_kernel(RATES, alpha=fit.alpha, beta=fit.beta)
            curves.append(_curve(f"fit, p^{fit.alpha:.2f} (1−p)^{fit.beta:.2f}", fitted, color))
        errors = [one.se for one in bins]
        centres, values = [one.centre for one in bins], [one.snr2 for one in bins]
        curves.append(Curve("bins ± standard error", centres, values, color, dots=True, errors=errors))
        panels.append(Panel(f"the bell, {title}", RATE_LABEL, "SNR²", curves, SHARE, (0.0, 0.8)))
    ratios = np.linspace(0, 4, 81).tolist()
    weights = [
        Curve("SNR²", ratios, ratios, LAW, dash="5 4"),
        Curve("SNR² / (1 + SNR²)", ratios, [optimal_weight(value) for value in ratios], BLUE),
    ]
    panels.append(Panel("weight that lowers the loss most", "SNR² of a question", "weight", weights, (0.0, 4.0), SHARE))
    exponents = np.linspace(0.05, 1.2, 116).tolist()
    stated = [0.25, 0.34, 0.5, 1.0]
    deviations = np.linspace(0, 1.2, 61).tolist()
    variance = [
        Curve("unweighted", [0.0, 1.2], [1.0, 1.0], LAW, dash="5 4"),
        Curve("R(a)", exponents, [variance_ratio(a) for a in exponents], BLUE),
        Curve("¼, 0.34, ½, 1", stated, [variance_ratio(a) for a in stated], BLUE, dots=True),
        Curve("tanh² δ, lost at most", deviations, [minimax_loss_bound(d) for d in deviations], ORANGE),
    ]
    across = "signal exponent a; log deviation δ"
    title = "variance ratio R, efficiency lost"
    panels.append(Panel(title, across, "R; share lost", variance, (0.0, 1.2), (0.0, 2.0)))
    return plot_svg("PACED: signal-to-noise ratio by pass rate, and weights from it", panels)


FIGURES: Final[dict[str, Callable[[], str]]] = {
    "gradient_laws": gradient_laws,
    "weight_bias": weight_bias,
    "self_distillation": self_distillation,
    "learnability": learnability_expansions,
    "snr_bell": snr_bell,
}
"""Name of the file, without its ending, to the function that draws it."""


def _kernel(exponent: float) -> Tensor:
    return beta_kernel(RATES, alpha=exponent, beta=exponent)


def _curve(name: str, values_P: Tensor, color: str, *, dash: str = "", width: int = 2) -> Curve:
    return Curve(name, RATES.tolist(), values_P.tolist(), color, dash=dash, width=width)
