"""Where a run is: one small file, replaced whole at every change of phase, and the same in memory.

The file is for whoever watches the run from outside (:mod:`recipe.supervise`), the memory for the watchdog inside
(:mod:`verl_ext.watchdog`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "heartbeat.json"
VARIABLE = "PASSRATE_HEARTBEAT"
"""Environment variable with the path of the file; without it the file stands in the run's folder."""

START, ROLLOUT, UPDATE, SAVE, SYNC, VALIDATE, SAMPLE, END = (
    "start", "rollout", "update", "save", "sync", "validate", "sample", "end"
)  # fmt: skip
PHASES = (START, ROLLOUT, UPDATE, SAVE, SYNC, VALIDATE, SAMPLE, END)


@dataclass(frozen=True)
class Beat:
    """One sign of life.

    Attributes:
        step: the step being made, from 1; 0 before the first.
        phase: one of :data:`PHASES`, or another word for work that has no limit.
        monotonic: seconds of the host's monotonic clock, which all its processes share and nobody sets.
        wall: seconds since 1970, for people and other hosts.
        pid: the driver.
        saved: step of the last checkpoint; 0: none.
    """

    step: int
    phase: str
    monotonic: float
    wall: float
    pid: int
    saved: int = 0

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase


class Heartbeat:
    """Writes beats to ``path``; None: in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.last: Beat | None = None

    def beat(self, phase: str, step: int | None = None, saved: int | None = None) -> None:
        """Notes the phase; step and last checkpoint stay where they are not given.

        Raises:
            OSError: the file cannot be written; names it.
        """
        before = self.last
        step = (before.step if before else 0) if step is None else step
        saved = (before.saved if before else 0) if saved is None else saved
        self.last = Beat(step, phase, time.monotonic(), time.time(), os.getpid(), saved)
        if self.path is not None:
            # Not synced to the disk: who reads it runs on this host, and after a crash it says nothing anyway.
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(asdict(self.last)))
            os.replace(temporary, self.path)


_current = Heartbeat()


def beat(phase: str, step: int | None = None, saved: int | None = None) -> None:
    """A beat of the run that is going on in this process; in memory only where none is."""
    _current.beat(phase, step, saved)


def current() -> Heartbeat:
    """The heart of the run in this process."""
    return _current


@contextmanager
def beating(folder: Path) -> Iterator[Heartbeat]:
    """Inside, beats go to the file that :data:`VARIABLE` names, or to one in ``folder``. May be nested (chains)."""
    global _current
    before = _current
    _current = Heartbeat(Path(os.environ.get(VARIABLE) or folder / FILE))
    try:
        yield _current
    finally:
        _current = before


def read_beat(path: Path) -> Beat | None:
    """The last beat in a file; None where there is no file.

    Raises:
        ValueError: the file holds something else; names it.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        return Beat(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a heartbeat: {error}") from error
