"""What follows an attempt of a supervised run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from recipe.attempts import Attempt, Progress, decide, failures_in_a_row, outcome_of, overdue, read_attempts
from verl_ext.heartbeat import ROLLOUT, SAVE, START, UPDATE, Beat


def attempt(outcome: str, *, progress: bool = False, code: int = 1) -> Attempt:
    return Attempt(outcome, code, f"why {outcome}", saved=4, progress=progress)


@pytest.mark.parametrize(
    ("code", "signalled", "outcome"),
    (
        (0, False, "done"),
        (0, True, "done"),
        (2, False, "refused"),
        (75, True, "preempted"),
        (75, False, "preempted"),
        (130, False, "interrupted"),
        (-signal.SIGINT, False, "interrupted"),
        (-signal.SIGUSR1, True, "preempted"),
        (-signal.SIGTERM, True, "preempted"),
        (-signal.SIGTERM, False, "failed"),
        (-signal.SIGKILL, True, "failed"),
        (1, False, "failed"),
    ),
)
def test_what_an_exit_code_means(code: int, signalled: bool, outcome: str) -> None:
    assert outcome_of(code, signalled=signalled) == outcome


@pytest.mark.parametrize(("outcome", "code"), (("done", 0), ("refused", 2), ("interrupted", 130), ("preempted", 75)))
def test_these_are_never_started_again(outcome: str, code: int) -> None:
    assert decide([attempt(outcome)], restarts_left=9, most_failures=3, joined=False).code == code


@pytest.mark.parametrize(
    ("outcome", "left", "joined", "code"),
    (
        ("failed", 1, False, None),
        ("failed", 1, True, None),
        ("failed", 0, False, 1),
        ("hung", 1, True, None),
        ("hung", 0, True, 75),
        ("lost", 0, True, 75),
        # Without the node its cluster cannot hold the run: only the launcher can bring a whole one.
        ("lost", 5, True, 75),
    ),
)
def test_restart_requeue_or_give_up(outcome: str, left: int, joined: bool, code: int | None) -> None:
    found = decide([attempt(outcome)], restarts_left=left, most_failures=3, joined=joined)
    assert found.code == code
    assert f"why {outcome}" in found.message
    assert code is not None or "checkpoint 4" in found.message


def test_a_driver_that_was_killed_gives_the_shells_code() -> None:
    last = attempt("failed", code=-signal.SIGKILL)
    assert decide([last], restarts_left=0, most_failures=3, joined=False).code == 137


def test_failures_without_progress_end_it_whatever_is_left() -> None:
    stuck = [attempt("failed"), attempt("hung"), attempt("lost")]
    found = decide(stuck, restarts_left=9, most_failures=3, joined=False)
    assert found.code == 1 and "3 attempts in a row made no new checkpoint" in found.message
    assert failures_in_a_row([attempt("failed"), attempt("failed", progress=True), *stuck[:1]]) == 1
    # A preemption says nothing about the run.
    assert failures_in_a_row([attempt("failed"), attempt("preempted"), attempt("failed")]) == 2
    assert failures_in_a_row([attempt("failed"), attempt("preempted", progress=True), attempt("failed")]) == 1


def test_what_takes_too_long_is_named_with_its_limit() -> None:
    limits = {START: 10, UPDATE: 20}
    assert overdue(None, 100, limits, 109) is None
    assert "gave no sign of life for 10 s, allowed are 10 (--limit start=SECONDS)" in overdue(None, 100, limits, 110)
    beat = Beat(7, UPDATE, monotonic=200, wall=0, pid=1)
    assert overdue(beat, 100, limits, 219) is None
    assert overdue(beat, 100, limits, 221).startswith("update of step 7 has not ended for 21 s")
    assert overdue(Beat(7, "stage collect", 200, 0, 1), 100, limits, 1e9) is None


def beats(*found: tuple[str, int]) -> Progress:
    progress = Progress()
    for phase, saved in found:
        progress.see(None)
        progress.see(Beat(1, phase, 0, 0, 1, saved))
    return progress


def test_progress_is_a_new_checkpoint_or_another_stage() -> None:
    assert not beats((START, 0), (UPDATE, 0), (SAVE, 0)).made
    assert not beats((START, 6), (UPDATE, 6)).made
    assert beats((START, 6), (UPDATE, 6), (SAVE, 8)).made
    # The stage of a chain that is resumed says what it goes on from: that is not new.
    assert not beats(("stage distil", 0), (START, 6), (ROLLOUT, 6)).made
    assert beats(("stage collect", 0), ("stage sft", 0)).made
    assert beats((START, 6), (UPDATE, 6)).last.saved == 6


def test_attempts_are_read_back_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    assert read_attempts(path) == []
    path.write_text('{"outcome": "hung", "code": -9, "reason": "r", "saved": 3, "ended": 1.5}\n{"outc')
    assert read_attempts(path) == [Attempt("hung", -9, "r", saved=3)]
