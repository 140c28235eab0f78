"""SIGUSR1 and SIGTERM: stop at the next step boundary, with a checkpoint, and say so by the exit code.

Slurm sends one of them some time before it takes the nodes away. Between steps there is something to save; before the
first step there is not, and the run ends at once. Standard library only: the handler is installed before anything slow
is imported, since an unhandled SIGUSR1 would fail the job.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE_EXIT = os.EX_TEMPFAIL
"""75: the state is saved (or there is none), go on later. docs/clusters.md, "Exit codes"."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
SAME_EVENT_SECONDS = 5.0


class Preempted(KeyboardInterrupt):
    """The run ends because it was told to. Like Ctrl-C it passes every ``except Exception`` and every clean-up."""


def _to_standard_error(text: str) -> None:
    # Not print: the signal may arrive inside a write to the same buffered stream, which may not be entered twice.
    os.write(2, (text + "\n").encode())


class Preemption:
    """What signals were received, and what one does that arrives now.

    Outside :meth:`deferring` the first signal raises :class:`Preempted` in the main thread; inside it is only noted, in
    ``signal_name``, and whoever runs the steps stops at the next boundary. A later signal raises wherever it arrives.
    Launchers send the same event more than once (to the process and to its parent, which passes it on), so signals
    within ``same_event_seconds`` of the first are one.
    """

    def __init__(
        self, *, same_event_seconds: float = SAME_EVENT_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.signal_name: str | None = None
        self.tell: Callable[[str], None] = _to_standard_error
        self._same_event_seconds, self._clock = same_event_seconds, clock
        self._first = 0.0
        self._deferred = 0
        self._listening = False

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self.signal_name is not None

    def listen(self) -> None:
        """Installs the handler for :data:`SIGNALS`. Python allows that in the main thread only."""
        for number in SIGNALS:
            signal.signal(number, self.handle)
        self._listening = True

    @contextmanager
    def beside_other_handlers(self) -> Iterator[None]:
        """Around something that installs handlers of its own. Afterwards ours are back; nothing where nobody listened.

        ``ray.init`` takes SIGTERM and answers it by SystemExit with the signal's number: inside, that is the signal.
        """
        try:
            yield
        except SystemExit as ended:
            if self._listening and ended.code == signal.SIGTERM:
                self.handle(signal.SIGTERM)
            raise
        if self._listening and threading.current_thread() is threading.main_thread():
            self.listen()

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        name = signal.Signals(number).name
        if self.signal_name is None:
            self.signal_name, self._first = name, self._clock()
            if self._deferred:
                self.tell(
                    f"{name}: saving at the end of this step, then exit code {REQUEUE_EXIT}; once more ends it now"
                )
                return
            self.tell(f"{name}: ending now with exit code {REQUEUE_EXIT}; nothing was begun that could be saved")
        elif self._clock() - self._first < self._same_event_seconds:
            return
        else:
            self.tell(f"{name} again: ending now, without saving; the last checkpoint stays")
        raise Preempted(self.signal_name)

    @contextmanager
    def telling(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Inside, messages go to ``tell``, which is called from the signal handler."""
        before, self.tell = self.tell, tell
        try:
            yield
        finally:
            self.tell = before

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Inside, a first signal waits for the step's end. May be nested."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def check(self) -> None:
        """Raises :class:`Preempted` where a signal is waiting: for step boundaries and waits that may be cut."""
        if self.requested:
            raise Preempted(self.signal_name)


PREEMPTION = Preemption()
"""The process's own; signals belong to a process."""
