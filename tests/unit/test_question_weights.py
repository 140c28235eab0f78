"""Whose pass rates a batch is weighed by: its own, those of a store over the training set, a running estimate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.config import WeightingConfig
from verl_ext.pass_rates import GroupPassRates, group_pass_rates
from verl_ext.question_weights import BatchWeigher, RunningWeigher, StoredWeigher
from verl_ext.running_rates import RunningPassRates
from verl_ext.weighting import question_weights

PACED = WeightingConfig(alpha=1.0, beta=1.0, normalizer="mean_active", rates="store")
K = 8
COUNTS = st.lists(st.one_of(st.none(), st.integers(0, K)), min_size=1, max_size=20)


def groups_of(*pairs: tuple[int, int]) -> GroupPassRates:
    """One question a pair (successes, verified rollouts); 0 verified: one rollout that the verifier failed on."""
    uids, rewards, errors = [], [], []
    for i, (successes, count) in enumerate(pairs):
        for j in range(max(count, 1)):
            uids.append(f"uid{i}")
            rewards.append(1.0 if j < successes else 0.0)
            errors.append(count == 0)
    return group_pass_rates(uids, torch.tensor(rewards), torch.tensor(errors, dtype=torch.bool))


def weighting(**changed: Any) -> WeightingConfig:
    values = WeightingConfig(**({"alpha": 1.0, "beta": 1.0, "normalizer": "mean_active"} | changed))
    values.validate()
    return values


NOTHING = groups_of()


# ------------------------------------------------------------------------------------------------------------- a store


def test_paced_s_weights_for_eight_rollouts() -> None:
    rates = {f"q{k}": k / K for k in range(K + 1)}
    raw = StoredWeigher(rates, weighting(normalizer="none", rates="store"))
    weighed = raw(list(rates), NOTHING)
    assert weighed.weights_P.tolist() == [k * (8 - k) / 64 for k in range(9)]
    assert weighed.weights_P.tolist()[:5] == [0, 0.109375, 0.1875, 0.234375, 0.25]
    assert weighed.rates_P.tolist() == list(rates.values())
    assert [raw.keeps(name) for name in rates] == [False] + [True] * 7 + [False]
    # The mean over the seven that are kept: 84 / 64 / 7 = 0.1875.
    normalised = StoredWeigher(rates, PACED)(list(rates), NOTHING).weights_P
    assert normalised.tolist() == pytest.approx([k * (8 - k) / 64 / 0.1875 for k in range(9)], abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(counts=COUNTS, data=st.data())
def test_stored_weights_are_normalised_over_the_training_set_whatever_the_batch(
    counts: list[int | None], data: st.DataObject
) -> None:
    rates = {f"q{i}": math.nan if count is None else count / K for i, count in enumerate(counts)}
    weigher = StoredWeigher(rates, PACED)
    everything = dict(zip(rates, weigher(list(rates), NOTHING).weights_P.tolist(), strict=True))
    kept = [name for name in rates if weigher.keeps(name)]
    assert kept == [f"q{i}" for i, count in enumerate(counts) if count not in (None, 0, K)]
    if kept:
        assert sum(everything[name] for name in kept) / len(kept) == pytest.approx(1.0, abs=1e-12)
    assert all(everything[name] == 0 for name in rates if name not in kept)
    batch = data.draw(st.lists(st.sampled_from(list(rates)), max_size=6))
    weighed = weigher(batch, groups_of(*[(1, 2)] * len(batch)))
    assert weighed.weights_P.tolist() == [everything[name] for name in batch], "the batch's own rollouts count nothing"
    for name, rate in zip(batch, weighed.rates_P.tolist(), strict=True):
        assert rate == rates[name] or (math.isnan(rate) and math.isnan(rates[name]))


def test_a_question_the_store_lacks_weighs_nothing_and_has_no_rate() -> None:
    weigher = StoredWeigher({"a": 0.5, "b": math.nan}, PACED)
    weighed = weigher(["a", "b", "c"], NOTHING)
    assert weighed.weights_P.tolist() == [1.0, 0.0, 0.0]
    assert weighed.rates_P[0] == 0.5 and weighed.rates_P[1:].isnan().all()
    assert [weigher.keeps(name) for name in "abc"] == [True, False, False]


def test_no_rate_is_not_even_weighed_where_every_question_counts_the_same() -> None:
    weigher = StoredWeigher({"a": 0.0, "b": 1.0, "c": math.nan}, weighting(alpha=0.0, beta=0.0, rates="store"))
    assert weigher(["a", "b", "c"], NOTHING).weights_P.tolist() == [1.0, 1.0, 0.0]


def test_the_hard_filter_keeps_what_some_but_not_all_rollouts_solved() -> None:
    rates = {f"q{k}": k / K for k in range(K + 1)}
    weigher = StoredWeigher(rates, weighting(kernel="interval", low=0.125, high=0.875, rates="store"))
    assert weigher(list(rates), NOTHING).weights_P.tolist() == [0.0] + [1.0] * 7 + [0.0]


def test_a_training_set_without_any_weight_keeps_nothing() -> None:
    weigher = StoredWeigher({"a": 0.0, "b": 1.0}, PACED)
    assert not weigher.keeps("a") and not weigher.keeps("b")
    assert weigher(["a"], NOTHING).weights_P.tolist() == [0.0]
    assert StoredWeigher({}, PACED)([], NOTHING).weights_P.tolist() == []


# ------------------------------------------------------------------------------------------------------------ a batch


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.sampled_from([(s, c) for c in (0, 1, 3, 8) for s in range(c + 1)]), min_size=1, max_size=12),
    exponent=st.sampled_from([0.0, 0.5, 1.0]),
    normalizer=st.sampled_from(["none", "mean", "mean_active", "half", "max"]),
    data=st.data(),
)
def test_a_batch_is_weighed_by_its_own_rates_in_any_order(
    pairs: list[tuple[int, int]], exponent: float, normalizer: str, data: st.DataObject
) -> None:
    chosen = weighting(alpha=exponent, beta=exponent, normalizer=normalizer)
    weigher = BatchWeigher(chosen)
    names = [f"q{i}" for i in range(len(pairs))]
    weighed = weigher(names, groups_of(*pairs))
    rates_P = torch.tensor([s / c if c else math.nan for s, c in pairs], dtype=torch.float64)
    expected = question_weights(rates_P, alpha=exponent, beta=exponent, normalizer=normalizer)
    assert torch.allclose(weighed.weights_P, expected, rtol=1e-14, atol=0)
    assert torch.equal(weighed.rates_P.nan_to_num(-1), rates_P.nan_to_num(-1))
    order = data.draw(st.permutations(range(len(pairs))))
    moved = weigher([names[i] for i in order], groups_of(*[pairs[i] for i in order]))
    assert moved.weights_P.tolist() == weighed.weights_P[order].tolist(), "to the last bit"


def test_every_question_counts_exactly_one_without_exponents() -> None:
    weights = BatchWeigher(weighting(alpha=0.0, beta=0.0, normalizer="mean"))(
        ["a", "b", "c"], groups_of((0, 3), (1, 3), (3, 3))
    )
    assert weights.weights_P.tolist() == [1.0, 1.0, 1.0]


# -------------------------------------------------------------------------------------------------- a running estimate


def test_a_running_estimate_counts_the_batch_before_it_weighs_it() -> None:
    estimate = RunningPassRates(0.5)
    weigher = RunningWeigher(estimate, weighting(normalizer="none", rates="running"))
    first = weigher(["a", "b"], groups_of((1, 4), (0, 4)))
    assert first.rates_P.tolist() == [0.25, 0.0], "the batch's own rollouts are in it"
    assert first.weights_P.tolist() == [0.1875, 0.0]
    second = weigher(["b", "c"], groups_of((2, 4), (0, 0)))
    # b: 0.5 * 0 + 2 of 0.5 * 4 + 4.
    assert second.rates_P.tolist()[0] == pytest.approx(1 / 3) and second.rates_P[1].isnan()
    assert second.weights_P.tolist() == [pytest.approx(2 / 9), 0.0], "no verdict: no weight"
    assert estimate.rate("a") == 0.25, "a question that does not come up keeps its estimate"


def test_a_running_estimate_takes_a_question_that_stands_twice_in_a_batch_as_one() -> None:
    weigher = RunningWeigher(RunningPassRates(1.0), weighting(normalizer="mean_active", rates="running"))
    weighed = weigher(["a", "a", "b"], groups_of((2, 2), (0, 2), (2, 2)))
    assert weighed.rates_P.tolist() == [0.5, 0.5, 1.0]
    assert weighed.weights_P.tolist() == [1.0, 1.0, 0.0]
