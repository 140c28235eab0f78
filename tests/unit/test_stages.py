"""Where a run stands follows from the number of steps done: its stage, and when it takes pass rates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.config import ConfigError, DistillConfig, distill_config
from verl_ext.stages import rates_due, stage_after, switch_step

STORE = {"alpha": 1.0, "beta": 1.0, "rates": "store"}


def block(weighting: dict[str, Any] | None = None, **schedule: Any) -> DistillConfig:
    if "switch" in schedule:
        schedule.setdefault("second", {"divergence": {"kind": "reverse_kl"}})
    return distill_config({"weighting": weighting or {}, "schedule": schedule})


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        distill_config(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("switch", "steps", "expected"),
    [(0.5, 10, 5), (0.25, 8, 2), (0.75, 8, 6), (0.01, 10, 1), (0.99, 10, 9), (0.5, 2, 1), (0.5, 3, 2), (None, 1, None)],
)
def test_the_first_stage_has_its_share_of_the_steps(switch: float | None, steps: int, expected: int | None) -> None:
    distill = block(switch=switch) if switch is not None else block()
    assert switch_step(distill, steps) == expected
    kinds = [stage_after(distill, done, steps).divergence.kind for done in range(steps)]
    first = steps if expected is None else expected
    assert kinds == ["jsd"] * first + ["reverse_kl"] * (steps - first)


@settings(max_examples=60, deadline=None)
@given(switch=st.floats(0.001, 0.999), steps=st.integers(2, 500))
def test_both_stages_have_a_step_and_the_share_is_met_to_one_step(switch: float, steps: int) -> None:
    first = switch_step(block(switch=switch), steps)
    assert first is not None and 1 <= first <= steps - 1
    assert abs(first - switch * steps) <= 1


def test_one_step_cannot_have_two_stages() -> None:
    with pytest.raises(ValueError, match=r"distill\.schedule\.switch needs run\.steps of at least 2, found 1"):
        switch_step(block(switch=0.5), 1)


def test_the_second_stage_changes_only_what_it_names() -> None:
    second = {
        "sequences": {"source": "student_rollouts"},
        "divergence": {"kind": "reverse_kl"},
        "weighting": {"beta": 2.0},
    }
    values = {
        "method": "m",
        "context": {"kind": "reference", "max_length": 77},
        "sequences": {"source": "reference", "reference_key": "text"},
        "divergence": {"kind": "forward_kl", "support": "full", "tail": False},
        "weighting": STORE | {"store": "folder", "samples": 3},
    }
    first = distill_config(values | {"schedule": {"switch": 0.5, "second": second}})
    there = first.second_stage()
    expected = dataclasses.asdict(distill_config(values))
    expected["sequences"]["source"] = "student_rollouts"
    expected["divergence"]["kind"] = "reverse_kl"
    expected["weighting"]["beta"] = 2.0
    assert dataclasses.asdict(there) == expected
    assert there.schedule.switch is None and there == there.second_stage(), "it has no stage after it"
    assert first.divergence.kind == "forward_kl" and first.weighting.beta == 1.0, "the first stage stays as it is"
    assert distill_config(dataclasses.asdict(there)) == there, "it can be sent to the workers"


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        (
            {"teacher": {"kind": "live"}},
            ["distill.schedule.second.teacher", "sequences, context, divergence, weighting"],
        ),
        ({"coefficient": 0.5}, ["distill.schedule.second.coefficient", "0.5", "one of the blocks"]),
        ({"divergence": {"kin": "akl"}}, ["distill.divergence.kin is not a key", "second"]),
        ({"divergence": {"kind": "kl"}}, ["in the second stage", "distill.divergence.kind is 'kl'", "forward_kl"]),
        ({"divergence": {"topk": 0}}, ["in the second stage", "distill.divergence.topk is 0", "from 1"]),
        ({"divergence": {"topk": "many"}}, ["distill.divergence.topk is 'many'", "int", "second"]),
        ({"divergence": "reverse_kl"}, ["distill.schedule.second.divergence is 'reverse_kl'", "a block of keys"]),
        (
            {"context": {"kind": "reference", "reference_template": "{x}"}},
            ["in the second stage", "unknown placeholder"],
        ),
        ({"sequences": {"source": "reference"}}, ["in the second stage", "distill.context.kind is 'sibling'"]),
        ({"weighting": {"store": "f"}}, ["in the second stage", "distill.weighting.store is 'f'", "rates=batch"]),
    ],
)
def test_a_bad_second_stage_is_refused_by_its_key(second: dict[str, Any], parts: list[str]) -> None:
    message = refused({"schedule": {"switch": 0.5, "second": second}})
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("switch", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_a_switch_outside_the_run_is_refused(switch: float) -> None:
    message = refused({"schedule": {"switch": switch, "second": {"divergence": {"kind": "akl"}}}})
    assert message == f"distill.schedule.switch is {switch}; allowed: a fraction between 0 and 1, or null for one stage"


def test_a_switch_and_what_it_switches_to_belong_together() -> None:
    assert "distill.schedule.second is {}" in refused({"schedule": {"switch": 0.5}})
    assert "empty without a switch" in refused({"schedule": {"second": {"divergence": {"kind": "akl"}}}})


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ({"alpha": -1.0}, "distill.weighting.alpha is -1.0; allowed: a number from 0.0"),
        ({"beta": -0.5}, "distill.weighting.beta is -0.5; allowed: a number from 0.0"),
        ({"kernel": "bell"}, "distill.weighting.kernel is 'bell'; allowed: beta, interval, gaussian"),
        ({"low": 0.9}, "distill.weighting.low is 0.9; allowed: a number up to weighting.high=0.8"),
        ({"width": 0.0}, "distill.weighting.width is 0.0; allowed: a number above 0.0"),
        ({"rates": "cache"}, "distill.weighting.rates is 'cache'; allowed: batch, store, running"),
        ({"samples": 0}, "distill.weighting.samples is 0; allowed: a number from 1"),
        ({"decay": 0.0}, "distill.weighting.decay is 0.0; allowed: a number above 0.0 to 1.0"),
        ({"store": "f"}, "distill.weighting.store is 'f'; allowed: null with weighting.rates=batch"),
        ({"recompute_every": 2}, "distill.weighting.recompute_every is 2; allowed: null with weighting.rates=batch"),
        (STORE | {"recompute_every": 0}, "distill.weighting.recompute_every is 0; allowed: a number from 1"),
        (STORE | {"recompute_at": 1.0}, "distill.weighting.recompute_at is 1.0; allowed: a fraction between 0 and 1"),
    ],
)
def test_bad_weights_are_refused_by_key_value_and_what_is_allowed(weighting: dict[str, Any], message: str) -> None:
    assert refused({"weighting": weighting}).startswith(message)


# ---------------------------------------------------------------------------------------------------------- pass rates


@pytest.mark.parametrize(
    ("weighting", "schedule", "expected"),
    [
        ({}, {}, []),
        ({"rates": "running"}, {}, []),
        (STORE, {}, [0]),
        (STORE | {"store": "f"}, {}, []),
        (STORE | {"recompute_at": 0.5}, {}, [0, 5]),
        (STORE | {"store": "f", "recompute_at": 0.5}, {}, [5]),
        (STORE | {"recompute_at": 0.001}, {}, [0, 1]),
        (STORE | {"recompute_at": 0.999}, {}, [0, 9]),
        (STORE | {"recompute_every": 3}, {}, [0, 3, 6, 9]),
        (STORE | {"recompute_every": 5}, {}, [0, 5]),
        (STORE | {"store": "f", "recompute_every": 4, "recompute_at": 0.5}, {}, [4, 5, 8]),
        (STORE, {"switch": 0.5}, [0, 5]),
        (STORE, {"switch": 0.5, "recompute_pass_rates": False}, [0]),
        (STORE | {"store": "f"}, {"switch": 0.3}, [3]),
        (STORE | {"store": "f"}, {"switch": 0.3, "recompute_pass_rates": False}, []),
        (STORE | {"recompute_every": 4}, {"switch": 0.5}, [0, 4, 5, 8]),
        ({}, {"switch": 0.5}, []),
        ({}, {"switch": 0.4, "second": {"weighting": STORE}}, [4]),
        ({}, {"switch": 0.4, "second": {"weighting": STORE}, "recompute_pass_rates": False}, [4]),
        ({}, {"switch": 0.4, "second": {"weighting": STORE | {"recompute_at": 0.8}}}, [4, 8]),
        (STORE, {"switch": 0.4, "second": {"weighting": {"rates": "batch"}}}, [0]),
        (
            STORE | {"recompute_every": 3},
            {"switch": 0.5, "second": {"weighting": {"recompute_every": 4}}},
            [0, 3, 5, 8],
        ),
        (
            STORE | {"recompute_every": 3},
            {"switch": 0.5, "second": {"weighting": {"rates": "batch", "recompute_every": None}}},
            [0, 3],
        ),
    ],
)
def test_pass_rates_are_taken_when_asked_for(
    weighting: dict[str, Any], schedule: dict[str, Any], expected: list[int]
) -> None:
    assert rates_due(block(weighting, **schedule), 10) == expected


def test_a_run_without_distillation_takes_none() -> None:
    assert rates_due(distill_config({"coefficient": 0.0, "weighting": STORE}), 10) == []


WEIGHTING = st.fixed_dictionaries(
    {"rates": st.just("store")},
    optional={
        "store": st.sampled_from([None, "a"]),
        "recompute_every": st.one_of(st.none(), st.integers(1, 12)),
        "recompute_at": st.one_of(st.none(), st.floats(0.01, 0.99)),
    },
)


@settings(max_examples=80, deadline=None)
@given(
    first=st.one_of(st.just({"rates": "batch"}), WEIGHTING),
    second=WEIGHTING,
    switch=st.one_of(st.none(), st.floats(0.05, 0.95)),
    recompute=st.booleans(),
    steps=st.integers(2, 12),
)
def test_no_step_that_needs_pass_rates_is_without(
    first: dict[str, Any], second: dict[str, Any], switch: float | None, recompute: bool, steps: int
) -> None:
    schedule = {} if switch is None else {"switch": switch, "second": {"weighting": second}}
    distill = block(first, recompute_pass_rates=recompute, **schedule)
    due = rates_due(distill, steps)
    assert due == sorted(set(due)) and all(0 <= done < steps for done in due)
    for done in range(steps):
        weighting = stage_after(distill, done, steps).weighting
        if weighting.rates == "store":
            assert weighting.store is not None or any(at <= done for at in due)
