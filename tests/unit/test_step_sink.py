"""A logger that fails costs one warning, never the run or a row."""

from __future__ import annotations

from typing import Any

from verl_ext.step_sink import Tee


class Sink:
    def __init__(self) -> None:
        self.rows: list[int] = []
        self.warnings: list[str] = []

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        self.rows.append(step)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Tracker:
    """Works until a step, then not even its end does."""

    project = "p"

    def __init__(self, until: int) -> None:
        self.until, self.calls, self.ended = until, 0, None

    def log(self, data: dict[str, Any], step: int) -> None:
        self.calls += 1
        if step > self.until:
            raise ConnectionError("no route to the service")

    def finish(self, exit_code: int) -> None:
        if self.until == 0:
            raise ConnectionError("gone")
        self.ended = exit_code


def test_a_lost_logger_is_named_once_and_every_row_is_written() -> None:
    sink, tracker = Sink(), Tracker(until=1)
    tee = Tee(tracker, sink, names=["wandb"])
    for step in range(1, 5):
        tee.log({}, step)
    assert sink.rows == [1, 2, 3, 4] and tracker.calls == 2
    (warning,) = sink.warnings
    for part in ("[wandb]", "step 2", "no route to the service", "metrics.jsonl"):
        assert part in warning
    tee.finish(exit_code=0)
    assert tracker.ended is None


def test_one_that_works_is_ended_and_one_that_cannot_end_is_a_warning() -> None:
    sink, tracker = Sink(), Tracker(until=9)
    tee = Tee(tracker, sink)
    tee.log({}, 1)
    tee.finish(exit_code=1)
    assert tracker.ended == 1 and tee.project == "p" and not sink.warnings
    Tee(Tracker(until=0), sink, names=["file"]).finish()
    assert "[file] did not end" in sink.warnings[0]
