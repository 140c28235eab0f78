"""The attempts of a supervised run: what came of each, and what follows the last. Pure but for reading their file."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipe.run_files import read_json_lines
from verl_ext.heartbeat import START, Beat
from verl_ext.preemption import REQUEUE_EXIT

ATTEMPTS = "attempts.jsonl"
REFUSED_EXIT, INTERRUPTED_EXIT = 2, 130


@dataclass(frozen=True)
class Attempt:
    """What came of one start of the command.

    Attributes:
        outcome: done, refused, interrupted, preempted, failed, hung or lost (a node).
        code: exit code of the driver, negative for a signal.
        reason: in words.
        step: that it was in, as far as is known.
        saved: step of the last checkpoint.
        progress: whether there is a new checkpoint, or another stage of a chain was reached.
        seconds: from start to end.
    """

    outcome: str
    code: int
    reason: str
    step: int = 0
    saved: int = 0
    progress: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Decision:
    """``code`` None: start again. ``message``: for the person."""

    code: int | None
    message: str


def outcome_of(code: int, *, signalled: bool) -> str:
    """Of a driver that ended by itself; ``signalled``: a signal was passed on to it."""
    if code == 0:
        return "done"
    if code == REFUSED_EXIT:
        return "refused"
    if code in (INTERRUPTED_EXIT, -signal.SIGINT):
        return "interrupted"
    # Before its handler is installed a driver dies of the signal, with nothing to save.
    if code == REQUEUE_EXIT or (signalled and code in (-signal.SIGUSR1, -signal.SIGTERM)):
        return "preempted"
    return "failed"


def failures_in_a_row(attempts: Sequence[Attempt]) -> int:
    """Attempts at the end that made no progress; preemptions neither count nor end the row."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.progress:
            break
        count += attempt.outcome in ("failed", "hung", "lost")
    return count


def decide(attempts: Sequence[Attempt], *, restarts_left: int, most_failures: int, joined: bool) -> Decision:
    """What follows the last attempt.

    Args:
        attempts: of this run, those before a requeue included.
        most_failures: attempts in a row without progress.
        joined: the run is on a Ray cluster that somebody else started; without one of its nodes it is of no use.
    """
    last = attempts[-1]
    own = {"done": 0, "refused": REFUSED_EXIT, "interrupted": INTERRUPTED_EXIT, "preempted": REQUEUE_EXIT}
    if last.outcome in own:
        return Decision(own[last.outcome], last.reason)
    failures = failures_in_a_row(attempts)
    if failures >= most_failures:
        return Decision(
            1, f"{last.reason}; {failures} attempts in a row made no new checkpoint: not started again (--attempts)"
        )
    if restarts_left > 0 and not (joined and last.outcome == "lost"):
        return Decision(None, f"{last.reason}; started again from checkpoint {last.saved}, {restarts_left} left")
    if last.outcome == "failed":
        return Decision(
            last.code if last.code > 0 else 128 - last.code, f"{last.reason}; no restart is left (--restarts)"
        )
    return Decision(REQUEUE_EXIT, f"{last.reason}; exit code {REQUEUE_EXIT} asks for a requeue")


class Progress:
    """Of one attempt: the last beat, and whether there was something to keep."""

    def __init__(self) -> None:
        self.last: Beat | None = None
        self.made = False
        self._base: int | None = None
        self._stage: str | None = None

    def see(self, beat: Beat | None) -> None:
        """Notes what the heartbeat says now."""
        if beat is None:
            return
        self.last = beat
        if beat.phase == START or self._base is None:
            # A start says which checkpoint it goes on from.
            self._base = beat.saved
        elif beat.saved > self._base:
            self.made = True
        if beat.phase.startswith("stage "):
            self.made = self.made or self._stage not in (None, beat.phase)
            self._stage = beat.phase


def overdue(beat: Beat | None, started: float, limits: Mapping[str, float], now: float) -> str | None:
    """What took too long, in words; None: nothing. ``started`` and ``now`` on the monotonic clock."""
    phase, since = (START, started) if beat is None else (beat.phase, beat.monotonic)
    limit = limits.get(phase)
    if limit is None or now - since < limit:
        return None
    place = "the driver gave no sign of life" if beat is None else f"{beat.place} has not ended"
    return f"{place} for {now - since:.0f} s, allowed are {limit:g} (--limit {phase}=SECONDS)"


def read_attempts(path: Path) -> list[Attempt]:
    """Earlier attempts of the run. A torn last line is left out."""
    if not path.exists():
        return []
    names = Attempt.__dataclass_fields__
    return [Attempt(**{key: value for key, value in row.items() if key in names}) for row in read_json_lines(path)]
