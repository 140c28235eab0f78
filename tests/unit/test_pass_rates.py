"""Grouping of rows into questions, and the summary numbers of a batch of pass rates."""

import math
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.pass_rates import group_pass_rates, pass_rate_histogram, pass_rate_metrics, success_mask

torch.set_num_threads(1)

ROWS = st.lists(
    st.tuples(st.sampled_from(["a", "b", ("c", 1), 7, "d"]), st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.booleans()),
    max_size=60,
)


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_grouping_equals_counting_row_by_row(rows):
    counted = defaultdict(lambda: [0, 0, 0])
    for key, reward, error in rows:
        entry = counted[key]
        entry[2] += error
        entry[1] += not error
        entry[0] += (not error) and reward >= 0.5
    keys = [key for key, _, _ in rows]
    rewards = torch.tensor([reward for _, reward, _ in rows], dtype=torch.float32)
    errors = torch.tensor([error for _, _, error in rows], dtype=torch.bool)
    groups = group_pass_rates(keys, rewards, errors)

    assert groups.keys == tuple(dict.fromkeys(keys))
    assert [groups.keys[i] for i in groups.index_N] == keys
    found = zip(groups.successes_P.tolist(), groups.counts_P.tolist(), groups.errors_P.tolist(), strict=True)
    assert [list(entry) for entry in found] == [counted[key] for key in groups.keys]
    for key, rate in zip(groups.keys, groups.rates_P.tolist(), strict=True):
        successes, verified, _ = counted[key]
        assert math.isnan(rate) if verified == 0 else rate == successes / verified


def test_a_verifier_error_is_not_a_wrong_answer():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    errors = torch.tensor([False, False, True, True])
    groups = group_pass_rates(["q"] * 4, rewards, errors)
    assert groups.rates_P.tolist() == [0.5]
    assert groups.errors_P.tolist() == [2]
    assert group_pass_rates(["q"] * 4, rewards).rates_P.tolist() == [0.25]


def test_a_question_with_errors_only_has_no_rate():
    groups = group_pass_rates(["q", "q"], torch.tensor([math.nan, 0.0]), torch.tensor([True, True]))
    assert math.isnan(groups.rates_P[0]) and groups.counts_P.tolist() == [0]


def test_success_means_at_least_the_threshold():
    rewards = torch.tensor([0.49, 0.5, 1.0])
    assert success_mask(rewards).tolist() == [False, True, True]
    assert group_pass_rates(["q"] * 3, rewards, threshold=1.0).successes_P.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_reward_equal_to_the_threshold_succeeds_in_every_precision(dtype):
    assert success_mask(torch.tensor([0.7], dtype=dtype), threshold=0.7).tolist() == [True]


def test_integer_rewards_are_compared_with_the_threshold_itself():
    assert success_mask(torch.tensor([0, 1]), threshold=0.5).tolist() == [False, True]


def test_rates_are_float64_and_exact_for_thirds():
    groups = group_pass_rates(["q"] * 3, torch.tensor([1.0, 0.0, 0.0]))
    assert groups.rates_P.dtype == torch.float64
    assert groups.rates_P[0].item() == 1 / 3


def test_rows_of_a_question_need_not_be_adjacent_and_keys_keep_first_appearance():
    groups = group_pass_rates(["b", "a", "b", "c", "a"], torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]))
    assert groups.keys == ("b", "a", "c")
    assert groups.index_N.tolist() == [0, 1, 0, 2, 1]
    assert groups.rates_P.tolist() == [0.5, 0.0, 1.0]
    assert groups.to_rows(torch.tensor([10, 20, 30])).tolist() == [10, 20, 10, 30, 20]


def test_numpy_keys_as_verl_delivers_them_are_accepted():
    keys = np.array(["u1", "u2", "u1"], dtype=object)
    assert group_pass_rates(keys, torch.tensor([1.0, 1.0, 0.0])).rates_P.tolist() == [0.5, 1.0]


def test_values_are_spread_only_if_there_is_one_per_question():
    groups = group_pass_rates(["a", "b"], torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="one per question"):
        groups.to_rows(torch.ones(3))


@pytest.mark.parametrize(
    ("keys", "rewards", "errors", "message"),
    [
        (["a"], [1.0, 0.0], None, "1 question keys for 2 rewards"),
        (["a", None], [1.0, 0.0], None, "row 1"),
        (["a", ["b"]], [1.0, 0.0], None, "row 1.*hashed"),
        ([torch.tensor(1), torch.tensor(1)], [1.0, 0.0], None, "row 0"),
        (["a", "a"], [1.0, math.nan], None, "row 1.*verifier error"),
        (["a", "a"], [math.inf, 0.0], [False, True], "row 0"),
        (["a", "a"], [1.0, 0.0], [0, 1], "bool"),
        (["a", "a"], [1.0, 0.0], [True], "errors_N"),
        (["a", "a"], [[1.0, 0.0]], None, "shape"),
    ],
)
def test_bad_rows_are_refused_with_their_position(keys, rewards, errors, message):
    errors = None if errors is None else torch.tensor(errors)
    with pytest.raises(ValueError, match=message):
        group_pass_rates(keys, torch.tensor(rewards), errors)


def test_threshold_must_be_finite():
    with pytest.raises(ValueError, match="threshold"):
        group_pass_rates(["a"], torch.tensor([1.0]), threshold=math.nan)


def test_metrics_match_numpy_on_the_measured_rates():
    rates = torch.tensor([0.0, 0.0, 0.25, 1.0, math.nan, 0.5])
    measured = np.array([0.0, 0.0, 0.25, 1.0, 0.5])
    assert pass_rate_metrics(rates) == pytest.approx(
        {
            "questions": 5,
            "unmeasured": 1,
            "mean": measured.mean(),
            "std": measured.std(),
            "share_zero": 0.4,
            "share_one": 0.2,
            "share_active": 0.4,
        }
    )
    assert all(type(value) is float for value in pass_rate_metrics(rates).values())


def test_metrics_of_nothing_measured_are_nan_rather_than_zero():
    found = pass_rate_metrics(torch.tensor([math.nan]))
    assert found["questions"] == 0 and found["unmeasured"] == 1
    assert all(math.isnan(found[key]) for key in ("mean", "std", "share_zero", "share_one", "share_active"))


def test_histogram_counts_every_measured_rate_once():
    rates = torch.cat([torch.arange(101, dtype=torch.float64) / 100, torch.tensor([math.nan], dtype=torch.float64)])
    edges, counts = pass_rate_histogram(rates, bins=10)
    assert edges == pytest.approx([i / 10 for i in range(11)])
    assert counts == [10] * 9 + [11]
    assert pass_rate_histogram(rates, bins=100)[1] == [1] * 99 + [2]
    assert pass_rate_histogram(torch.zeros(0))[1] == [0] * 10


@pytest.mark.parametrize("bins", [0, -1, 2.5, True])
def test_histogram_refuses_a_number_of_bins_that_is_not_one(bins):
    with pytest.raises(ValueError, match="bins"):
        pass_rate_histogram(torch.tensor([0.5]), bins=bins)


@pytest.mark.parametrize("describe", [pass_rate_metrics, pass_rate_histogram])
def test_rates_outside_the_unit_interval_are_refused(describe):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        describe(torch.tensor([0.5, 1.2]))


def test_a_hundred_thousand_rows_cost_about_ten_times_ten_thousand():
    def fastest(rows):
        keys = [f"question-{i // 8}" for i in range(rows)]
        rewards = (torch.arange(rows) % 3 == 0).float()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            groups = group_pass_rates(keys, rewards)
            times.append(time.perf_counter() - start)
        assert len(groups.keys) == rows // 8
        return min(times)

    small, large = fastest(10_000), fastest(100_000)
    # Quadratic work would be 100 times; the margin is for caches and a busy machine.
    assert large < 40 * small + 0.05
