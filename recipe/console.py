"""The terminal of a training run: few readable lines for the person, everything else in a log file.

Ray, vLLM and NCCL write from threads, from C and from child processes, so replacing ``sys.stdout`` is not enough: the
file descriptors 1 and 2 themselves point to the log while the console is open, and the console keeps a private
duplicate of the real ones for its own lines.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from recipe.console_format import (
    LEGEND,
    StepClock,
    clean_line,
    format_header,
    format_seconds,
    format_step_line,
    relevant_lines,
)
from recipe.console_redirect import close_quietly, descriptor_of, flush, redirect_descriptors
from recipe.run_files import as_number, json_line, to_plain
from verl_ext.preemption import Preempted

__all__ = ["RunConsole", "format_header", "format_seconds", "format_step_line"]

_HEADER_EVERY = 20
_MAX_NOTES = 12  # start-up lines and notes; with 40 steps the whole output stays under 60 lines
_LOG_TAIL_BYTES = 2_000_000
_SECONDS_BETWEEN_SIGNS = 60.0

# Open consoles, outermost first: an inner run prints where the outer one does and not into the outer one's log.
_open_consoles: list[RunConsole] = []


class RunConsole:
    """Context manager that owns the terminal for one run. Consoles may be nested and used any number of times.

    On a terminal it keeps a progress bar with the time left under one line per step; into a pipe or file it writes
    plain lines, flushed one by one. An exception that leaves the block is explained (``failure``), once.
    """

    def __init__(
        self,
        log_path: str | os.PathLike[str],
        total_steps: int,
        quiet: bool = False,
        *,
        start_step: int = 0,
        unit: str = "step",
        terminal: bool | None = None,
        width: int | None = None,
        tail_lines: int = 25,
    ) -> None:
        """``quiet`` leaves only the summary and failures; ``start_step`` is the checkpoint's step of a resumed run.

        ``unit`` names what is counted, ``terminal`` and ``width`` override what is found by looking at standard output.
        """
        self.log_path = Path(log_path)
        self.total_steps = total_steps
        self.quiet = quiet
        self.start_step = start_step
        self.unit = unit
        self.tail_lines = tail_lines
        self._terminal_wanted = terminal
        self._width_wanted = width
        self._lock = threading.RLock()
        self._cleanup: contextlib.ExitStack | None = None
        self._out: TextIO | None = None
        self._err: TextIO | None = None
        self._log_fd = -1
        self._log_start = 0
        self._progress: Any = None
        self._task: Any = None
        self._pid = -1
        self._reset()

    def _reset(self) -> None:
        self._started = time.monotonic()
        self._clock = StepClock(self.total_steps)
        self._deadline: float | None = None
        self._last_step = self.start_step
        self._step_lines = 0
        self._notes = 0
        self._summary_printed = False
        self._failed: BaseException | None = None
        self._reader_gone = False
        self._worked = self._started

    # --- opening and closing ------------------------------------------------------------------------------------------

    def __enter__(self) -> RunConsole:
        if self._cleanup is not None:
            raise RuntimeError("this RunConsole is already open; make a second one for a run inside a run")
        self._reset()
        self._pid = os.getpid()
        with contextlib.ExitStack() as stack:
            # Everything that can fail comes before the first redirection, and the stack undoes what was done.
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log_fd = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            stack.callback(os.close, self._log_fd)
            self._log_start = os.fstat(self._log_fd).st_size
            self._find_streams(stack)
            self._to_log(time.strftime("=== run started %Y-%m-%d %H:%M:%S %z ==="))
            if _open_consoles:
                outer = _open_consoles[-1]
                outer._pause()
                stack.callback(outer._resume)
            redirect_descriptors(self._log_fd, stack)
            _open_consoles.append(self)
            stack.callback(_open_consoles.remove, self)
            if self._is_terminal() and not self.quiet:
                self._start_progress()
                stack.callback(self._stop_progress)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._cleanup is None or os.getpid() != self._pid:
            return  # a forked child that unwinds through the block must not touch its parent's terminal
        try:
            with self._lock:
                self._stop_progress()
                if error is not None and self._failed is not error:
                    if isinstance(error, Exception):
                        self.failure(error)
                    elif isinstance(error, KeyboardInterrupt):
                        preempted = isinstance(error, Preempted)
                        done = f"{f'ended by {error}' if preempted else 'interrupted'} after {self.unit} "
                        done += f"{self._last_step} of {self.total_steps}"
                        done += "; the same command goes on from the last checkpoint" if preempted else ""
                        self._write(self._err, f"{done}; log: {self.log_path}")
        finally:
            cleanup, self._cleanup = self._cleanup, None
            with self._lock:
                cleanup.close()
                self._out = self._err = None
                self._log_fd = -1

    def _find_streams(self, stack: contextlib.ExitStack) -> None:
        """Our lines go to the outer console's streams, a replaced ``sys.stdout``, or a duplicate of the real one."""
        if _open_consoles:
            self._out, self._err = _open_consoles[-1]._out, _open_consoles[-1]._err
            return
        streams: list[TextIO] = []
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            if stream is not None and descriptor_of(stream) != descriptor:
                # A notebook, a capturing test, contextlib.redirect_stdout: whoever replaced it wants our lines.
                streams.append(stream)
                continue
            encoding = getattr(stream, "encoding", None) or "utf-8"
            copy = open(os.dup(descriptor), "w", encoding=encoding, errors="replace", buffering=1)  # noqa: SIM115
            stack.callback(close_quietly, copy)
            streams.append(copy)
        self._out, self._err = streams

    def _is_terminal(self) -> bool:
        if self._terminal_wanted is not None:
            return self._terminal_wanted
        try:
            return bool(self._out and self._out.isatty()) and os.environ.get("TERM") != "dumb"
        except ValueError:
            return False

    def _width(self) -> int | None:
        if self._width_wanted is not None:
            return self._width_wanted
        if self._out is not None and self._is_terminal():
            with contextlib.suppress(OSError, ValueError):
                # The private duplicate is asked, since descriptor 1 is the log now. A terminal may report 0 columns.
                return os.get_terminal_size(self._out.fileno()).columns or None
        return None

    # --- the bar ------------------------------------------------------------------------------------------------------

    def _start_progress(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
        from rich.text import Text

        owner = self

        class TimeLeft(ProgressColumn):
            """Counts down between steps, which rich's own estimate does not do when a step takes minutes."""

            def render(self, task: Any) -> Text:
                if owner._deadline is None:
                    return Text(f"{format_seconds(time.monotonic() - owner._started)} so far", style="dim")
                return Text(f"{format_seconds(max(0, owner._deadline - time.monotonic()))} left")

        class QuietConsole(Console):
            def on_broken_pipe(self) -> None:
                """Rich would end the process; see ``_reader_may_leave``."""
                self.quiet = True

        console = QuietConsole(file=self._out, force_terminal=True, width=self._width(), highlight=False, markup=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeLeft(),
            console=console,
            transient=True,
            refresh_per_second=2,
            redirect_stdout=False,  # rich would replace sys.stdout; the descriptors are ours already
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("starting", total=max(self.total_steps, 1), completed=self.start_step)
        self._progress.start()

    def _stop_progress(self) -> None:
        with self._lock:
            if self._progress is not None:
                progress, self._progress = self._progress, None
                with self._reader_may_leave():
                    progress.stop()

    def _pause(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _resume(self) -> None:
        if self._progress is not None:
            self._progress.start()

    # --- what the trainer calls ---------------------------------------------------------------------------------------

    def phase(self, text: str) -> None:
        """A stage of the start-up, on a line of its own: ``starting Ray``, ``loading the model``."""
        self.status(text)
        self.note(text)

    def note(self, text: str) -> None:
        """A line worth keeping (a checkpoint, a warning). After a dozen the rest goes to the log only."""
        with self._lock:
            line = f"{format_seconds(time.monotonic() - self._started):>10}  {_one_line(text)}"
            self._to_log(line)
            self._notes += 1
            if self._notes <= _MAX_NOTES:
                self._line(line, style="dim")

    def log(self, text: str) -> None:
        """A line for the log only."""
        with self._lock:
            self._to_log(f"{format_seconds(time.monotonic() - self._started):>10}  {_one_line(text)}")

    def text(self, text: str) -> None:
        """Several lines as they are, such as a table."""
        self._to_log(text)
        if not self.quiet:
            self._stop_progress()
            self._write(self._err, text)

    def status(self, text: str) -> None:
        """What is going on now; shown next to the bar where there is one, otherwise nowhere."""
        with self._lock:
            if self._progress is not None:
                self._progress.update(self._task, description=_one_line(text), refresh=True)

    def working(self, text: str, seconds_left: float | None = None) -> None:
        """As :meth:`status`, for work that takes a while: without a bar it is a line every minute."""
        left = "" if seconds_left is None else f", about {format_seconds(seconds_left)} left"
        with self._lock:
            self.status(text + left)
            now = time.monotonic()
            if self._progress is None and now - self._worked >= _SECONDS_BETWEEN_SIGNS:
                self._worked = now
                line = f"{format_seconds(now - self._started):>10}  {_one_line(text)}{left}"
                self._to_log(line)
                self._line(line, style="dim")

    def progress(self, done: int, text: str, seconds_left: float | None = None) -> None:
        """Work that has no steps: moves the bar where there is one, else writes a line (how often is the caller's)."""
        with self._lock:
            self._last_step = done
            self._deadline = None if seconds_left is None else time.monotonic() + seconds_left
            left = "" if seconds_left is None else f"  {format_seconds(seconds_left)} left"
            self._to_log(f"{done}/{self.total_steps}  {_one_line(text)}{left}")
            if self._progress is not None:
                self._progress.update(self._task, completed=done, description=_one_line(text), refresh=True)
            else:
                self._line(f"{done:>10}/{self.total_steps}  {_one_line(text)}{left}")

    def step_line(self, metrics: Mapping[str, Any]) -> str:
        """Print the line of one step (``metrics`` holds ``step``); returns it."""
        with self._lock:
            step = int(metrics.get("step", self._last_step + 1))
            now = time.monotonic()
            eta = self._clock.add(step, now, as_number(metrics.get("time/step")))
            self._deadline = None if eta is None else now + eta
            self._last_step = step
            width, with_left = self._width(), self._progress is None  # the bar already says how much time is left
            many_follow = self.total_steps - step >= 5
            if self._step_lines == 0 or (self._step_lines % _HEADER_EVERY == 0 and many_follow):
                header = format_header(self.total_steps, width, with_left)
                if self._step_lines == 0:
                    self._to_log(LEGEND)
                    self._line(LEGEND, style="dim")
                self._to_log(header)
                self._line(header, style="bold")
            line = format_step_line({**metrics, "step": step}, self.total_steps, eta, width, with_left)
            self._step_lines += 1
            self._to_log(line)
            if self._progress is not None:
                self._progress.update(self._task, completed=step, description="training", refresh=True)
            self._line(line)
            return line

    def failure(self, error: BaseException) -> None:
        """Say on standard error what went wrong, with the lines of this run's log that explain it and its path."""
        with self._lock:
            self._failed = error
            self._stop_progress()
            for stream in (sys.stdout, sys.stderr):
                flush(stream)
            trace = "".join(traceback.format_exception(error)).rstrip()
            # What a worker wrote comes first: the driver's own traceback mostly shows how it waited for that worker.
            shown = relevant_lines(self._log_lines(), self.tail_lines, errors_only=True)
            shown = shown or relevant_lines(trace.split("\n"), self.tail_lines)
            self._to_log(trace)
            counted = self._step_lines or self._last_step > self.start_step
            where = f" after {self.unit} {self._last_step} of {self.total_steps}" if counted else ""
            lines = [f"The run failed{where}: {_headline(error)}"]
            if shown:
                lines += ["", "What explains it, from the log:", *(f"  | {line}" for line in shown)]
            lines += ["", f"Full log: {self.log_path}"]
            self._write(self._err if self._err is not None else sys.stderr, "\n".join(lines))

    def summary(self, values: Mapping[str, Any]) -> str:
        """Print the run's result as one flat JSON object, the last line on standard output; returns it.

        Later lines of this console go to the log, so that the summary stays the last one.
        """
        plain = to_plain(values, "summary")
        nested = [key for key, value in plain.items() if isinstance(value, dict | list)]
        if nested:
            raise ValueError(f"the summary must be flat; these hold several values: {', '.join(nested)}")
        line = json_line(plain, "summary")
        with self._lock:
            self._stop_progress()
            self._to_log(line)
            # Not cut or cleaned like other lines: a program reads it.
            self._write(self._out if self._out is not None else sys.stdout, line, clean=False)
            self._summary_printed = True
        return line

    def urgent(self, text: str) -> None:
        """A line from inside a signal handler: past every lock and buffer that the interrupted code may hold."""
        line = (_one_line(text) + "\n").encode()
        descriptor = descriptor_of(self._err) if self._err is not None else None
        for target in (descriptor, self._log_fd if self._log_fd >= 0 else None):
            if target is not None:
                with contextlib.suppress(OSError):  # nobody reads any more, or a full disk
                    os.write(target, line)

    # --- writing ------------------------------------------------------------------------------------------------------

    def _line(self, text: str, style: str = "") -> None:
        if self.quiet or self._summary_printed or self._out is None:
            return
        if self._progress is None:
            self._write(self._out, text)
            return
        from rich.text import Text

        console = self._progress.console
        if (width := self._width()) is not None:
            console.width = width
        with self._reader_may_leave():
            console.print(Text(clean_line(text), style=style), no_wrap=True, overflow="ellipsis", crop=True)

    def _write(self, stream: TextIO | None, text: str, clean: bool = True) -> None:
        if stream is None:
            return
        if clean:
            text = "\n".join(clean_line(line) for line in text.split("\n"))
        with self._reader_may_leave():
            stream.write(text + "\n")
            stream.flush()

    @contextlib.contextmanager
    def _reader_may_leave(self) -> Iterator[None]:
        """A closed terminal or ``| head`` must not end a run of hours: its lines are in the log as well."""
        try:
            yield
        except OSError as error:
            if not self._reader_gone:
                self._reader_gone = True
                self._to_log(f"standard output cannot be written to any more ({error}); the run goes on")

    def _to_log(self, text: str) -> None:
        if self._log_fd >= 0:
            with contextlib.suppress(OSError):  # a full disk is reported by whoever writes the metrics
                os.write(self._log_fd, (text + "\n").encode("utf-8", errors="replace"))

    def _log_lines(self) -> list[str]:
        """This run's part of the log (a resumed run appends), at most the last two megabytes."""
        try:
            with open(self.log_path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
                return file.read().decode("utf-8", errors="replace").split("\n")
        except OSError as error:
            return [f"(the log cannot be read: {error})"]


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _headline(error: BaseException) -> str:
    """The exception in words; of a remote one, whose message is a whole traceback, only the last line."""
    message = str(error).strip()
    name = type(error).__name__
    if "Traceback (most recent call last)" in message or "ray::" in message:
        return next(line.strip() for line in reversed(message.splitlines()) if line.strip())
    lines = message.splitlines()
    if len(lines) > 12:
        lines = [*lines[:12], f"… ({len(lines) - 12} more lines in the log)"]
    return f"{name}: " + "\n".join(lines) if lines else name
