"""Question weights against hand-computed tables and an independent float64 formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.weighting import NORMALIZERS, effective_sample_size, question_weights

torch.set_num_threads(1)

EXAMPLE = torch.tensor([0.0, 1 / 8, 1 / 2, 1.0], dtype=torch.float64)
EXPONENTS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 0.3])
GROUP_SIZES = st.sampled_from([1, 4, 8, 16])


def oracle(rates, alpha, beta, normalizer, constant=None):
    """The definition, one question at a time in plain Python."""
    raw = [(1.0 if alpha == 0 else p**alpha) * (1.0 if beta == 0 else (1 - p) ** beta) for p in rates]
    active = [w for w in raw if w > 0]
    if not active:
        return [0.0] * len(raw)
    divisor = {
        "none": 1.0,
        "mean": sum(raw) / len(raw),
        "mean_active": sum(active) / len(active),
        "half": 0.5,
        "max": max(raw),
        "constant": constant,
    }[normalizer]
    return [w / divisor for w in raw]


@st.composite
def batches(draw):
    size = draw(GROUP_SIZES)
    counts = draw(st.lists(st.integers(0, size), min_size=1, max_size=40))
    return torch.tensor(counts, dtype=torch.float64) / size


@pytest.mark.parametrize(
    ("group_size", "expected"),
    [
        (4, [0, 0.4330, 0.5, 0.4330, 0]),
        (8, [0, 0.3307, 0.4330, 0.4841, 0.5, 0.4841, 0.4330, 0.3307, 0]),
        (16, [0, 0.2421, 0.3307, 0.3903, 0.4330, 0.4635, 0.4841, 0.4961, 0.5]),
    ],
)
def test_sc_sdpo_weights_match_the_table_for_each_group_size(group_size, expected):
    rates = torch.arange(len(expected), dtype=torch.float64) / group_size
    weights = question_weights(rates, alpha=0.5, beta=0.5, normalizer="none")
    np.testing.assert_allclose(weights.numpy(), expected, atol=5e-5)


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        ("none", [0, 0.330719, 0.5, 0]),
        ("mean", [0, 1.592447, 2.407553, 0]),
        ("mean_active", [0, 0.796223, 1.203777, 0]),
        ("half", [0, 0.661438, 1, 0]),
        ("max", [0, 0.661438, 1, 0]),
    ],
)
def test_normalisers_match_the_worked_example(normalizer, expected):
    weights = question_weights(EXAMPLE, alpha=0.5, beta=0.5, normalizer=normalizer)
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)


def test_effective_sample_size_matches_the_worked_example():
    assert effective_sample_size(question_weights(EXAMPLE, alpha=0.5, beta=0.5)) == pytest.approx(1.920, abs=5e-4)
    assert effective_sample_size(torch.ones(7)) == pytest.approx(7)
    assert effective_sample_size(torch.zeros(7)) == 0.0
    assert effective_sample_size(torch.tensor([0.0, 1e-30])) == pytest.approx(1)


def test_paced_default_is_p_times_one_minus_p():
    weights = question_weights(EXAMPLE, alpha=1.0, beta=1.0, normalizer="none")
    np.testing.assert_allclose(weights.numpy(), [0, 7 / 64, 1 / 4, 0], atol=1e-15)


@settings(max_examples=80, deadline=None)
@given(batches(), EXPONENTS, EXPONENTS, st.sampled_from([n for n in NORMALIZERS if n != "constant"]))
def test_weights_equal_the_definition(rates, alpha, beta, normalizer):
    weights = question_weights(rates, alpha=alpha, beta=beta, normalizer=normalizer)
    np.testing.assert_allclose(weights.numpy(), oracle(rates.tolist(), alpha, beta, normalizer), rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(batches(), EXPONENTS, EXPONENTS)
def test_mean_normalised_weights_average_one_unless_all_are_zero(rates, alpha, beta):
    weights = question_weights(rates.float(), alpha=alpha, beta=beta)
    assert weights.dtype == torch.float32
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    if (weights > 0).any():
        assert weights.mean().item() == pytest.approx(1.0, abs=1e-6)
    else:
        assert torch.equal(weights, torch.zeros_like(weights))


@pytest.mark.parametrize("count", [1, 3, 7, 32, 49, 100, 1023])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("normalizer", ["mean", "mean_active", "max", "none"])
def test_exponent_zero_gives_exactly_one_for_every_question(count, dtype, normalizer):
    rates = torch.linspace(0, 1, count).to(dtype)
    weights = question_weights(rates, alpha=0.0, beta=0.0, normalizer=normalizer)
    assert torch.equal(weights, torch.ones_like(weights))


def test_exponent_zero_gives_exactly_one_beside_unmeasured_questions():
    rates = torch.tensor([0.0, math.nan, 1.0, 0.3, math.nan])
    weights = question_weights(rates, alpha=0.0, beta=0.0)
    assert weights.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_zero_to_the_zero_is_one_on_each_side():
    rates = torch.tensor([0.0, 1.0])
    assert question_weights(rates, alpha=0.0, beta=1.0, normalizer="none").tolist() == [1.0, 0.0]
    assert question_weights(rates, alpha=1.0, beta=0.0, normalizer="none").tolist() == [0.0, 1.0]


@pytest.mark.parametrize("count", [32, 24, 31])
def test_one_active_question_takes_the_weight_of_the_whole_batch(count):
    rates = torch.zeros(count)
    rates[5] = 1 / 8
    weights = question_weights(rates, alpha=0.5, beta=0.5)
    assert weights[5].item() == pytest.approx(count, rel=1e-6)
    assert weights.sum() == weights[5]
    assert question_weights(rates, alpha=0.5, beta=0.5, normalizer="mean_active")[5] == 1


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_batch_without_signal_gives_zeros_and_no_nan(normalizer):
    constant = 0.4 if normalizer == "constant" else None
    for rates in (torch.tensor([0.0, 1.0, 0.0]), torch.full((3,), math.nan), torch.zeros(0)):
        weights = question_weights(rates, alpha=0.5, beta=0.5, normalizer=normalizer, constant=constant, cap=4.0)
        assert torch.equal(weights, torch.zeros_like(rates))


def test_unmeasured_questions_get_zero_and_do_not_enter_the_mean():
    with_nan = torch.tensor([0.0, 1 / 8, math.nan, 1 / 2, 1.0, math.nan], dtype=torch.float64)
    for normalizer in ("mean", "mean_active", "max", "half", "none"):
        weights = question_weights(with_nan, alpha=0.5, beta=0.5, normalizer=normalizer)
        expected = question_weights(EXAMPLE, alpha=0.5, beta=0.5, normalizer=normalizer)
        assert torch.equal(weights[[0, 1, 3, 4]], expected)
        assert weights[[2, 5]].tolist() == [0.0, 0.0]


def test_floors_do_not_apply_to_unmeasured_questions():
    rates = torch.tensor([math.nan, 0.0, 1.0])
    weights = question_weights(rates, alpha=0.5, beta=0.5, normalizer="none", floor_zero=0.2, floor_one=0.1)
    np.testing.assert_allclose(weights.numpy(), [0.0, 0.2, 0.1], rtol=1e-6)


def test_cap_applies_last_and_is_not_renormalised():
    free = question_weights(EXAMPLE, alpha=0.5, beta=0.5)
    capped = question_weights(EXAMPLE, alpha=0.5, beta=0.5, cap=2.0)
    assert torch.equal(capped, free.clamp(max=2.0))
    assert capped.mean() < 1


def test_floors_raise_the_raw_kernel_before_normalising():
    weights = question_weights(EXAMPLE, alpha=0.5, beta=0.5, floor_zero=0.25, floor_one=0.05)
    raw = np.array([0.25, math.sqrt(7) / 8, 0.5, 0.05])
    np.testing.assert_allclose(weights.numpy(), raw / raw.mean(), rtol=1e-12)


def test_a_floor_never_lowers_the_kernel():
    rates = torch.tensor([0.0, 1.0])
    weights = question_weights(rates, alpha=0.0, beta=0.0, normalizer="none", floor_zero=0.1, floor_one=0.1)
    assert weights.tolist() == [1.0, 1.0]


def test_constant_normaliser_divides_by_the_given_mean():
    weights = question_weights(EXAMPLE, alpha=1, beta=1, normalizer="constant", constant=0.125)
    np.testing.assert_allclose(weights.numpy(), [0, 0.875, 2, 0], rtol=1e-12)


def test_expected_variance_of_the_empirical_rate_shrinks_by_one_factor_for_all_p():
    for group_size in (4, 8, 16):
        rates = torch.arange(group_size + 1, dtype=torch.float64) / group_size
        kernel = question_weights(rates, alpha=1, beta=1, normalizer="none").numpy()
        for p in (0.02, 0.1, 0.5, 0.9):
            pmf = [math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k) for k in range(group_size + 1)]
            assert np.dot(pmf, kernel) == pytest.approx((1 - 1 / group_size) * p * (1 - p), abs=1e-12)


@pytest.mark.parametrize(("p", "expected"), [(0.02, 0.0504), (0.1, 0.2095), (0.5, 0.4639)])
def test_expected_sc_sdpo_weight_is_biased_low_as_tabulated(p, expected):
    kernel = question_weights(torch.arange(9, dtype=torch.float64) / 8, alpha=0.5, beta=0.5, normalizer="none")
    pmf = [math.comb(8, k) * p**k * (1 - p) ** (8 - k) for k in range(9)]
    assert np.dot(pmf, kernel.numpy()) == pytest.approx(expected, abs=1e-4)


def test_micro_batch_self_normalisation_cancels_the_weights_where_the_global_form_does_not():
    losses = torch.tensor([0.3, 1.1, 0.2, 2.0, 0.9, 0.4], dtype=torch.float64)
    rates = torch.tensor([1 / 8, 4 / 8, 7 / 8, 2 / 8, 6 / 8, 3 / 8], dtype=torch.float64)
    weights = question_weights(rates, alpha=0.5, beta=0.5)
    weighted_mean = (weights * losses).mean()
    assert abs(weighted_mean - losses.mean()) > 1e-2  # otherwise the claims below would say nothing

    def local(splits):
        parts = zip(weights.split(splits), losses.split(splits), strict=True)
        return torch.stack([(w * x).sum() / w.sum() for w, x in parts]).mean()

    def fixed(splits):
        return sum((w * x).sum() / 6 for w, x in zip(weights.split(splits), losses.split(splits), strict=True))

    torch.testing.assert_close(local([1] * 6), losses.mean(), rtol=1e-14, atol=0)
    for splits in ([1] * 6, [2, 4], [5, 1], [3, 3], [6]):
        torch.testing.assert_close(fixed(splits), weighted_mean, rtol=1e-14, atol=0)


@settings(max_examples=40, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_weights_follow_their_questions_under_reordering(rates, random):
    order = list(range(len(rates)))
    random.shuffle(order)
    weights = question_weights(rates, alpha=0.5, beta=0.5)
    torch.testing.assert_close(question_weights(rates[order], alpha=0.5, beta=0.5), weights[order], rtol=1e-14, atol=0)


def test_input_is_not_changed_and_half_precision_is_raised():
    rates = torch.tensor([0.0, 0.5, math.nan], dtype=torch.bfloat16)
    before = rates.clone()
    assert question_weights(rates, alpha=0.5, beta=0.5, floor_zero=1.0).dtype == torch.float32
    assert question_weights(EXAMPLE, alpha=0.5, beta=0.5).dtype == torch.float64
    assert torch.equal(rates.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize(
    ("rates", "options", "message"),
    [
        ([0.5, 1.5], {}, r"\[0, 1\].*question 1"),
        ([-0.1], {}, r"\[0, 1\]"),
        ([math.inf], {}, r"\[0, 1\]"),
        ([[0.5]], {}, "shape"),
        ([0.5], {"alpha": -0.5}, "alpha"),
        ([0.5], {"beta": math.nan}, "beta"),
        ([0.5], {"normalizer": "median"}, "mean_active"),
        ([0.5], {"cap": 0.0}, "cap"),
        ([0.5], {"floor_zero": -1.0}, "floor_zero"),
        ([0.5], {"floor_one": math.inf}, "floor_one"),
        ([0.5], {"normalizer": "constant"}, "constant"),
        ([0.5], {"normalizer": "constant", "constant": 0.0}, "constant"),
        ([0.5], {"constant": 0.3}, "constant"),
    ],
)
def test_bad_input_is_refused_with_the_name_of_the_fault(rates, options, message):
    with pytest.raises(ValueError, match=message):
        question_weights(torch.tensor(rates), **{"alpha": 0.5, "beta": 0.5, **options})


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [math.nan], [math.inf]])
def test_effective_sample_size_refuses_what_is_not_a_weight(weights):
    with pytest.raises(ValueError, match="weights"):
        effective_sample_size(torch.tensor(weights))
