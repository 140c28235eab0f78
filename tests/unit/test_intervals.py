"""Intervals over seeds and items: closed forms, and coverage in simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recipe.intervals import (
    VariancePart,
    half_width,
    over_items,
    over_seeds,
    over_seeds_and_items,
)
from recipe.score_interval import share_interval
from recipe.student_t import student_t_quantile

STUDIES = 1000
# Item rates between .1 and .9 with standard deviation .25, symmetric about .5: seed effects move them, but hardly ever
# beyond 0 or 1, and then on both sides alike. The mean is .5 exactly.
ITEM_SHAPE = 0.78


def simulated_study(
    rng: np.random.Generator, seeds: int, seed_sd: float, items: int = 150, samples: int = 8, mixed_sd: float = 0.0
) -> np.ndarray:
    """[seeds, items] accuracies of a study whose true mean is .5."""
    rates = 0.1 + 0.8 * rng.beta(ITEM_SHAPE, ITEM_SHAPE, items) + rng.normal(0, seed_sd, (seeds, 1))
    rates = rates + rng.normal(0, mixed_sd, (seeds, items))
    return rng.binomial(samples, np.clip(rates, 0, 1)) / samples


# ------------------------------------------------------------------------------------------------------ t distribution


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.995])
def test_t_quantiles_with_one_and_two_degrees_of_freedom_have_closed_forms(probability: float) -> None:
    tail = probability * (1 - probability)
    one, two = student_t_quantile(probability, [1, 2])
    assert one == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-7)
    assert two == pytest.approx((2 * probability - 1) * math.sqrt(2 / (4 * tail)), rel=1e-7)


@pytest.mark.parametrize(("df", "expected"), [(9, 2.262157), (149, 1.976013), (1e7, 1.959964)])
def test_t_quantiles_agree_with_tables(df: float, expected: float) -> None:
    assert float(student_t_quantile(0.975, df)) == pytest.approx(expected, abs=1e-6)


def test_t_quantiles_of_fractional_degrees_of_freedom_lie_in_between() -> None:
    values = student_t_quantile(0.975, np.arange(1, 20, 0.1))
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize(("probability", "df"), [(0.4, 3), (1.0, 3), (0.9, 0.5), (0.9, math.nan)])
def test_bad_arguments_of_a_t_quantile_are_refused(probability: float, df: float) -> None:
    with pytest.raises(ValueError, match="must"):
        student_t_quantile(probability, df)


# -------------------------------------------------------------------------------------------------------- closed forms


def test_seeds_interval_is_the_t_interval_of_the_seeds_means() -> None:
    found = over_seeds([[0.4, 0.6], [0.5, 0.7], [0.6, 0.8]])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.6, 0.6 - half, 0.6 + half), abs=1e-6)
    assert (found.population, found.n_seeds, found.n_items, found.level) == ("seeds", 3, 2, 0.95)


def test_items_interval_speaks_about_items_only() -> None:
    same_for_all_seeds = np.tile([0.2, 0.4, 0.9, 0.5], (3, 1))
    found = over_items(same_for_all_seeds)
    assert (found.low, found.high) == share_interval([0.2, 0.4, 0.9, 0.5])
    assert (found.population, found.n_seeds, found.n_items) == ("items", 3, 4)
    assert over_seeds(same_for_all_seeds).high - over_seeds(same_for_all_seeds).low == pytest.approx(0, abs=1e-12)


def test_joint_interval_of_items_without_spread_is_the_seeds_interval() -> None:
    accuracy = np.tile([[0.4], [0.5], [0.45]], (1, 6))
    joint, seeds = over_seeds_and_items(accuracy), over_seeds(accuracy)
    assert (joint.low, joint.high) == pytest.approx((seeds.low, seeds.high))
    assert joint.population == "seeds and items"


def test_joint_interval_of_additive_effects_has_a_closed_form() -> None:
    items = np.array([0.3, 0.5, 0.7, 0.4, 0.6])
    found = over_seeds_and_items(items + np.array([[-0.1], [0.0], [0.1]]))
    by_seed, by_item = 0.01 / 3, 0.025 / 5  # variances of the effects; there is no residual
    df = (by_seed + by_item) ** 2 / (by_seed**2 / 2 + by_item**2 / 4)
    satterthwaite = float(student_t_quantile(0.975, df)) ** 2 * (by_seed + by_item)
    banerjee = 4.302653**2 * by_seed + 2.776445**2 * by_item
    assert found.high - found.value == pytest.approx(math.sqrt((2 * satterthwaite + banerjee) / 3), rel=1e-6)


def test_residual_is_counted_once() -> None:
    # Residual only: items spread as much as it explains, so their own part is small or nothing.
    rng = np.random.default_rng(0)
    accuracy = rng.binomial(8, 0.5, (10, 2000)) / 8
    joint, seeds = over_seeds_and_items(accuracy), over_seeds(accuracy)
    assert joint.high - joint.low < 1.2 * (seeds.high - seeds.low)


def test_a_higher_level_gives_a_wider_interval() -> None:
    accuracy = simulated_study(np.random.default_rng(0), 3, 0.03)
    widths = [
        over_seeds_and_items(accuracy, level).high - over_seeds_and_items(accuracy, level).low
        for level in (0.8, 0.95, 0.99)
    ]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_intervals_end_at_zero_and_one() -> None:
    found = over_seeds([[1.0, 1.0], [0.9, 0.9]])
    assert found.high == 1.0 and found.low < 0.9


def test_no_variance_is_no_width() -> None:
    assert float(half_width([VariancePart(0.0, 2), VariancePart(0.0, 9)], 0.95)) == 0.0


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ([[0.5, 0.6]], "at least 2 seeds, found 1"),
        ([[0.5], [0.6]], "at least 2 items, found 1"),
        ([0.5, 0.6], r"shape \[seeds, items\]"),
        (np.zeros((0, 3)), r"shape \[seeds, items\]"),
        ([[0.5, 0.6], [0.5, 1.5]], "seed 1, item 1 has 1.5"),
        ([[0.5, math.nan], [0.5, 0.5]], "seed 0, item 1 has nan"),
    ],
)
def test_what_has_no_joint_interval_is_refused(accuracy: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        over_seeds_and_items(accuracy)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
@pytest.mark.parametrize("interval", [over_seeds, over_items, over_seeds_and_items])
def test_levels_outside_zero_and_one_are_refused(interval: object, level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        interval([[0.5, 0.6], [0.4, 0.7]], level)


# ------------------------------------------------------------------------------------------------------------ coverage


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("seed_sd", [0.02, 0.03])
def test_joint_interval_covers_the_true_mean(seeds: int, seed_sd: float) -> None:
    rng = np.random.default_rng(0)
    found = [over_seeds_and_items(simulated_study(rng, seeds, seed_sd)) for _ in range(STUDIES)]
    assert 0.93 <= np.mean([one.low <= 0.5 <= one.high for one in found]) <= 0.97


def test_joint_interval_covers_where_runs_differ_item_by_item() -> None:
    rng = np.random.default_rng(1)
    found = [over_seeds_and_items(simulated_study(rng, 4, 0.025, 60, mixed_sd=0.1)) for _ in range(STUDIES)]
    assert 0.93 <= np.mean([one.low <= 0.5 <= one.high for one in found]) <= 0.97


def test_seeds_interval_covers_for_its_items_and_not_for_others() -> None:
    rng = np.random.default_rng(2)
    fixed, others = [], []
    for _ in range(STUDIES):
        rates = 0.1 + 0.8 * rng.beta(ITEM_SHAPE, ITEM_SHAPE, 150)
        accuracy = rng.binomial(8, np.clip(rates + rng.normal(0, 0.025, (5, 1)), 0, 1)) / 8
        found = over_seeds(accuracy)
        fixed.append(found.low <= rates.mean() <= found.high)
        others.append(found.low <= 0.5 <= found.high)
    assert 0.93 <= np.mean(fixed) <= 0.97
    assert np.mean(others) < 0.9


# ------------------------------------------------------------------------------------------------------ score interval


def test_all_right_is_not_certain() -> None:
    t = float(student_t_quantile(0.975, 29))
    low, high = share_interval(np.ones(30))
    assert (low, high) == pytest.approx((30 / (30 + t**2), 1.0))
    assert share_interval(np.zeros(30)) == pytest.approx((0.0, 1 - low))


def test_one_wrong_sample_moves_the_interval_of_all_right_a_little() -> None:
    shares = np.ones(150)
    before = share_interval(shares)[0]
    shares[0] = 7 / 8
    assert share_interval(shares)[0] == pytest.approx(before, abs=0.005)


def test_score_interval_becomes_the_t_interval_with_many_questions() -> None:
    shares = np.random.default_rng(0).beta(2, 1.5, 20_000)
    half = 1.959964 * shares.std() / math.sqrt(len(shares))
    assert share_interval(shares) == pytest.approx((shares.mean() - half, shares.mean() + half), rel=1e-4)


def test_one_question_says_nothing_about_others() -> None:
    assert share_interval([1.0]) == (0.0, 1.0)


@pytest.mark.parametrize("shares", [[], [[0.5]], [0.5, 1.1], [0.5, math.nan]])
def test_what_is_no_list_of_shares_is_refused(shares: object) -> None:
    with pytest.raises(ValueError, match="shares must"):
        share_interval(shares)


@pytest.mark.parametrize("items", [30, 150])
def test_score_interval_covers(items: int) -> None:
    rng = np.random.default_rng(3)
    found = [share_interval(simulated_study(rng, 1, 0.0, items)[0]) for _ in range(STUDIES)]
    assert 0.93 <= np.mean([low <= 0.5 <= high for low, high in found]) <= 0.97
