"""Alarms go off on runs that go wrong, say where and by how much, and are quiet on runs that go well."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from recipe.alarms import ALARM, CHECKS, NOT_MEASURED, QUIET, Check, alarms, check_run, steps_text
from recipe.leaks import PRIVILEGED, Leak, leaks, template_phrases, words
from recipe.run_files import RunFiles
from recipe.train import alarm_lines
from verl_ext.config import ContextConfig

STEPS = 20
SIBLING = {"distill": {"sequences": {"source": "student_rollouts"}, "context": asdict(ContextConfig())}}


def run_of(**series: Sequence[float | None]) -> list[dict[str, Any]]:
    """Records of steps 1 to n; ``a__b`` stands for the key ``a/b``."""
    columns = {name.replace("__", "/"): values for name, values in series.items()}
    length = len(next(iter(columns.values())))
    return [{"step": i + 1, **{key: values[i] for key, values in columns.items()}} for i in range(length)]


def healthy() -> list[dict[str, Any]]:
    rising = [0.3 + 0.02 * i for i in range(STEPS)]
    return run_of(
        **{"val__mean@8": rising, "reward__mean": rising, "pass_rate__histogram": [[3, 4, 5]] * STEPS},
        distill__loss=[0.1] * STEPS,
        actor__grad_norm=[1.0] * STEPS,
        response__length=[400.0 - 15 * i for i in range(STEPS)],  # shorter, and better
        response__truncated=[0.01] * STEPS,
        student__nll=[0.3 - 0.01 * i for i in range(STEPS)],
        teacher__entropy=[0.2] * STEPS,
        teacher__gap=[0.05 if i % 3 else -0.02 for i in range(STEPS)],  # single steps below 0 are chance
        distill__divergence=[0.05] * STEPS,
        rows__train_share=[0.8] * STEPS,
        context__rows=[96.0] * STEPS,
        context__with_demonstration=[60.0] * STEPS,
        weight__effective_sample_size=[8.0] * STEPS,
        pass_rate__questions=[12.0] * STEPS,
        verifier__errors=[0.0] * STEPS,
    )


def state_of(records: Sequence[Mapping[str, Any]], name: str, **more: Any) -> Check:
    return next(one for one in check_run(records, **more) if one.name == name)


def test_a_healthy_run_is_quiet_and_every_check_was_made() -> None:
    rows = [{"step": step, "prompt": "p", "response": "six"} for step in (1, 11)]
    checks = check_run(healthy(), rows, SIBLING)
    assert len(checks) == len(CHECKS) and {one.state for one in checks} == {QUIET}


def test_what_was_not_written_was_not_measured() -> None:
    assert {one.state for one in check_run([{"step": 1}])} == {NOT_MEASURED}
    assert {one.state for one in check_run([])} == {NOT_MEASURED}


HALF = STEPS // 2
FALLING = [1.0] * HALF + [0.1] * HALF
BROKEN = [
    ("loss or gradient was not finite", {"distill__loss": [0.1, None, 0.1]}, 2, "distill/loss"),
    ("loss or gradient was not finite", {"loss": [0.1] * 3, "update__skipped_non_finite": [0, 0, 2]}, 3, "skipped"),
    ("accuracy collapsed", {"val__mean@8": [0.3, None, 0.6, 0.35, 0.6]}, 4, "35.0%, after 60.0% at step 3"),
    ("validation ended below its start", {"val__mean@8": [0.5, 0.7, 0.47]}, 3, "47.0%, before training 50.0%"),
    ("training reward collapsed", {"reward__mean": FALLING}, 13, "0.100, after 1.000"),
    ("responses became short without becoming better", {"response__length": FALLING}, 13, "at the start 1"),
    ("entropy collapsed", {"student__nll": FALLING}, 15, "student/nll 0.1 nats, at the start 1"),
    ("the teacher drifted", {"teacher__entropy": FALLING}, 15, "teacher/entropy 0.1 nats"),
    ("the teacher drifted", {"distill__divergence": [0.1] * HALF + [1.0] * HALF}, 12, "1 nats, at the start 0.1"),
    ("the teacher was no better than the student", {"teacher__gap": [0.1] * 5 + [-0.2] * 10}, 8, "-0.2 nats a token"),
    ("hardly any row had a demonstration", {"context__with_demonstration": [0.0] * 6, "context__rows": [8.0] * 6}, 5,
     "0.0% of the rows"),
    ("hardly any row had a demonstration", {"context__with_reference": [0.0], "context__rows": [8.0]}, 1, "0.0%"),
    ("no question had a success", {"pass_rate__histogram": [[1, 2, 0], [4, 0, 0], None]}, 2, "0 of 4"),
    ("no row trained", {"rows__train_share": [0.5, 0.0, 0.5]}, 2, "0%"),
    ("few questions carried the weight",
     {"weight__effective_sample_size": [1.0] * 5, "pass_rate__questions": [32.0] * 5}, 5, "3.1% of the questions"),
    ("responses were cut", {"response__truncated": [0.5] * 5}, 5, "50.0% of the responses"),
    ("the verifier failed", {"verifier__errors": [0, 1, 0], "verifier__timeouts": [0, 2, 0]}, 2, "3 responses"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "series", "step", "value"), BROKEN)
def test_an_alarm_says_the_step_the_value_and_what_to_do(name: str, series: dict, step: int, value: str) -> None:
    found = state_of(run_of(**series), name)
    assert found.state == ALARM and found.step == step and value in found.value, found
    assert found.threshold and found.advice and found.seen
    for part in (name, found.seen, found.value, found.threshold, found.advice):
        assert part in found.line()


def test_small_changes_and_short_runs_are_no_alarm() -> None:
    for name, series in (
        ("accuracy collapsed", {"val__mean@8": [0.10, 0.06]}),  # 40% of it, but four points of a small test
        ("validation ended below its start", {"val__mean@8": [0.50, 0.49]}),
        ("training reward collapsed", {"reward__mean": [-1.0] * STEPS}),
        ("the teacher drifted", {"distill__divergence": [-0.1] * HALF + [0.5] * HALF}),  # no ratio of two signs
        ("the teacher was no better than the student", {"teacher__gap": [-0.34] + [0.03] * HALF}),  # one odd step
    ):
        assert state_of(run_of(**series), name).state == QUIET, name
    short = "responses became short without becoming better"
    for name, key in (("entropy collapsed", "student__nll"), (short, "response__length")):
        assert state_of(run_of(**{key: [1.0, 0.1, 0.1]}), name).state == NOT_MEASURED


def test_shorter_and_better_is_what_is_wanted() -> None:
    name = "responses became short without becoming better"
    better = run_of(response__length=FALLING, reward__mean=[0.2] * HALF + [0.6] * HALF)
    worse = run_of(response__length=FALLING, reward__mean=[0.2] * HALF + [0.1] * HALF)
    assert state_of(better, name).state == QUIET and state_of(worse, name).state == ALARM


def test_alarms_come_first_and_name_the_worst_value() -> None:
    checks = check_run(run_of(verifier__errors=[1, 5, 2], rows__train_share=[0.5, 0.5, 0.5]))
    assert [one.name for one in alarms(checks)] == ["the verifier failed"] == [checks[0].name]
    assert (checks[0].step, checks[0].value, checks[0].seen) == (1, "5 responses at step 2", "steps 1, 2, 3")
    assert steps_text(range(3, 50)) == "47 steps, first 3, last 49"


# --------------------------------------------------------------------------------------------------------------- leaks


def test_the_terminal_gets_a_line_for_each_alarm(tmp_path: Path) -> None:
    with RunFiles(tmp_path, tensorboard=False) as files:
        files.append_metrics(1, {"verifier/errors": 2})
        files.append_completions(completions({11: ["the reference solution"] * 9}))
        lines = alarm_lines(files, OmegaConf.create(SIBLING))
    assert [line.split(" (")[0] for line in lines] == [
        "alarm: the student writes the teacher's words",
        "alarm: the verifier failed",
    ]


def completions(texts: Mapping[int, Sequence[str]], prompt: str = "How much is 2 + 4?") -> list[dict[str, Any]]:
    return [{"step": step, "prompt": prompt, "response": text} for step, row in texts.items() for text in row]


def test_phrases_come_from_the_templates_of_the_run() -> None:
    found = template_phrases(asdict(ContextConfig()))
    assert found[: len(PRIVILEGED)] == list(PRIVILEGED)
    assert "correctly solve the original question" in found
    assert all(len(one.split()) <= 7 and not re.search(r"[{}]", one) for one in found)
    reference = template_phrases(
        {"kind": "reference", "reference_template": "{problem}\nA key: {solution}\nDo it well"}
    )
    assert reference[len(PRIVILEGED) :] == ["do it well"]  # two words are chance
    assert template_phrases({"kind": "none"}) == list(PRIVILEGED)


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words("As the *Reference*  solution: 5") == " as the reference solution 5 "
    rows = completions({1: ["By the Reference\nSolution, 6", "a preference solution", "6"]})
    assert leaks(rows, PRIVILEGED) == [Leak(0, "reference solution")]
    assert leaks(completions({1: ["the given solution"]}, "Is the given solution right?"), PRIVILEGED) == []
    messages = [{"role": "user", "content": "Check the given solution"}]
    assert leaks([{"prompt": messages, "response": "the given solution"}], PRIVILEGED) == []
    assert leaks([{"response": None}], PRIVILEGED) == []


def test_a_student_that_writes_the_teachers_words_is_found() -> None:
    name = "the student writes the teacher's words"
    clean, leaking = ["It is 6."] * 4, ["It is 6.", "As the reference solution says, 6.", "Reference solution: 6", "6"]
    found = state_of([], name, completions=completions({1: clean, 11: leaking, 21: clean}), config=SIBLING)
    assert (found.state, found.step) == (ALARM, 11) and "reference solution" in found.value and "2 of 3" in found.value
    one = completions({1: clean, 11: ["the reference solution", *clean]})
    assert state_of([], name, completions=one, config=SIBLING).state == QUIET
    habit = completions({1: leaking, 11: leaking})  # it wrote so before its first update
    assert state_of([], name, completions=habit, config=SIBLING).state == QUIET


def test_text_that_is_not_the_students_is_not_looked_at() -> None:
    name = "the student writes the teacher's words"
    rows = completions({11: ["the reference solution"] * 9})
    replayed = {"distill": SIBLING["distill"] | {"sequences": {"source": "reference"}}}
    assert state_of([], name, completions=rows, config=SIBLING).state == ALARM
    assert state_of([], name, completions=rows, config=replayed).state == NOT_MEASURED
    assert state_of([], name, completions=[row | {"sampled_by": "teacher"} for row in rows], config=SIBLING).state == (
        NOT_MEASURED
    )
    assert state_of([], name, completions=rows).state == NOT_MEASURED
