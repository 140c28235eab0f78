"""A driver as a child: started in a session of its own, signalled alone, and ended with all that it left behind.

The driver's Ray processes ignore or survive much; after a kill some are adopted by init and rename themselves, so that
neither the process tree nor their names find them. Remembered are therefore all descendants seen while the driver
lived, and found are those that carry a mark in their environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

import psutil

MARK = "PASSRATE_SUPERVISED_BY"
SECONDS_TO_END = 15.0
SECONDS_TO_LEAVE = 10.0
_PR_SET_PDEATHSIG = 1


class DriverProcess:
    """A running command; Linux only."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, output: IO[bytes] | None = None
    ) -> None:
        """``output``: file for what it prints; None: where this process prints. Raises OSError: it cannot start."""
        self._mark = uuid.uuid4().hex
        self._seen: dict[int, psutil.Process] = {}
        self._process = subprocess.Popen(
            list(command),
            env={**environment, MARK: self._mark},
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent(os.getpid()),
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs. Remembers its descendants."""
        code = self._process.poll()
        if code is None:
            self._remember()
        return code

    def send(self, number: int) -> None:
        """A signal to the driver alone: its Ray processes would die of it."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def end(self, *, seconds: float = SECONDS_TO_END, wait: Callable[[float], None] = time.sleep) -> int:
        """SIGTERM; after ``seconds`` SIGKILL to the group. Returns the exit code."""
        self._remember()
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            wait(0.05)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._process.wait()

    def sweep(self, *, seconds: float = SECONDS_TO_LEAVE) -> list[str]:
        """After the driver's end: waits for what it started, then kills what is left; returns the names of those."""
        left = self._left()
        _, left = psutil.wait_procs(left, timeout=seconds)
        names = []
        # Once more for what a killed parent left, or started in the meantime.
        for _ in range(3):
            for process in left:
                with suppress(psutil.Error):
                    names.append(process.name())
                    process.kill()
            psutil.wait_procs(left, timeout=seconds)
            left = self._left()
            if not left:
                break
        return sorted(names)

    def _remember(self) -> None:
        with suppress(psutil.Error):
            for process in psutil.Process(self.pid).children(recursive=True):
                self._seen.setdefault(process.pid, process)

    def _left(self) -> list[psutil.Process]:
        """What lives of the remembered and the marked, and all their descendants, zombies left out."""
        # is_running compares the start time: a number that was given anew is another process.
        found = {pid: process for pid, process in self._seen.items() if process.is_running()}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    found[process.pid] = process
        for process in list(found.values()):
            with suppress(psutil.Error):
                found |= {child.pid: child for child in process.children(recursive=True)}
        self._seen = found
        alive = []
        for process in found.values():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive


def _end_with_parent(parent: int) -> Callable[[], None]:
    """For the child before exec: SIGTERM when the supervisor dies, so that no driver is left without one."""
    library = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    return prepare
