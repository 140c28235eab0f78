"""The kernels that the Beta kernel is compared with, against a float64 formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.config_axes import KERNELS as CONFIG_KERNELS
from verl_ext.weighting import KERNELS, gaussian_kernel, interval_kernel, question_weights

RATES = st.integers(1, 16).flatmap(
    lambda size: st.lists(st.integers(0, size), min_size=1, max_size=20).map(lambda ks: [k / size for k in ks])
)


def rates(values: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def weigh(rates_P: torch.Tensor, **changed: Any) -> torch.Tensor:
    return question_weights(rates_P, **({"alpha": 1.0, "beta": 1.0, "normalizer": "none"} | changed))


def test_the_config_allows_what_there_is() -> None:
    assert CONFIG_KERNELS == KERNELS


@settings(max_examples=60, deadline=None)
@given(values=RATES, centre=st.floats(0, 1), width=st.floats(0.01, 10))
def test_the_bell_is_its_formula(values: list[float], centre: float, width: float) -> None:
    expected = [math.exp(-((p - centre) ** 2) / (2 * width**2)) for p in values]
    np.testing.assert_allclose(gaussian_kernel(rates(values), centre=centre, width=width).numpy(), expected, rtol=1e-12)
    weights = weigh(rates(values), kernel="gaussian", centre=centre, width=width)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(values=RATES, bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_the_interval_is_one_inside_and_zero_outside(values: list[float], bounds: list[float]) -> None:
    low, high = bounds
    weights = weigh(rates(values), kernel="interval", low=low, high=high).tolist()
    for p, weight in zip(values, weights, strict=True):
        if low <= p <= high:
            assert weight == 1.0
        elif p < low - 1e-5 or p > high + 1e-5:
            assert weight == 0.0
        else:
            assert weight in (0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", range(1, 33))
def test_both_bounds_are_inside_whatever_the_precision(size: int, dtype: torch.dtype) -> None:
    for low in range(size + 1):
        for high in range(low, size + 1):
            # The bounds in decimals, as in a YAML file; the rates as training makes them, k / K.
            bounds = float(f"{low / size:.12f}"), float(f"{high / size:.12f}")
            inside = interval_kernel(rates([k / size for k in range(size + 1)], dtype), low=bounds[0], high=bounds[1])
            assert inside.tolist() == [float(low <= k <= high) for k in range(size + 1)]


def test_a_question_without_a_rate_has_no_weight_and_no_part_in_the_mean() -> None:
    values = rates([0.0, math.nan, 0.5])
    for kernel in ("interval", "gaussian"):
        weights = weigh(values, kernel=kernel, low=0.0, high=1.0, width=1e9, normalizer="mean")
        assert weights.tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-12)


def test_normaliser_cap_and_floors_apply_to_every_kernel() -> None:
    values = rates([0.0, 0.5, 0.5, 1.0])
    assert weigh(values, kernel="interval", low=0.2, high=0.8, normalizer="mean").tolist() == [0, 2, 2, 0]
    assert weigh(values, kernel="interval", low=0.2, high=0.8, normalizer="mean", cap=1.5).tolist() == [0, 1.5, 1.5, 0]
    assert weigh(values, kernel="interval", low=0.2, high=0.8, floor_zero=0.25).tolist() == [0.25, 1, 1, 0]
    assert weigh(values, kernel="interval", low=0.6, high=0.8, normalizer="mean").tolist() == [0, 0, 0, 0]
    bell = weigh(values, kernel="gaussian", normalizer="mean_active")
    assert float(bell.mean()) == pytest.approx(1.0) and float(bell.min()) > 0, "unlike the Beta kernel at the ends"


def test_exponents_do_nothing_to_the_other_kernels() -> None:
    values = rates([0.1, 0.4, 0.9])
    for kernel in ("interval", "gaussian"):
        assert torch.equal(weigh(values, kernel=kernel), weigh(values, kernel=kernel, alpha=3.0, beta=0.0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel": "bell"}, "kernel 'bell' is unknown; allowed: beta, interval, gaussian"),
        ({"kernel": "interval", "low": 0.6, "high": 0.4}, "found 0.6 and 0.4"),
        ({"kernel": "interval", "low": -0.1, "high": 0.4}, "found -0.1 and 0.4"),
        ({"kernel": "interval", "low": 0.1, "high": 1.1}, "found 0.1 and 1.1"),
        ({"kernel": "interval", "low": math.nan, "high": 1.0}, "found nan and 1.0"),
        ({"kernel": "gaussian", "width": 0.0}, "width must be greater than 0, found 0.0"),
        ({"kernel": "gaussian", "width": -1.0}, "width must be greater than 0, found -1.0"),
        ({"kernel": "gaussian", "width": math.inf}, "width must be a finite number"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        weigh(rates([0.5]), **changed)
    assert message in str(caught.value)
