"""Where what happens in a run goes: the trainer tells a sink, and knows neither files nor terminals."""

from __future__ import annotations

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

    def validated(self, seconds: float) -> None:
        """A validation took so long."""

    def saved(self, step: int, size: int) -> None:
        """The checkpoint of a step is complete; it has so many bytes."""

    def validation_items(self, step: int, counts: dict[str, Any]) -> None:
        """Right answers by question, see :func:`verl_ext.validation_items.item_counts`."""


class Tee:
    """verl's tracker and our sink."""

    def __init__(self, tracker: Any, sink: StepSink) -> None:
        self._tracker, self._sink = tracker, sink

    def log(self, data: dict[str, Any], step: int) -> None:
        self._tracker.log(data=data, step=step)
        self._sink.metrics(step, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)
