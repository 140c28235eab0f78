"""Comparison of two methods: intervals, permutation tests, refusals and power."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from recipe.detectable import VarianceComponents, detectable_difference, power_of, variance_components
from recipe.intervals import Interval
from recipe.paired import MethodRuns, compare, verdict
from recipe.permutation import label_p_value, sign_flip_p_value

STUDIES = 1000


def runs(name: str, accuracy: np.ndarray, samples: int = 8) -> MethodRuns:
    accuracy = np.asarray(accuracy, dtype=float)
    seeds, items = accuracy.shape
    return MethodRuns(name, accuracy, [f"q{item}" for item in range(items)], samples, range(seeds))


def simulated_methods(
    rng: np.random.Generator, seeds: tuple[int, int], gain: float = 0.0, items: int = 150, seed_sd: float = 0.025
) -> tuple[MethodRuns, MethodRuns]:
    """Two methods whose true means differ by ``gain``; the gain differs between items with standard deviation .06."""
    rates = 0.25 + 0.5 * rng.beta(0.8, 0.8, items)
    gains = gain + rng.normal(0, 0.06, items)
    found = []
    for number, shift in zip(seeds, (gains / 2, -gains / 2), strict=True):
        moved = rates + shift + rng.normal(0, seed_sd, (number, 1))
        found.append(rng.binomial(8, np.clip(moved, 0, 1)) / 8)
    return runs("a", found[0]), runs("b", found[1])


# ---------------------------------------------------------------------------------------------------------- comparison


def test_difference_over_seeds_is_the_paired_t_interval() -> None:
    first = runs("a", [[0.5, 0.7], [0.6, 0.8], [0.7, 0.9]])
    second = runs("b", [[0.4, 0.4], [0.4, 0.6], [0.3, 0.7]])
    found = compare(first, second, population="seeds").difference
    half = 4.302653 * np.std([0.2, 0.2, 0.3], ddof=1) / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.7 / 3, 0.7 / 3 - half, 0.7 / 3 + half), abs=1e-6)
    assert (found.population, found.n_seeds, found.n_items) == ("seeds", 3, 2)


def test_pairing_items_cancels_their_difficulty() -> None:
    hard_and_easy = np.tile(np.linspace(0, 0.9, 30), (2, 1))
    found = compare(runs("a", hard_and_easy + 0.1), runs("b", hard_and_easy), population="items")
    assert (found.difference.low, found.difference.high) == pytest.approx((0.1, 0.1))
    assert found.verdict == "yes"


def test_pairing_seeds_cancels_what_they_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.uniform(0.2, 0.6, (4, 1)) + rng.normal(0, 0.01, (4, 20))
    first, second = runs("a", shared + 0.1), runs("b", shared)
    paired, unpaired = (compare(first, second, population="seeds", pairing=one) for one in ("paired", "unpaired"))
    assert paired.difference.high - paired.difference.low < 1e-9
    assert unpaired.difference.high - unpaired.difference.low > 0.1
    assert paired.difference.value == pytest.approx(unpaired.difference.value)
    assert (paired.p_seeds, unpaired.pairing) == (2 / 16, "unpaired")


def test_items_and_seeds_in_another_order_are_the_same() -> None:
    rng = np.random.default_rng(1)
    first, second = simulated_methods(rng, (3, 3), items=20)
    items, seeds = rng.permutation(20), rng.permutation(3)
    shuffled = MethodRuns(
        "b", second.accuracy_SP[seeds][:, items], [second.items[one] for one in items], 8, seeds.tolist()
    )
    expected = compare(first, second).difference
    found = compare(first, shuffled).difference
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    wrong_order = replace(shuffled, items=second.items)
    assert compare(first, wrong_order).difference.high != pytest.approx(expected.high)


def test_exchanging_the_methods_turns_the_sign() -> None:
    first, second = simulated_methods(np.random.default_rng(2), (3, 3), 0.05)
    one, other = compare(first, second), compare(second, first)
    assert (one.difference.low, one.p_items) == pytest.approx((-other.difference.high, other.p_items))
    assert (one.claim, compare(first, second, delta=0.02).claim) == ("a > b", "a > b by more than 0.02")


@pytest.mark.parametrize(
    ("low", "high", "delta", "expected"),
    [
        (0.01, 0.05, 0.0, "yes"),
        (0.01, 0.05, 0.01, "not resolved"),
        (-0.01, 0.05, 0.0, "not resolved"),
        (0.01, 0.05, 0.05, "no"),
        (-0.05, -0.01, 0.0, "no"),
    ],
)
def test_verdict_follows_from_the_interval(low: float, high: float, delta: float, expected: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high, "items", 3, 10, 0.95), delta) == expected


def test_one_run_each_can_be_compared_over_items_only() -> None:
    first, second = simulated_methods(np.random.default_rng(3), (1, 1))
    found = compare(first, second, population="items")
    assert found.p_seeds is None and 0 < found.p_items <= 1
    with pytest.raises(ValueError, match="at least 2 seeds"):
        compare(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": ["q0", "q9"]}, "different items: a has 'q1', b has not .1 only in a, 1 only in b"),
        ({"items": ["q0", "q0"]}, "b: item 'q0' is there twice"),
        ({"seeds": [0, 7]}, "different seeds: a has 1, b has not"),
        ({"samples": 16}, "different k: a has 8 samples an item, b has 16"),
        ({"accuracy_SP": [[0.5, 0.5], [math.nan, 0.5]]}, "b, seed 1: evaluation not finished, 1 of 2 items"),
        ({"accuracy_SP": [[0.5, 0.5], [1.5, 0.5]]}, "b: accuracies must lie in"),
        ({"accuracy_SP": [[0.5, 0.5]]}, r"b: expected accuracies of shape \[2, 2\], found \[1, 2\]"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict, message: str) -> None:
    first = runs("a", [[0.5, 0.6], [0.6, 0.7]])
    with pytest.raises(ValueError, match=message):
        compare(first, replace(first, name="b", **change))


def test_unpaired_seeds_may_differ() -> None:
    first = runs("a", [[0.5, 0.6], [0.6, 0.7]])
    assert compare(first, replace(first, seeds=[5, 6]), pairing="unpaired").difference.value == 0


@pytest.mark.parametrize("setting", [{"population": "runs"}, {"pairing": "half"}, {"delta": 2}, {"level": 1.0}])
def test_bad_settings_are_refused(setting: dict) -> None:
    first = runs("a", [[0.5, 0.6], [0.6, 0.7]])
    with pytest.raises(ValueError, match=next(iter(setting))):
        compare(first, first, **setting)


@pytest.mark.parametrize(
    ("seeds", "pairing"), [((3, 3), "paired"), ((10, 10), "paired"), ((3, 3), "unpaired"), ((3, 5), "unpaired")]
)
def test_joint_interval_of_a_difference_covers(seeds: tuple[int, int], pairing: str) -> None:
    rng = np.random.default_rng(4)
    found = [
        compare(*simulated_methods(rng, seeds, 0.04), pairing=pairing, permutations=1).difference
        for _ in range(STUDIES)
    ]
    assert 0.93 <= np.mean([one.low <= 0.04 <= one.high for one in found]) <= 0.97


# --------------------------------------------------------------------------------------------------------- permutation


def test_three_equal_signs_are_one_of_four() -> None:
    assert sign_flip_p_value([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip_p_value([0.0, 0.0, 0.0]) == 1.0
    assert label_p_value([0.5, 0.6, 0.7], [0.1, 0.2, 0.3]) == 0.1


def test_sign_flip_p_values_are_uniform_under_the_null() -> None:
    # Given the sizes of the differences every pattern of signs is equally likely under the null.
    sizes = np.random.default_rng(5).random(6)
    found = sorted(sign_flip_p_value(sizes * signs) for signs in product([1, -1], repeat=6))
    assert found == pytest.approx(np.repeat(np.arange(1, 33) / 32, 2))


def test_label_p_values_are_uniform_under_the_null() -> None:
    pooled = np.random.default_rng(6).random(6)
    splits = [list(split) for split in combinations(range(6), 3)]
    found = sorted(label_p_value(pooled[split], np.delete(pooled, split)) for split in splits)
    assert found == pytest.approx(np.repeat(np.arange(1, 11) / 10, 2))


def test_drawn_p_values_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(7)
    flips = [sign_flip_p_value(rng.normal(0, 1, 30), permutations=199, seed=one) for one in range(STUDIES)]
    labels = [label_p_value(*rng.normal(0, 1, (2, 10)), permutations=199, seed=one) for one in range(STUDIES)]
    for found in (flips, labels):
        for share in (0.05, 0.25, 0.5, 0.75):
            error = math.sqrt(share * (1 - share) / STUDIES)
            assert np.mean(np.asarray(found) <= share + 1e-9) == pytest.approx(share, abs=3.5 * error)


def test_drawn_and_exact_p_values_agree() -> None:
    differences = np.random.default_rng(8).normal(0.3, 1, 13)  # one more than is gone through
    signs = np.array(list(product([1, -1], repeat=13)))
    exact = float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean())
    drawn = sign_flip_p_value(differences, permutations=20_000)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert drawn == sign_flip_p_value(differences, permutations=20_000)
    assert drawn != sign_flip_p_value(differences, permutations=20_000, seed=1)


def test_drawn_p_values_are_never_zero() -> None:
    assert sign_flip_p_value(np.ones(50), permutations=99) == 0.01


@pytest.mark.parametrize("values", [[], [[0.1]], [math.nan]])
def test_what_cannot_be_permuted_is_refused(values: list) -> None:
    with pytest.raises(ValueError, match="permutation test needs"):
        sign_flip_p_value(values)


# --------------------------------------------------------------------------------------------------------------- power

COMPONENTS = VarianceComponents(seed=2 * 0.02**2, item=0.08**2, residual=0.04)


def simulated_differences(rng: np.random.Generator, seeds: int, items: int, mean: float) -> np.ndarray:
    return (
        mean
        + rng.normal(0, math.sqrt(COMPONENTS.seed), (seeds, 1))
        + rng.normal(0, math.sqrt(COMPONENTS.item), items)
        + rng.normal(0, math.sqrt(COMPONENTS.residual), (seeds, items))
    )


@pytest.mark.parametrize("seeds", [3, 10])
def test_a_detectable_difference_is_seen_as_often_as_said(seeds: int) -> None:
    rng = np.random.default_rng(9)
    delta = 0.01
    wanted = delta + detectable_difference(COMPONENTS, seeds, 100)
    seen = 0
    for _ in range(STUDIES):
        half = np.clip(simulated_differences(rng, seeds, 100, wanted), -1, 1) / 2
        seen += compare(runs("a", 0.5 + half), runs("b", 0.5 - half), delta=delta, permutations=1).verdict == "yes"
    assert seen / STUDIES == pytest.approx(0.8, abs=0.04)


def test_power_of_the_detectable_difference_is_the_power_asked_for() -> None:
    wanted = detectable_difference(COMPONENTS, 5, 150, power=0.9)
    assert power_of(wanted, COMPONENTS, 5, 150) == pytest.approx(0.9, abs=1e-3)
    assert power_of(0.0, COMPONENTS, 5, 150) == pytest.approx(0.025, abs=0.01)


def test_items_only_is_the_normal_closed_form() -> None:
    # Without seeds and residual the interval is that of many items: (1.96 + 0.84) standard errors.
    found = detectable_difference(VarianceComponents(0.0, 0.01, 0.0), 3, 5000)
    assert found == pytest.approx((1.959964 + 0.841621) * 0.1 / math.sqrt(5000), rel=0.02)


def test_more_seeds_and_more_items_show_smaller_differences() -> None:
    few, more_seeds = detectable_difference(COMPONENTS, 3, 100), detectable_difference(COMPONENTS, 6, 100)
    more_items = detectable_difference(COMPONENTS, 3, 400)
    assert max(more_seeds, more_items) < few
    assert detectable_difference(COMPONENTS, 3, 100, pairing="unpaired") < few


def test_no_variance_shows_everything() -> None:
    assert detectable_difference(VarianceComponents(0.0, 0.0, 0.0), 3, 10) == 0.0


def test_components_are_found_again() -> None:
    rng = np.random.default_rng(10)
    found = [variance_components(simulated_differences(rng, 5, 100, 0.1)) for _ in range(300)]
    means = [np.mean([getattr(one, name) for one in found]) for name in ("seed", "item", "residual")]
    assert means == pytest.approx([COMPONENTS.seed, COMPONENTS.item, COMPONENTS.residual], rel=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"components": VarianceComponents(-1.0, 0.0, 0.0)}, "variances must not be negative"),
        ({"n_seeds": 1}, "at least 2 seeds"),
        ({"power": 1.0}, "power must lie"),
        ({"pairing": "half"}, "pairing must be"),
    ],
)
def test_bad_settings_of_a_power_analysis_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detectable_difference(**{"components": COMPONENTS, "n_seeds": 3, "n_items": 100, **change})
