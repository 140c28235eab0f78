"""Where what happens in a run goes: the trainer tells a sink, and knows neither files nor terminals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class StepSink(Protocol):
    """Where a step's metrics and sampled completions go."""

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One flat row per step; step 0 holds the validation before training."""

    def completions(self, rows: list[dict[str, Any]]) -> None:
        """Sampled rollouts with their teacher context."""

    def non_finite(self, rows: list[dict[str, Any]]) -> None:
        """The rows of an optimiser step that was skipped."""

    def phase(self, text: str) -> None:
        """A stage of the start."""

    def warning(self, text: str) -> None:
        """Something the user should see at once."""

    def working(self, text: str, seconds_left: float | None = None) -> None:
        """What is going on beside the steps, such as a validation, and how long it will take where that is known.

        May be called often, and from other threads.
        """

    def validated(self, seconds: float) -> None:
        """A validation took so long."""

    def pending(self, step: int, values: dict[str, Any]) -> None:
        """The row of a step whose checkpoint is about to be written, as far as it is known."""

    def saved(self, step: int, size: int) -> None:
        """The checkpoint of a step is complete; it has so many bytes."""

    def validation_items(self, step: int, counts: dict[str, Any]) -> None:
        """Right answers by question, see :func:`verl_ext.validation_items.item_counts`."""


class Tee:
    """Our sink and verl's tracker.

    The sink's rows are the record of the run; the tracker's services only show them. One that fails (no network, an
    account gone) is named once and left alone from then on, and the run goes on.
    """

    def __init__(self, tracker: Any, sink: StepSink, names: Sequence[str] = ()) -> None:
        self._tracker, self._sink, self._names = tracker, sink, ", ".join(names)
        self._lost = False

    def log(self, data: dict[str, Any], step: int) -> None:
        self._sink.metrics(step, data)
        if self._lost:
            return
        try:
            self._tracker.log(data=data, step=step)
        except Exception as error:
            self._lost = True
            self._sink.warning(
                f"trainer.logger [{self._names}] failed at step {step} and gets nothing more: "
                f"{type(error).__name__}: {error}; metrics.jsonl has every row"
            )

    def finish(self, exit_code: int = 0) -> None:
        """Ends the services; one that was lost is not waited for."""
        if self._lost:
            return
        try:
            self._tracker.finish(exit_code=exit_code)
        except Exception as error:
            self._lost = True
            self._sink.warning(f"trainer.logger [{self._names}] did not end: {type(error).__name__}: {error}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)
