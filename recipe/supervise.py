"""Watch a run from outside: `python -m recipe.supervise -- python -m recipe.train … run.output_dir=DIR`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipe.attempts import (
    ATTEMPTS,
    INTERRUPTED_EXIT,
    REFUSED_EXIT,
    Attempt,
    Progress,
    decide,
    outcome_of,
    overdue,
    read_attempts,
)
from recipe.driver_process import SECONDS_TO_END, SECONDS_TO_LEAVE, DriverProcess
from verl_ext.heartbeat import (
    END,
    FILE,
    ROLLOUT,
    SAMPLE,
    SAVE,
    START,
    SYNC,
    UPDATE,
    VALIDATE,
    VARIABLE,
    read_beat,
)
from verl_ext.preemption import REQUEUE_EXIT

HELP = """Run a command, end it where it hangs or lost a node, and start it again or ask for a requeue.

  python -m recipe.supervise [options] -- python -m recipe.train [key=value ...] run.output_dir=DIR

The command (also recipe.sft, or a script that ends in one of them) must name its folder by run.output_dir=, sft.out= or
--folder here: what is started again goes on from the checkpoints there.

Ended is a driver that
  - makes no progress: every phase of a step has a limit (--limit), and DIR/heartbeat.json says where it is;
  - lost a node: with RAY_ADDRESS set, a node that was alive at launch and is not any more, or a control service that
    does not answer.
It gets SIGTERM, after 15 s (5 s where a node is lost) its group gets SIGKILL, and what it left on this host is ended.
SIGUSR1, SIGTERM and SIGINT are passed on to it.

Exit code: 0 done; 2 refused, never repeated; 75 preempted, hung or without a node: requeue; 130 after Ctrl-C; 1 after
--attempts failures in a row without a new checkpoint; otherwise, with no restart left, the driver's own.
DIR/attempts.jsonl has a line for every attempt.
"""

LIMITS: dict[str, float] = {
    # Seconds. Longer than run.step_timeout, whose message has the stacks.
    START: 3600, ROLLOUT: 9000, UPDATE: 9000, SAVE: 9000, SYNC: 9000, VALIDATE: 9000, SAMPLE: 86400, END: 1800,
}  # fmt: skip
FOLDER_KEYS = ("run.output_dir=", "sft.out=")
PASSED_ON = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


@dataclass
class Settings:
    """Of one supervisor; seconds.

    Attributes:
        to_end: between SIGTERM and SIGKILL; ``to_end_lost``: of a driver without one of its nodes, which cannot finish
            the step that it would save.
        to_notice: that Ray may take to declare a node dead whose loss the driver died of.
    """

    folder: Path
    restarts: int = 2
    most_failures: int = 3
    poll: float = 1.0
    pause: float = 5.0
    to_end: float = SECONDS_TO_END
    to_end_lost: float = 5.0
    to_notice: float = 20.0
    to_leave: float = SECONDS_TO_LEAVE
    limits: Mapping[str, float] = field(default_factory=lambda: dict(LIMITS))
    address: str | None = None


class Supervisor:
    """Runs a command until it is done or may not be repeated here."""

    def __init__(self, command: Sequence[str], settings: Settings) -> None:
        self.command, self.settings = list(command), settings
        self._driver: DriverProcess | None = None
        self._signals: list[int] = []
        self._heartbeat = settings.folder / FILE

    def run(self) -> int:
        """Returns the exit code. Main thread only."""
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        settings = self.settings
        settings.folder.mkdir(parents=True, exist_ok=True)
        attempts, restarts = read_attempts(settings.folder / ATTEMPTS), settings.restarts
        while True:
            attempt = self._attempt(again=bool(attempts))
            attempts.append(attempt)
            with open(settings.folder / ATTEMPTS, "a") as file:
                file.write(json.dumps(asdict(attempt) | {"ended": time.time()}) + "\n")
            decision = decide(
                attempts,
                restarts_left=restarts,
                most_failures=settings.most_failures,
                joined=settings.address is not None,
            )
            say(decision.message)
            if decision.code is not None:
                return decision.code
            restarts -= 1
            time.sleep(settings.pause)
            if self._signals:
                say("a signal came between two attempts")
                return INTERRUPTED_EXIT if signal.SIGINT in self._signals else REQUEUE_EXIT

    def _attempt(self, *, again: bool) -> Attempt:
        settings = self.settings
        self._heartbeat.unlink(missing_ok=True)
        watch = None
        if settings.address is not None:
            from verl_ext.ray_nodes import NodeWatch

            watch = NodeWatch.of(settings.address)
        # Only a folder that an attempt of ours began may be begun anew.
        command = self.command + (["run.start_over=true"] if again and self._trains() else [])
        started = time.monotonic()
        progress = Progress()
        driver = self._driver = DriverProcess(command, os.environ | {VARIABLE: str(self._heartbeat.absolute())})
        say(f"driver {driver.pid}: {' '.join(command)}")
        for number in self._signals:  # those that came while it was started
            driver.send(number)
        try:
            outcome, code, reason = self._watch(driver, watch, progress, started)
        finally:
            self._driver = None
            if watch is not None:
                watch.end()
            left = driver.sweep(seconds=settings.to_leave)
            if left:
                say(f"ended what the driver left behind: {', '.join(left)}")
        last = progress.last
        return Attempt(
            outcome=outcome,
            code=code,
            reason=reason,
            step=last.step if last else 0,
            saved=last.saved if last else 0,
            progress=progress.made,
            seconds=round(time.monotonic() - started, 1),
        )

    def _watch(self, driver: DriverProcess, watch: Any, progress: Progress, started: float) -> tuple[str, int, str]:
        settings = self.settings
        while True:
            progress.see(read_beat(self._heartbeat))
            code = driver.poll()
            if code is not None:
                outcome = outcome_of(code, signalled=bool(self._signals))
                # Calls to a lost node may fail before Ray says that it is lost. Started again here, the driver would be
                # refused for want of devices, and the job fail.
                if outcome == "failed" and watch is not None and (gone := self._noticed(watch)) is not None:
                    return "lost", code, f"{gone}; the driver failed of it (exit code {code})"
                how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
                return outcome, code, f"{outcome} ({how})"
            if (hung := overdue(progress.last, started, settings.limits, time.monotonic())) is not None:
                say(f"{hung}: ending the driver")
                return "hung", driver.end(seconds=settings.to_end), hung
            if watch is not None and (gone := watch.lost()) is not None:
                say(f"{gone}: ending the driver")
                return "lost", driver.end(seconds=settings.to_end_lost), gone
            time.sleep(settings.poll)

    def _noticed(self, watch: Any) -> str | None:
        """What was lost, where it is known within ``to_notice`` seconds or before a signal comes."""
        deadline = time.monotonic() + self.settings.to_notice
        while (gone := watch.lost()) is None and time.monotonic() < deadline and not self._signals:
            time.sleep(self.settings.poll)
        return gone

    def _trains(self) -> bool:
        return any(word.startswith(FOLDER_KEYS[0]) for word in self.command)

    def _pass_on(self, number: int, frame: object) -> None:
        self._signals.append(number)
        if self._driver is not None:
            self._driver.send(number)


def folder_of(command: Sequence[str]) -> Path | None:
    """The folder that the command's last override names."""
    found = [word.split("=", 1)[1] for word in command if word.startswith(FOLDER_KEYS)]
    return Path(found[-1].strip("'\"")) if found else None


def say(text: str) -> None:
    """One line on standard error: standard output belongs to the run."""
    print(f"[supervisor] {text}", file=sys.stderr, flush=True)


def _limit(text: str) -> tuple[str, float]:
    phase, _, seconds = text.partition("=")
    if phase not in LIMITS:
        raise argparse.ArgumentTypeError(f"{phase!r} is no phase; there are {', '.join(LIMITS)}")
    try:
        value = float(seconds)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {phase}=SECONDS, above 0")
    return phase, value


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m recipe.supervise", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--folder", type=Path, help="the run's folder, where the command does not name it")
    made.add_argument("--restarts", type=_whole, default=2, metavar="N", help="starts after the first (2)")
    made.add_argument("--attempts", type=_whole, default=3, metavar="M", help="failures in a row without progress (3)")
    made.add_argument(
        "--limit", type=_limit, action="append", default=[], metavar="PHASE=S",
        help="seconds a phase may take; " + ", ".join(f"{phase} {limit:g}" for phase, limit in LIMITS.items()),
    )  # fmt: skip
    made.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    given = parser().parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        print("error: no command; see python -m recipe.supervise --help", file=sys.stderr)
        return REFUSED_EXIT
    folder = given.folder or folder_of(command)
    if folder is None:
        print("error: the command names no run.output_dir= or sft.out=; add it, or --folder DIR", file=sys.stderr)
        return REFUSED_EXIT
    settings = Settings(
        folder=folder,
        restarts=given.restarts,
        most_failures=max(1, given.attempts),
        limits=LIMITS | dict(given.limit),
        address=os.environ.get("RAY_ADDRESS") or None,
    )
    try:
        return Supervisor(command, settings).run()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED_EXIT


if __name__ == "__main__":
    sys.exit(main())
