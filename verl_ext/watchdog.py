"""A step that hangs is ended: stacks of driver and workers into a file, one message, and the main thread is freed.

verl waits without a limit in several places (for rollouts, for workers). Nothing of a hung step can be saved; the last
checkpoint stays as it is.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from verl_ext.heartbeat import Heartbeat

WAKE = signal.SIGUSR2
SECONDS_TO_UNWIND = 60.0
SECONDS_FOR_A_STACK = 20.0
MOST_WORKERS = 32


class StepHung(RuntimeError):
    """A phase took longer than ``run.step_timeout``; names it and the file with the stacks."""


class Watchdog:
    """Looks at a heart from a thread of its own."""

    def __init__(
        self,
        heart: Heartbeat,
        limit: float,
        folder: Path,
        *,
        poll: float = 1.0,
        unwind: float = SECONDS_TO_UNWIND,
        give_up: Callable[[int], None] = os._exit,
    ) -> None:
        """``limit``: seconds without a beat. ``give_up`` ends the process where the main thread does not wake up."""
        self.heart, self.limit, self.folder = heart, limit, folder
        self._poll, self._unwind, self._give_up = poll, unwind, give_up
        self._done = threading.Event()
        self._message: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a hang raises :class:`StepHung` in the main thread, which must be the one that enters.

        From the moment it is raised the main thread has ``unwind`` seconds to leave; then the process ends with 1.
        """

        def wake(number: int, frame: object) -> None:
            if not self._done.is_set():
                raise StepHung(self._message)

        before = signal.signal(WAKE, wake)
        thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()  # or its signal could meet the handler from before, which ends the process
            signal.signal(WAKE, before)

    def _look(self) -> None:
        started = time.monotonic()
        while not self._done.wait(self._poll):
            last = self.heart.last
            since = last.monotonic if last else started
            if time.monotonic() - since < self.limit:
                continue
            place = last.place if last else "start"
            path = self.folder / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
            self._message = (
                f"{place} made no progress for {self.limit:g} s (run.step_timeout); stacks are in {path}; "
                "the last checkpoint is whole, and the same command goes on from it"
            )
            try:
                dump_stacks(path, self._message)
            except OSError as error:
                self._message += f" (they could not be written: {error})"
            if self._done.is_set():  # it went on while the stacks were taken
                return
            signal.pthread_kill(threading.main_thread().ident, WAKE)
            if not self._done.wait(self._unwind):
                os.write(2, f"error: {self._message}; the driver did not wake up and was ended\n".encode())
                self._give_up(1)
            return


def dump_stacks(path: Path, title: str) -> None:
    """Writes the stacks of this process's threads, and of the workers below it where py-spy is installed.

    Workers of other hosts, and those of a Ray cluster that this process did not start, are not below it.
    """
    with open(path, "w") as file:
        file.write(f"{title}\n\n=== driver, pid {os.getpid()}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0, os.SEEK_END)
        tool = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
        if tool is None:
            file.write("\nworkers: py-spy is not installed, so their stacks are not here\n")
            return
        workers = [p for p in _family() if "ray::" in p[1] or "EngineCore" in p[1] or "python" in p[1]]
        file.write(f"\n{len(workers)} worker processes below the driver on this host\n")
        for pid, name in workers[:MOST_WORKERS]:
            file.write(f"\n=== {name}, pid {pid}\n{_stack_of(tool, pid)}")
            file.flush()


def _family() -> list[tuple[int, str]]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found.append((process.pid, " ".join(process.cmdline())[:120] or process.name()))
        except psutil.Error:  # it has ended
            continue
    return found


def _stack_of(tool: str, pid: int) -> str:
    try:
        done = subprocess.run(
            [tool, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=SECONDS_FOR_A_STACK, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no stack within {SECONDS_FOR_A_STACK:g} s\n"
    return done.stdout if done.returncode == 0 else f"no stack: {done.stderr.strip()}\n"
