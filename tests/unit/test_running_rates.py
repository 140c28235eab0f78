"""The running estimate of pass rates: arithmetic, order, and a state that comes back or is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_ext.pass_rate_store import PassRateTable, QuestionRate
from verl_ext.running_rates import RunningPassRates

PAIRS = st.integers(0, 8).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count)))
STEPS = st.lists(st.lists(st.tuples(st.sampled_from("abc"), PAIRS), max_size=5), max_size=8)
DECAYS = st.floats(0.01, 1.0)


def fed(steps: list[list[tuple[str, tuple[int, int]]]], decay: float) -> RunningPassRates:
    rates = RunningPassRates(decay)
    for step in steps:
        rates.update([name for name, _ in step], [s for _, (s, _) in step], [c for _, (_, c) in step])
    return rates


def test_old_evidence_fades_with_each_new_observation_of_that_question() -> None:
    rates = RunningPassRates(0.5)
    rates.update(["a", "b"], torch.tensor([8, 0]), torch.tensor([8, 8]))
    rates.update(["a"], [0], [8])
    assert rates.rate("a") == 4 / 12 and rates.rate("b") == 0.0
    rates.update(["a"], [0], [0])  # nothing was verified: no observation
    assert rates.rate("a") == 4 / 12
    found = rates.rates(["b", "never", "a"])
    assert found.dtype == torch.float64 and found[[0, 2]].tolist() == [0.0, 4 / 12] and found[1].isnan()
    assert math.isnan(rates.rate("never")) and rates.rates([]).shape == (0,)


@given(STEPS)
def test_without_decay_it_is_the_rate_over_everything(steps: list[list[tuple[str, tuple[int, int]]]]) -> None:
    rates = fed(steps, 1.0)
    for name in "abc":
        pairs = [pair for step in steps for other, pair in step if other == name]
        right, count = sum(s for s, _ in pairs), sum(c for _, c in pairs)
        assert rates.rate(name) == right / count if count else math.isnan(rates.rate(name))


@given(STEPS, DECAYS)
def test_rates_stay_within_0_and_1_and_the_order_of_a_batch_does_not_matter(
    steps: list[list[tuple[str, tuple[int, int]]]], decay: float
) -> None:
    forward, backward = fed(steps, decay), fed([step[::-1] for step in steps], decay)
    for name in "abc":
        rate = forward.rate(name)
        assert math.isnan(rate) or 0 <= rate <= 1
        assert rate == backward.rate(name) or math.isnan(backward.rate(name))


@given(STEPS, DECAYS)
def test_a_question_that_was_always_solved_has_exactly_1(
    steps: list[list[tuple[str, tuple[int, int]]]], decay: float
) -> None:
    solved = fed([[(name, (c, c)) for name, (_, c) in step] for step in steps], decay)
    assert {solved.rate(name) for name in "abc" if not math.isnan(solved.rate(name))} <= {1.0}


@given(STEPS, DECAYS)
def test_the_estimate_is_the_exponentially_weighted_mean(
    steps: list[list[tuple[str, tuple[int, int]]]], decay: float
) -> None:
    rates = fed(steps, decay)
    for name in "abc":
        sums = [[pair for other, pair in step if other == name] for step in steps]
        seen = [(sum(s for s, _ in pairs), sum(c for _, c in pairs)) for pairs in sums]
        seen = [(s, c) for s, c in seen if c]
        weights = [decay ** (len(seen) - 1 - i) for i in range(len(seen))]
        if seen:
            right, count = (sum(w * pair[i] for w, pair in zip(weights, seen, strict=True)) for i in (0, 1))
            assert rates.rate(name) == pytest.approx(right / count, rel=1e-12, abs=1e-15)


def test_a_prior_counts_as_evidence() -> None:
    measured = PassRateTable(
        {"a": QuestionRate("a", 2, 8, 0, 0, 0, 5.0), "b": QuestionRate("b", 0, 0, 8, 0, 0, 5.0)}, {}, 8, Path("store")
    )
    for prior in (measured, {"a": (2, 8), "b": (0, 0)}):
        rates = RunningPassRates(0.5, prior)
        assert rates.rate("a") == 0.25 and math.isnan(rates.rate("b"))
        rates.update(["a", "b"], [8, 8], [8, 8])
        assert rates.rate("a") == 9 / 12 and rates.rate("b") == 1.0


# --------------------------------------------------------------------------------------------------------- the state


@given(STEPS, DECAYS)
def test_a_state_goes_through_json_and_goes_on_alike(
    steps: list[list[tuple[str, tuple[int, int]]]], decay: float
) -> None:
    rates, again = fed(steps, decay), RunningPassRates(decay, {"old": (1, 2)})
    again.load_state_dict(json.loads(json.dumps(rates.state_dict())))
    assert again.state_dict() == rates.state_dict()
    for both in (rates, again):
        both.update(["a"], [1], [3])
    assert again.state_dict() == rates.state_dict()


def test_a_file_is_replaced_in_one_step_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    rates = RunningPassRates(0.9)
    for step in range(3):
        rates.update(["a", "ü\ud83d"], [step, 1], [8, 8])
        rates.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]
    again = RunningPassRates(0.9)
    again.load(path)
    assert again.state_dict() == rates.state_dict()


@pytest.mark.parametrize("decay", [0, -0.1, 1.01, math.nan, True, "0.9", None])
def test_a_decay_out_of_range_is_refused(decay: Any) -> None:
    with pytest.raises(ValueError, match="decay is .*; allowed: a number above 0, at most 1"):
        RunningPassRates(decay)


@pytest.mark.parametrize(
    ("question_ids", "successes", "counts", "message"),
    [
        (["a"], [1, 2], [2, 2], "1 question ids, 2 successes and 2 counts"),
        (["b", "a"], [1, 3], [2, 2], "question a is [3, 2]; allowed: 0 <= successes <= count"),
        (["b", "a"], [1, -1], [2, 2], "question a is [-1, 2]; allowed: 0 <= successes <= count"),
        (["b", "a"], [1, math.nan], [2, 2], "question a is [nan, 2]; allowed: [successes, count], two finite numbers"),
        (["b", "a"], [1, "1"], [2, 2], "question a is ['1', 2]"),
    ],
)
def test_a_bad_step_is_refused_and_nothing_is_taken_in(
    question_ids: list[str], successes: list[Any], counts: list[Any], message: str
) -> None:
    rates = RunningPassRates(0.9, {"a": (1, 2)})
    before = rates.state_dict()
    with pytest.raises(ValueError) as refusal:
        rates.update(question_ids, successes, counts)
    assert message in str(refusal.value)
    assert rates.state_dict() == before


def test_a_prior_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the prior of question q is \(3, 2\); allowed: 0 <= successes <= count"):
        RunningPassRates(0.9, {"q": (3, 2)})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "the state is a list"),
        ({}, "format is None; allowed: 1"),
        ({"format": 1, "decay": 0.8, "evidence": {}}, "decay is 0.8; allowed: 0.9"),
        ({"format": 1, "decay": 0.9}, "evidence is None"),
        ({"format": 1, "decay": 0.9, "evidence": {"q": [1]}}, "evidence of question q is [1]"),
        ({"format": 1, "decay": 0.9, "evidence": {"q": 1}}, "evidence of question q is 1"),
        ({"format": 1, "decay": 0.9, "evidence": {"q": [2, 1]}}, "evidence of question q is [2, 1]; allowed: 0 <="),
        ({"format": 1, "decay": 0.9, "evidence": {"q": [0, math.inf]}}, "evidence of question q is [0, inf]"),
    ],
)
def test_a_state_that_cannot_be_used_is_named_with_its_file(tmp_path: Path, state: Any, message: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(state))
    rates = RunningPassRates(0.9, {"a": (1, 2)})
    with pytest.raises(ValueError) as refusal:
        rates.load(path)
    assert str(refusal.value).startswith(f"{path}: {message}")
    assert rates.rate("a") == 0.5


def test_a_missing_or_torn_file_is_named(tmp_path: Path) -> None:
    rates, path = RunningPassRates(), tmp_path / "rates.json"
    with pytest.raises(ValueError, match="rates.json: no such file"):
        rates.load(path)
    path.write_text('{"format": 1, "dec')
    with pytest.raises(ValueError, match="rates.json: not valid JSON"):
        rates.load(path)
