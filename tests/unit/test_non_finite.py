"""Skipped optimiser steps: counted, written out with their rows, and an end to the run when there are too many."""

from __future__ import annotations

import math
from typing import Any

import pytest

from verl_ext.non_finite import NAMED_ROWS, NonFiniteSteps, NonFiniteWatch

NAN, INF = math.nan, math.inf


class FakeSink:
    """Keeps what would go to non_finite.jsonl and to the terminal."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def non_finite(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def row(question: str, rollout: int, suspect: bool = False) -> dict[str, Any]:
    return {"question_id": question, "rollout": rollout, "suspect": suspect, "response": "text"}


def batch(index: int) -> list[dict[str, Any]]:
    return [row(f"q{index}", 0), row(f"q{index}", 1, suspect=True)]


@pytest.fixture
def sink() -> FakeSink:
    return FakeSink()


def never(index: int) -> list[dict[str, Any]]:
    raise AssertionError("rows are only read of skipped steps")


def test_finite_steps_cost_nothing_and_count_zero(sink: FakeSink) -> None:
    watch = NonFiniteWatch(3, sink)
    assert watch.look(1, [0.5, 0.0, 1e30], never) == {"update/skipped_non_finite": 0.0}
    assert sink.rows == [] and sink.warnings == [] and watch.in_a_row == 0


@pytest.mark.parametrize("norm", [NAN, INF, -INF])
def test_a_skipped_step_is_counted_warned_of_and_its_rows_are_written(sink: FakeSink, norm: float) -> None:
    watch = NonFiniteWatch(3, sink)
    assert watch.look(7, [0.5, norm], batch) == {"update/skipped_non_finite": 1.0}
    assert watch.in_a_row == 1
    assert sink.rows == [{"step": 7, "optimizer_step": 1, **entry} for entry in batch(1)]
    (warning,) = sink.warnings
    assert "step 7" in warning and "q1 rollout 1" in warning and "non_finite.jsonl" in warning


def test_steps_are_counted_in_a_row_across_trainer_steps(sink: FakeSink) -> None:
    watch = NonFiniteWatch(3, sink)
    for step in (1, 2, 3):
        assert watch.look(step, [NAN], batch) == {"update/skipped_non_finite": 1.0}
    assert watch.in_a_row == 3
    with pytest.raises(NonFiniteSteps, match="in 4 optimiser steps in a row, up to step 4"):
        watch.look(4, [NAN], batch)


def test_a_finite_step_ends_the_series(sink: FakeSink) -> None:
    watch = NonFiniteWatch(2, sink)
    assert watch.look(1, [NAN, NAN, 0.1, NAN], batch) == {"update/skipped_non_finite": 3.0}
    assert watch.in_a_row == 1
    watch.look(2, [NAN], batch)
    watch.look(3, [1.0], never)
    assert watch.in_a_row == 0
    assert watch.look(4, [NAN, NAN], batch) == {"update/skipped_non_finite": 2.0}


def test_the_run_ends_at_one_more_than_the_limit_with_the_rows_of_every_step_written(sink: FakeSink) -> None:
    watch = NonFiniteWatch(1, sink)
    with pytest.raises(NonFiniteSteps) as caught:
        watch.look(5, [NAN, INF, NAN], batch)
    message = str(caught.value)
    for part in ("2 optimiser steps in a row", "distill.non_finite_limit=1", "q1 rollout 1", "non_finite.jsonl"):
        assert part in message
    assert "q2" not in message and "\n" not in message
    assert [entry["optimizer_step"] for entry in sink.rows] == [0, 0, 1, 1]
    assert len(sink.warnings) == 1


def test_a_limit_of_zero_ends_the_run_at_the_first_skipped_step(sink: FakeSink) -> None:
    watch = NonFiniteWatch(0, sink)
    watch.look(1, [1.0], never)
    with pytest.raises(NonFiniteSteps, match="in 1 optimiser steps in a row"):
        watch.look(2, [NAN], batch)
    assert len(sink.rows) == 2


def ended_by(rows: list[dict[str, Any]], sink: FakeSink) -> str:
    with pytest.raises(NonFiniteSteps) as caught:
        NonFiniteWatch(0, sink).look(1, [NAN], lambda index: rows)
    return str(caught.value)


def test_the_message_names_the_suspects_alone_where_there_are_any(sink: FakeSink) -> None:
    rows = [row("easy", i) for i in range(20)] + [row("hard", 3, suspect=True)]
    message = ended_by(rows, sink)
    assert "rows with a non-finite loss: hard rollout 3." in message and "easy" not in message
    assert len(sink.rows) == 21


@pytest.mark.parametrize("suspect", [True, False])
def test_no_more_than_some_rows_are_named_and_the_rest_is_a_count(sink: FakeSink, suspect: bool) -> None:
    message = ended_by([row("q", i, suspect) for i in range(NAMED_ROWS + 5)], sink)
    assert message.count("q rollout") == NAMED_ROWS and " and 5 more." in message
    assert ("rows with a non-finite loss" if suspect else "rows of the batch") in message


def test_without_a_rest_nothing_is_counted(sink: FakeSink) -> None:
    assert " more" not in ended_by([row("q", i) for i in range(NAMED_ROWS)], sink)
