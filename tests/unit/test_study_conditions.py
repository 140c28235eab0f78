"""Conditions of a study's rows: samples, settings that a row keeps, and pairs of entries that were not made equally."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest

from recipe.compose import ROOT, compose_config
from recipe.study_conditions import (
    Conditions,
    budget_text,
    conditions,
    evaluated_differently,
    mean_budget,
    row_settings,
    sequences_of,
    trained_differently,
)
from verl_ext.config import ConfigError

SETTINGS: dict[str, Any] = {
    "start": "models/a",
    "train_files": ["data/train.parquet"],
    "evaluation": {"data.val_files": ["data/test.parquet"], "data.max_response_length": 48, "verifier.options": {}},
    "learning_rates": {"training": 3e-4},
    "rows_a_step": 64,
    "steps_by_source": {"student_rollouts": 40},
    "rate_samples": 0,
}


def row(**changes: Any) -> dict[str, Any]:
    made = {"run_id": "a-seed0-00000000", "overrides": ["method=x"], "summary": {"steps": 40}, "settings": SETTINGS}
    return {**made, "final": {"actor/lr": 3e-4, "context/rows": 128.0}, **changes}


def made_of(run_id: str = "a-seed0-00000000", final: Mapping[str, Any] | None = None, **settings: Any) -> Conditions:
    changes = {} if final is None else {"final": final}
    return conditions(row(run_id=run_id, settings={**SETTINGS, **settings}, **changes))


# --- samples ---------------------------------------------------------------------------------------------------------


def test_what_the_run_recorded_comes_before_what_its_steps_say() -> None:
    found = conditions(row(summary={"steps": 21, "samples": 5088}, sequences=7)).samples
    assert (found.drawn, found.replayed, found.rates, found.source) == (5088, 0, 0, "recorded")
    assert conditions(row(sequences=5100)).samples.source == "counted"
    assert conditions(row(sequences=5100)).samples.drawn == 5100
    last = conditions(row()).samples
    assert (last.drawn, last.source) == (40 * 128, "last step")
    none = conditions(row(final={})).samples
    assert (none.drawn, none.source) == (40 * 64, "settings")


def test_a_step_without_contexts_is_counted_by_its_questions_and_their_histogram() -> None:
    # Nine numbers of successes, 0 to 8: eight rollouts a question.
    final = {"pass_rate/questions": 16.0, "pass_rate/histogram": [0.0] * 9}
    assert conditions(row(final=final)).samples.drawn == 40 * 16 * 8


def test_sequences_are_counted_over_all_steps_and_not_where_one_does_not_say() -> None:
    steps = [{"training/global_step": step, "context/rows": 128.0 - step} for step in (1, 2, 3)]
    validation = {"step": 0, "val/mean@8": 0.4}
    assert sequences_of([validation, *steps]) == 127 + 126 + 125
    assert sequences_of([*steps, {"training/global_step": 4}]) is None
    assert sequences_of([validation]) is None and sequences_of([]) is None


@pytest.mark.parametrize(
    ("by_source", "drawn", "replayed"),
    [
        ({"student_rollouts": 40}, 5120, 0),
        ({"reference": 40}, 0, 5120),
        ({"reference": 10, "student_rollouts": 30}, 3840, 1280),
        ({"pairs": 40}, 5120, 0),
        ({"pairs_replayed": 40}, 2560, 2560),
    ],
)
def test_replayed_texts_are_no_samples_of_the_run(by_source: dict[str, int], drawn: int, replayed: int) -> None:
    found = made_of(steps_by_source=by_source)
    assert (found.samples.drawn, found.samples.replayed) == (drawn, replayed)
    assert mean_budget([found]) == (drawn, replayed)


def test_rollouts_for_pass_rates_are_counted_by_the_questions_that_the_row_names() -> None:
    final = {"context/rows": 128.0, "questions/kept": 194.0, "questions/dropped_weight_zero": 104.0}
    assert made_of(final=final, rate_samples=16).samples.rates == 16 * 298
    with pytest.raises(ConfigError, match="a-seed0-00000000 took pass rates"):
        made_of(rate_samples=8)


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_row_keeps_the_settings_of_its_run_without_a_path_of_this_machine() -> None:
    two_stage = ["model=tiny", "data=tiny_world_teacher_text", "hardware=cpu", "method=paced_two_stage"]
    kept = row_settings(
        compose_config([*two_stage, "teacher=tiny_world", "run.steps=10", "data.val_files=/x/y.parquet"])
    )
    assert kept["steps_by_source"] == {"reference": 5, "student_rollouts": 5}
    # Eight rollouts of a question, at the start and at the switch.
    assert kept["rate_samples"] == 16 and kept["rows_a_step"] == 128
    assert kept["start"] == "models/tiny_world/plain" and kept["learning_rates"] == {"training": 3e-4}
    assert kept["train_files"] == ["data/tiny_world_teacher_text/train.parquet"]
    assert kept["evaluation"]["data.max_response_length"] == 48
    assert kept["evaluation"]["actor_rollout_ref.rollout.val_kwargs.temperature"] == 1.0
    elsewhere = kept["evaluation"]["data.val_files"][0]
    assert elsewhere.startswith("y.parquet (") and str(ROOT) not in json.dumps(kept) and "/x" not in json.dumps(kept)
    chain = row_settings(compose_config(["model=tiny_revision", "data=tiny_world_long", "hardware=cpu", "method=rft"]))
    assert chain["learning_rates"] == {"fine-tuning": 2e-3} and chain["steps_by_source"] == {}
    assert json.loads(json.dumps(chain)) == chain


def test_an_older_row_is_completed_by_today_s_presets_and_says_so() -> None:
    asked: list[tuple[str, ...]] = []

    def compose(overrides: tuple[str, ...]) -> dict[str, Any]:
        asked.append(overrides)
        return SETTINGS

    old = conditions(row(settings=None), compose)
    assert asked == [("method=x",)] and not old.recorded and old.start == "models/a"
    assert conditions(row(), compose).recorded and len(asked) == 1

    def gone(overrides: tuple[str, ...]) -> dict[str, Any]:
        raise ConfigError("method=x does not exist")

    with pytest.raises(ConfigError, match="a-seed0-00000000: the settings .* method=x does not exist"):
        conditions(row(settings=None), gone)


# --- comparison ------------------------------------------------------------------------------------------------------


def test_equal_conditions_are_equal_and_one_percent_of_samples_is_no_difference() -> None:
    first, second = [made_of()], [made_of("b-seed0-11111111")]
    assert evaluated_differently(first, second) == "" and trained_differently(first, second) == []
    chain = [conditions(row(summary={"steps": 21, "samples": 5088}))]
    assert trained_differently(first, chain) == []
    less = [conditions(row(summary={"steps": 21, "samples": 5060}))]
    assert trained_differently(first, less) == ["budgets (5,120 against 5,060 samples)"]


def test_at_a_step_a_run_has_used_what_its_steps_until_then_used() -> None:
    longer = conditions(row(summary={"steps": 60}))
    assert trained_differently([made_of()], [longer]) == ["budgets (5,120 against 7,680 samples)"]
    assert trained_differently([made_of().until(30)], [longer.until(30)]) == []
    assert longer.until(30).samples.drawn == 30 * 128 and longer.until(None) == longer.until(60) == longer
    # Stages of a chain are no steps.
    chain = conditions(row(summary={"steps": 21, "samples": 5088}))
    assert chain.until(1) == chain


def test_replaying_as_many_as_another_draws_is_another_budget() -> None:
    replayed = [made_of(steps_by_source={"reference": 40})]
    assert trained_differently([made_of()], replayed) == ["budgets (5,120 against 5,120 replayed samples)"]


def test_other_starts_and_data_are_named() -> None:
    other = [made_of(start="models/b", train_files=["data/more.parquet"])]
    assert trained_differently([made_of()], other) == [
        "starting models (models/a against models/b)",
        "training data (data/train.parquet against data/more.parquet)",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.val_files", ["data/other.parquet"]),
        ("data.max_response_length", 96),
        ("verifier.options", {"mode": "strict"}),
    ],
)
def test_another_evaluation_is_named_with_its_run(key: str, value: Any) -> None:
    evaluation = {**copy.deepcopy(SETTINGS["evaluation"]), key: value}
    other = made_of("b-seed1-11111111", evaluation=evaluation)
    text = evaluated_differently([made_of()], [made_of("b-seed0-11111111"), other])
    assert text.startswith(f"run a-seed0-00000000 was evaluated with {key}=") and "run b-seed1-11111111 with" in text


def test_a_budget_that_varies_between_seeds_is_a_range() -> None:
    runs = [conditions(row(summary={"steps": 21, "samples": samples})) for samples in (5060, 5100)]
    assert budget_text(runs) == "5,060–5,100" and mean_budget(runs) == (5080, 0)
    final = {"context/rows": 128.0, "questions/kept": 300.0}
    both = made_of(final=final, rate_samples=8, steps_by_source={"reference": 20, "student_rollouts": 20})
    assert budget_text([both]) == "2,560 drawn, 2,560 replayed, 2,400 for pass rates"
