"""What a training run prints, as pure functions: the line of a step, durations, and the part of a log worth showing."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recipe.run_files import as_number

MISSING = "-"
DEFAULT_WIDTH = 120  # a pipe or a file has no width of its own


def format_seconds(seconds: float | None) -> str:
    """A duration a person can read: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``1 h 02 min``, ``2 d 03 h``."""
    value = as_number(seconds)
    if value is None or value < 0:
        return MISSING
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // (24 * 60)} d {minutes // 60 % 24:02d} h"


def format_number(value: Any, digits: int = 4) -> str:
    """A number in few characters: about ``digits`` significant digits, in scientific form where that is shorter."""
    number = as_number(value)
    if number is None:
        return MISSING
    size = abs(number)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e6:
        return f"{number:.{max(digits - 3, 0)}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{number:.{min(decimals, digits)}f}"


@dataclass(frozen=True)
class Column:
    """One column of the step line. Where the terminal is narrow, the column of the highest rank is left out first."""

    title: str
    width: int
    render: Callable[[Mapping[str, Any]], str]
    rank: int


def _metric(key: str, digits: int = 4) -> Callable[[Mapping[str, Any]], str]:
    return lambda metrics: format_number(metrics.get(key), digits)


def _fixed(key: str, decimals: int) -> Callable[[Mapping[str, Any]], str]:
    def render(metrics: Mapping[str, Any]) -> str:
        number = as_number(metrics.get(key))
        return MISSING if number is None else f"{number:.{decimals}f}"

    return render


def _seconds(key: str) -> Callable[[Mapping[str, Any]], str]:
    def render(metrics: Mapping[str, Any]) -> str:
        number = as_number(metrics.get(key))
        return MISSING if number is None else f"{number:.1f}" if number < 99.95 else f"{number:.0f}"

    return render


def _pass_rate(metrics: Mapping[str, Any]) -> str:
    mean, spread = as_number(metrics.get("pass_rate/mean")), as_number(metrics.get("pass_rate/std"))
    if mean is None:
        return MISSING
    return f"{mean:.2f}" if spread is None else f"{mean:.2f}±{spread:.2f}"


def _train_share(metrics: Mapping[str, Any]) -> str:
    share = as_number(metrics.get("rows/train_share"))
    return MISSING if share is None else f"{100 * share:.0f}%"


def _validation(metrics: Mapping[str, Any]) -> str:
    key = validation_key(metrics)
    return "" if key is None else f"{float(metrics[key]):.3f}"


def validation_key(metrics: Mapping[str, Any]) -> str | None:
    """The validation metric to show: ``val/mean@k`` with the largest k, else ``val/maj@k``, else None."""
    best: tuple[int, int, str] | None = None
    for key, value in metrics.items():
        match = re.fullmatch(r"val/(?:.+/)?(mean|maj)@(\d+)", str(key))
        if match and as_number(value) is not None:
            candidate = (match[1] == "mean", int(match[2]), key)
            best = candidate if best is None or candidate[:2] > best[:2] else best
    return None if best is None else best[2]


def _loss(metrics: Mapping[str, Any]) -> str:
    """The distillation loss; without distillation the policy loss."""
    return _metric("distill/loss" if "distill/loss" in metrics else "loss")(metrics)


COLUMNS = (
    Column("loss", 8, _loss, 0),
    Column("reward", 6, _fixed("reward/mean", 3), 1),
    Column("pass rate", 9, _pass_rate, 2),
    Column("rows", 5, _train_share, 3),
    Column("ESS", 5, _metric("weight/effective_sample_size", 3), 4),
    Column("gap", 7, _metric("teacher/gap", 3), 5),
    Column("val", 5, _validation, 6),
    Column("sec", 5, _seconds("time/step"), 7),
    Column("roll", 5, _seconds("time/rollout"), 9),
    Column("stud", 5, _seconds("time/student_pass"), 11),
    Column("teach", 5, _seconds("time/teacher_pass"), 12),
    Column("upd", 5, _seconds("time/update"), 10),
    Column("sync", 5, _seconds("time/weight_sync"), 13),
)
LEGEND = (
    "rows: share that trains · ESS: effective sample size, in questions · gap: teacher minus student · "
    "sec: step, then its phases"
)
_LEFT_WIDTH = 11


def _layout(total_steps: int, width: int | None, with_left: bool) -> tuple[int, list[Column], bool]:
    width = DEFAULT_WIDTH if width is None else width
    step_width = max(4, 2 * len(str(total_steps)) + 1)
    columns = list(COLUMNS)

    def needed() -> int:
        return step_width + sum(column.width + 1 for column in columns) + (_LEFT_WIDTH + 1 if with_left else 0)

    while len(columns) > 1 and needed() > width:
        columns.remove(max(columns, key=lambda column: column.rank))
    return step_width, columns, with_left


def format_header(total_steps: int, width: int | None = None, with_left: bool = True) -> str:
    """The titles above the step lines."""
    step_width, columns, with_left = _layout(total_steps, width, with_left)
    cells = ["step".rjust(step_width)] + [column.title.rjust(column.width) for column in columns]
    return " ".join(cells + (["time left".rjust(_LEFT_WIDTH)] if with_left else []))


def format_step_line(
    metrics: Mapping[str, Any],
    total_steps: int,
    eta: float | None,
    width: int | None = None,
    with_left: bool = True,
) -> str:
    """One step in fixed columns: ``-`` for what was not measured, blank for validation on steps without one."""
    step_width, columns, with_left = _layout(total_steps, width, with_left)
    cells = [f"{metrics.get('step', '?')}/{total_steps}".rjust(step_width)]
    cells += [column.render(metrics).rjust(column.width) for column in columns]
    return " ".join(cells + ([format_seconds(eta).rjust(_LEFT_WIDTH)] if with_left else [])).rstrip()


class StepClock:
    """Estimates the time left from the recent steps, so that a slow first step does not spoil it for long."""

    def __init__(self, total_steps: int, window: int = 20) -> None:
        self.total_steps = total_steps
        self._recent: deque[float] = deque(maxlen=window)
        self._last_time: float | None = None

    def add(self, step: int, now: float, measured: float | None) -> float | None:
        """Record that ``step`` ended at ``now``; ``measured`` is the trainer's own figure. Returns the seconds left."""
        between = None if self._last_time is None else now - self._last_time
        self._last_time = now
        # The time between lines also covers validation and checkpoints, the trainer's figure covers the first step.
        candidates = [value for value in (between, measured) if value is not None]
        if step > 0 and candidates:  # step 0 is the validation before training
            self._recent.append(max(candidates))
        return self.left(step)

    def left(self, step: int) -> float | None:
        """Seconds from the end of ``step`` to the end of the run; None before the first step."""
        if not self._recent:
            return None
        return max(0, self.total_steps - step) * sum(self._recent) / len(self._recent)


# --- the part of a log worth showing ----------------------------------------------------------------------------------

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_RAY_PREFIX = re.compile(r"^\((?=[^)]*\b(?:pid|ip)=)[^)]*\)\s?")
_REPEATED = re.compile(r"\s*\[repeated \d+x across cluster\].*$")
_NOISE = re.compile(
    r"\b(WARNING|WARN|INFO|DEBUG)\b|\w*Warning\b|warnings\.warn|\d+%\||it/s\b|s/it\b|^=== |^Exception ignored in\b",
    re.ASCII,
)
_ERROR = re.compile(
    r"\b(ERROR|CRITICAL|FATAL|Fatal|Killed|Aborted|SIGKILL|SIGSEGV)\b|\b[Ee]rror:|\w*(?:Error|Exception)\b(?=:|$)"
    r"|out of memory|No space left|Segmentation fault|core dumped|died unexpectedly"
)
_TRACE_START = re.compile(r"^Traceback \(most recent call last\)|^ray::\S+")


def clean_line(line: str) -> str:
    """A line without colours and control characters, and of a redrawn progress bar only its last state."""
    line = _ANSI.sub("", line.rstrip("\r\n"))
    return _CONTROL.sub("", line.rsplit("\r", 1)[-1].replace("\t", "    ")).rstrip()


def relevant_lines(lines: Iterable[str], limit: int = 25, errors_only: bool = False) -> list[str]:
    """The lines of a log that explain a failure: tracebacks and errors, else all but warnings, else the end.

    The same line from several workers is shown once. With ``errors_only`` there is no second choice.
    """
    important: list[str] = []
    other: list[str] = []
    everything: deque[str] = deque(maxlen=limit)
    in_trace = False
    for raw in lines:
        line = _REPEATED.sub("", _RAY_PREFIX.sub("", clean_line(raw)))
        if not line.strip():
            continue
        everything.append(line)
        if _TRACE_START.match(line):
            in_trace = True
            important.append(line)
        elif in_trace:
            important.append(line)
            in_trace = line.startswith(" ")  # the first line that is not indented is the exception itself
        elif _ERROR.search(line) and not _NOISE.search(line):
            important.append(line)
        elif not _NOISE.search(line):
            other.append(line)
    for candidates in (important,) if errors_only else (important, other):
        if candidates:
            return _without_repeats(candidates)[-limit:]
    return [] if errors_only else list(everything)


def _without_repeats(lines: list[str]) -> list[str]:
    """Workers fail together: of identical trace blocks and identical single lines keep the last."""
    blocks: list[tuple[str, ...]] = []
    current: list[str] = []
    for line in lines:
        if _TRACE_START.match(line) and current:
            blocks.append(tuple(current))
            current = []
        current.append(line)
        if not line.startswith(" ") and not _TRACE_START.match(line):
            blocks.append(tuple(current))
            current = []
    if current:
        blocks.append(tuple(current))
    last = {block: index for index, block in enumerate(blocks)}
    return [line for index, block in enumerate(blocks) if last[block] == index for line in block]
