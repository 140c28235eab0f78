"""PACED's closed forms against quadrature, random search and exact enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from recipe.paced_theory import minimax_loss_bound, optimal_weight, variance_ratio

# Gauss-Legendre on (0, π) after p = sin²(θ/2), which makes p(1-p) to any power above -1/2 smooth enough.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(1000)
THETA = (NODES + 1) * math.pi / 2
RATES = np.sin(THETA / 2) ** 2
DENSITY = WEIGHTS * math.pi / 2 * np.sin(THETA) / 2  # dp


def variance_ratio_by_quadrature(signal_exponent: float) -> float:
    """E[(w/Ew)² σ²] / E[σ²] with p uniform, from the definition."""
    weight = RATES * (1 - RATES)
    variance = weight ** (2 * signal_exponent - 1)
    normalised = weight / (DENSITY @ weight)
    return float(DENSITY @ (normalised**2 * variance) / (DENSITY @ variance))


@pytest.mark.parametrize(
    ("signal_exponent", "expected"), [(0.25, 0.84375), (0.34, 0.99922), (0.5, 1.2), (0.75, 1.40625), (1.0, 1.542857)]
)
def test_the_variance_ratio_has_the_published_values(signal_exponent: float, expected: float) -> None:
    assert variance_ratio(signal_exponent) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("signal_exponent", [0.25, 0.34, 0.5, 0.62, 0.75, 1.0, 1.7, 3.0])
def test_the_variance_ratio_is_the_ratio_of_variances(signal_exponent: float) -> None:
    assert DENSITY.sum() == pytest.approx(1, abs=1e-12)
    assert variance_ratio(signal_exponent) == pytest.approx(variance_ratio_by_quadrature(signal_exponent), abs=1e-5)


def test_weighting_stops_to_reduce_the_variance_near_0_34() -> None:
    assert variance_ratio(0.3405) == pytest.approx(1.0, abs=2e-4)
    ratios = [variance_ratio(a) for a in np.linspace(0.02, 3, 60)]
    assert all(np.diff(ratios) > 0)


@pytest.mark.parametrize("bad", [0.0, -0.25, math.nan, math.inf])
def test_a_signal_exponent_without_finite_variance_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        variance_ratio(bad)


@pytest.mark.parametrize(("delta", "expected"), [(0.0, 0.0), (0.05, 0.00250), (0.2, 0.03896), (0.5, 0.21355)])
def test_the_minimax_bound_has_the_reference_values(delta: float, expected: float) -> None:
    assert minimax_loss_bound(delta) == pytest.approx(expected, abs=1e-5)


def loss_of_efficiency(u: np.ndarray, probabilities: np.ndarray) -> float:
    return float(1 - (probabilities @ u) ** 2 / (probabilities @ u**2))


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.01, 2.0),
    arrays.arrays(np.float64, st.integers(1, 12), elements=st.floats(-1, 1)),
    st.randoms(use_true_random=False),
)
def test_weights_within_a_factor_lose_no_more_than_the_bound(delta, exponents, random) -> None:
    mass = np.array([random.random() + 1e-3 for _ in exponents])
    assert loss_of_efficiency(np.exp(delta * exponents), mass / mass.sum()) <= minimax_loss_bound(delta) + 1e-12


@pytest.mark.parametrize("delta", [0.05, 0.2, 0.5, 1.5])
def test_the_bound_is_attained_by_two_points(delta: float) -> None:
    # (m + M)² / (4 m M) is the largest E[u²]/(E u)², with masses that balance m and M.
    low, high = math.exp(-delta), math.exp(delta)
    mass = np.array([high, low]) / (low + high)
    assert loss_of_efficiency(np.array([low, high]), mass) == pytest.approx(minimax_loss_bound(delta), abs=1e-12)


@pytest.mark.parametrize("bad", [-0.1, math.nan])
def test_a_negative_deviation_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        minimax_loss_bound(bad)


@pytest.mark.parametrize(("mean", "deviation", "curvature"), [(0.3, 1.0, 2.0), (1.0, 0.1, 1.0), (0.02, 3.0, 5.0)])
def test_the_optimal_weight_lowers_the_expected_loss_most(mean: float, deviation: float, curvature: float) -> None:
    # At the learning rate 1/L the expected change of loss is -w μ² / L + w² (μ² + σ²) / (2 L).
    weights = np.linspace(0, 1.2, 120_001)
    change = -weights * mean**2 / curvature + weights**2 * (mean**2 + deviation**2) / (2 * curvature)
    assert optimal_weight(mean**2 / deviation**2) == pytest.approx(weights[change.argmin()], abs=1e-5)


def test_the_optimal_weight_follows_the_ratio_where_it_is_small_and_saturates() -> None:
    assert optimal_weight(0.0) == 0.0
    assert optimal_weight(1e-9) == pytest.approx(1e-9, rel=1e-8)
    assert optimal_weight(1.0) == 0.5
    assert optimal_weight(math.inf) == 1.0
    for bad in (-1e-3, math.nan):
        with pytest.raises(ValueError, match="SNR²"):
            optimal_weight(bad)


@pytest.mark.parametrize("samples", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("p", [0.0, 0.03, 0.3, 0.5, 0.9, 1.0])
def test_the_default_weight_of_a_measured_rate_is_too_small_by_one_factor_for_all_p(samples: int, p: float) -> None:
    expected = sum(
        math.comb(samples, k) * p**k * (1 - p) ** (samples - k) * (k / samples) * (1 - k / samples)
        for k in range(samples + 1)
    )
    assert expected == pytest.approx((1 - 1 / samples) * p * (1 - p), abs=1e-12)
