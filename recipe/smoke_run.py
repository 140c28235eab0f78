"""Steps of a smoke test: commands in order, each with a time limit, its peak memory, and a look at what it left.

A failed step does not end the others, except those that need it. What has passed is kept in a file, so that the same
command later does the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from recipe.console_format import format_seconds, relevant_lines
from recipe.doctor_machine import gpu_memory
from recipe.driver_process import DriverProcess
from recipe.run_files import read_json_object
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError
from verl_ext.redaction import redacted_text

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
RECORD = "results.json"
POLL_SECONDS = 0.5
SAMPLE_SECONDS = 2.0


class SmokeFailure(Exception):
    """A step ended well and did not do what it should have."""


@dataclass(frozen=True)
class Step:
    """A command and what has to be there afterwards.

    ``needs``: steps that must have passed. ``folder``: the command's own output, removed before it is begun anew.
    ``continues``: a step whose output this one goes on with; where this one has to be repeated, that one has too.
    ``codes``: exit codes that ``check`` may judge. ``check``: of the log, returns a line for the table or raises
    SmokeFailure.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: float
    check: Callable[[Path], str]
    needs: tuple[str, ...] = ()
    folder: Path | None = None
    continues: str | None = None
    codes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Result:
    """A row of the table. ``seconds`` are wall-clock, ``peak_bytes`` what the whole device or host held at most."""

    name: str
    status: str
    line: str
    seconds: float | None = None
    peak_bytes: int | None = None


def gpu_bytes(_: int) -> int | None:
    """The fullest GPU of this machine, whoever fills it."""
    return max(gpu_memory("memory.used"), default=None)


def host_bytes(pid: int) -> int | None:
    """Memory of a process and its descendants, without the pages that they share with others."""
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.Error):
                memory = process.memory_info()
                total += memory.rss - memory.shared
    return total or None


class Smoke:
    """The steps of one folder and what has become of them."""

    def __init__(
        self,
        folder: Path,
        steps: Sequence[Step],
        settings: Mapping[str, Any],
        *,
        memory: Callable[[int], int | None],
        say: Callable[[str], None] = print,
    ) -> None:
        """Raises ConfigError: the folder holds the results of other settings."""
        self.folder, self.steps, self.settings = folder, list(steps), dict(settings)
        self.memory, self.say = memory, say
        self.results: dict[str, Result] = {}
        self.record = folder / RECORD
        if self.record.exists():
            found = read_json_object(self.record)
            if found.get("settings") != self.settings:
                before = found.get("settings", {})
                different = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
                raise ConfigError(
                    f"{folder} holds a smoke test with other settings ({', '.join(different)}); "
                    "choose another --out, or remove it"
                )
            self.results = {one["name"]: Result(**one) for one in found["results"]}

    def log(self, step: Step) -> Path:
        """What a step printed."""
        return self.folder / "logs" / f"{step.name}.log"

    def ordered(self) -> list[Result]:
        """One result a step, also for those that were not reached."""
        return [self.results.get(step.name) or Result(step.name, NOT_RUN, "was not reached") for step in self.steps]

    def run(self, environment: Mapping[str, str] = os.environ) -> bool:
        """Whether every step has passed, now or earlier."""
        self.log(self.steps[0]).parent.mkdir(parents=True, exist_ok=True)
        to_do = self._to_do()
        for number, step in enumerate(self.steps, 1):
            head = f"{number}/{len(self.steps)} {step.name}"
            if step.name not in to_do:
                self.say(f"{head}: passed before")
                continue
            missing = [name for name in step.needs if name not in self.results or self.results[name].status != PASSED]
            if missing:
                result = Result(step.name, NOT_RUN, f"needs {', '.join(missing)}")
            else:
                self.say(f"{head}: {step.title} (at most {format_seconds(step.limit)})")
                result = self._one(step, environment)
            self.results[step.name] = result
            self._write()
            took = f", {format_seconds(result.seconds)}" if result.seconds is not None else ""
            self.say(f"{head}: {result.status}{took}: {result.line}")
        return all(result.status == PASSED for result in self.ordered())

    def _to_do(self) -> set[str]:
        """Steps without a pass, those that they continue, and those that need one of them."""
        to_do = {step.name for step in self.steps if self.results.get(step.name, None) is None}
        to_do |= {name for name, result in self.results.items() if result.status != PASSED}
        to_do |= {step.continues for step in self.steps if step.name in to_do and step.continues}
        for step in self.steps:
            if to_do.intersection(step.needs):
                to_do.add(step.name)
        return to_do

    def _one(self, step: Step, environment: Mapping[str, str]) -> Result:
        if step.folder is not None and step.folder.exists():
            shutil.rmtree(step.folder)
        log, started, peak = self.log(step), time.monotonic(), None
        with log.open("wb") as output:
            driver = DriverProcess(step.command, environment, output=output)
            sampled, code, late = 0.0, None, False
            try:
                while (code := driver.poll()) is None and not late:
                    now = time.monotonic()
                    late = now - started > step.limit
                    if now - sampled >= SAMPLE_SECONDS:
                        sampled, held = now, self.memory(driver.pid)
                        peak = max(filter(None, (peak, held)), default=None)
                    time.sleep(POLL_SECONDS)
            finally:
                if code is None:
                    code = driver.end()
                driver.sweep()
        seconds = round(time.monotonic() - started, 1)
        if late:
            line = f"ended after its {format_seconds(step.limit)} (--limit {step.name}=SECONDS): {self._last(log)}"
            return Result(step.name, FAILED, line, seconds, peak)
        if code not in step.codes:
            return Result(step.name, FAILED, f"exit code {code}: {self._last(log)}", seconds, peak)
        try:
            return Result(step.name, PASSED, step.check(log), seconds, peak)
        except SmokeFailure as failure:
            return Result(step.name, FAILED, str(failure), seconds, peak)

    def _last(self, log: Path) -> str:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        refusals = [line for line in lines if line.startswith("error: ")]
        return redacted_text((refusals or relevant_lines(lines, limit=1) or ["nothing was printed"])[-1].strip())

    def _write(self) -> None:
        done = [asdict(result) for result in self.results.values()]
        text = json.dumps({"settings": self.settings, "results": done}, indent=1, ensure_ascii=False)
        write_atomically(self.record, text + "\n")


def table(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """Step, result, seconds, GiB at most, and what it did or what was wrong; for the terminal and a file."""
    head = ("step", "result", "time", "peak GiB", "")
    rows = [
        (
            result.name,
            result.status,
            "" if result.seconds is None else format_seconds(result.seconds),
            "" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.1f}",
            f"{titles[result.name]}: {result.line}",
        )
        for result in results
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(4)]
    lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4])).rstrip()
             for row in (head, *rows)]  # fmt: skip
    return "\n".join(lines) + "\n"


def output_of(command: Sequence[str]) -> str:
    """What a command of the machine says, or why it says nothing."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{' '.join(command)}: {error}\n"
    return done.stdout + done.stderr
