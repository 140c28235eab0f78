"""How far long work is, on stderr: a bar in a terminal, else a line every few seconds; both with the time left."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
BAR_SECONDS = 0.1


class ProgressLine:
    """Context manager; called as often as one likes."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._terminal = sys.stderr.isatty()
        self._progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            disable=not self._terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._spoken = time.monotonic()

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` steps of the work named ``what``; None where nobody knows how many there are."""
        now = time.monotonic()
        started = self._started.setdefault(what, now)
        if now - self._spoken <= (BAR_SECONDS if self._terminal else LINE_SECONDS):
            return
        self._spoken = now
        if not self._terminal:
            print(f"{what}: {_words(done, total, now - started)}", file=sys.stderr, flush=True)
            return
        if what not in self._tasks:
            for earlier in self._tasks.values():
                self._progress.remove_task(earlier)
            self._tasks = {what: self._progress.add_task(what, total=total)}
        self._progress.update(self._tasks[what], completed=done, total=total)


def _words(done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{done} in {seconds:.0f} s"
    left = f", about {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
    return f"{done} of {total}{left}"
