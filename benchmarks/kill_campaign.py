"""Kill a run again and again, resume it, and hold it against one that was left alone.

    python -m benchmarks.kill_campaign --out FOLDER [--kills 20] [--steps 24] [--seed 0] [key=value ...]

SIGKILL goes to the driver, to a model worker or to vLLM, at a random phase of a step (or of the start) a step or two
after the last checkpoint. The same command is then started again, until the kills are used up and the run is done.
Both runs replay the same rollouts (verl's rollout skip), which the one left alone records, so that their weights have
to agree bit for bit: every step's fingerprint of student and teacher is compared, and every step has to stand in
metrics.jsonl once.

A run that is not done is gone on with by the same command; FOLDER/kills.jsonl has a line a kill, FOLDER/report.json
the result. A driver that does not end by itself within --patience seconds after a kill is ended as the supervisor does
it, and counted. Exit code 0 where everything agrees.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from recipe.driver_process import DriverProcess
from recipe.run_files import read_json_lines
from verl_ext.atomic import write_atomically
from verl_ext.heartbeat import FILE, ROLLOUT, SAVE, START, SYNC, UPDATE, VALIDATE, VARIABLE, read_beat

# What Ray and vLLM call their processes.
TITLES = {"driver": (), "worker": ("ray::WorkerDict", "ray::DistillWorker"), "vllm": ("VLLM::",)}
PHASES = (START, ROLLOUT, UPDATE, SAVE, SYNC, VALIDATE)
POLL = 0.05


@dataclass
class Kill:
    """One kill: where it was meant to be, where it was, and what came of it."""

    target: str
    phase: str
    steps_on: int
    step: int = 0
    found: str = ""
    killed: str = ""
    code: int | None = None
    ended_by_itself: bool = False
    seconds_to_end: float = 0.0
    left_behind: int = 0


def plan(kills: int, seed: int) -> list[Kill]:
    """The kills of a campaign: targets in turn, phase and distance at random."""
    numbers = random.Random(seed)
    targets = list(TITLES)
    return [Kill(targets[i % len(targets)], numbers.choice(PHASES), numbers.randint(1, 2)) for i in range(kills)]


def command(out: Path, name: str, steps: int, overrides: Sequence[str]) -> list[str]:
    """The run of a campaign, in ``out``/``name``."""
    replayed = str(list(range(1, steps + 1))).replace(" ", "")
    return [
        sys.executable, "-m", "recipe.train", "model=tiny", "data=tiny_world", "hardware=cpu", "method=sdpo",
        f"run.steps={steps}", "run.save_every=1", "run.val_before=false", "run.val_every=3", "run.val_samples=1",
        "run.start_over=true", "data.train_batch_size=6", "distill.fingerprints=true",
        "trainer.experiment_name=replay", "skip.rollout_tq.enable=true", f"skip.rollout_tq.dump_dir={out}/rollouts",
        f"skip.rollout_tq.steps={replayed}", *overrides, f"run.output_dir={out / name}",
    ]  # fmt: skip


def start(out: Path, name: str, steps: int, overrides: Sequence[str]) -> tuple[DriverProcess, Path]:
    """A driver and the file of its heartbeat; what it prints goes to ``out``/``name``.txt."""
    heartbeat = out / f"{name}-{FILE}"
    heartbeat.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(out / f"{name}.txt", "ab") as printed:
        driver = DriverProcess(
            command(out, name, steps, overrides), environment | {VARIABLE: str(heartbeat)}, output=printed
        )
    return driver, heartbeat


def run_to_the_end(out: Path, name: str, steps: int, overrides: Sequence[str]) -> int:
    """Starts the run, or goes on with it; returns its exit code."""
    driver, _ = start(out, name, steps, overrides)
    try:
        while (code := driver.poll()) is None:
            time.sleep(1)
    finally:
        if driver.poll() is None:
            driver.end()
        driver.sweep()
    return code


def kill_once(out: Path, name: str, steps: int, overrides: Sequence[str], kill: Kill, patience: float) -> bool:
    """One attempt with its kill; False where the run was done before."""
    driver, heartbeat = start(out, name, steps, overrides)
    try:
        if not await_moment(driver, heartbeat, kill):
            return False
        victim = find(driver.pid, kill.target)
        if victim is None:  # not there yet, or between two lives
            kill.target, victim = f"driver instead of {kill.target}", psutil.Process(driver.pid)
        kill.killed = " ".join(victim.cmdline())[:60]
        victim.send_signal(signal.SIGKILL)
        struck = time.monotonic()
        while (code := driver.poll()) is None and time.monotonic() - struck < patience:
            time.sleep(POLL)
        kill.ended_by_itself = code is not None
        kill.code = driver.end() if code is None else code
        kill.seconds_to_end = round(time.monotonic() - struck, 1)
        return True
    finally:
        if driver.poll() is None:
            driver.end()
        kill.left_behind = len(driver.sweep())


def await_moment(driver: DriverProcess, heartbeat: Path, kill: Kill) -> bool:
    """Waits for the phase; at the latest for the step after it. False where the driver ended before."""
    first = None
    delay = random.Random(f"{kill.phase}{kill.steps_on}").random()
    while driver.poll() is None:
        beat = read_beat(heartbeat)
        if beat is not None:
            first = beat.saved if first is None else first
            kill.step, kill.found = beat.step, beat.phase
            there = kill.phase == START or (beat.step >= first + kill.steps_on and beat.phase == kill.phase)
            if there or beat.step > first + kill.steps_on:
                # The start takes long, a phase of a tiny step does not.
                time.sleep(delay * (20 if beat.phase == START else 0.3))
                return driver.poll() is None
        time.sleep(POLL)
    return False


def find(pid: int, target: str) -> psutil.Process | None:
    """The driver, or a process below it of the target's kind."""
    if target == "driver":
        return psutil.Process(pid)
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(TITLES[target]):
                return process
        except psutil.Error:  # it has ended
            continue
    return None


def compare(alone: Path, killed: Path, steps: int) -> dict[str, Any]:
    """Rows and fingerprints of two runs, from the lines of metrics.jsonl as they stand there."""
    rows = {name: read_json_lines(folder / "metrics.jsonl") for name, folder in (("alone", alone), ("killed", killed))}
    counts = Counter(row["step"] for row in rows["killed"] if row["step"] > 0)
    before = {row["step"]: row for row in rows["alone"]}
    after = {row["step"]: row for row in rows["killed"]}
    different, recovered, compared = [], [], 0
    for step in range(1, steps + 1):
        names = [name for name in before.get(step, {}) if name.startswith("fingerprint/")]
        row = after.get(step, {})
        if row and step < steps and not any(name in row for name in names):
            # Killed between checkpoint and row: the kept row is from before the fingerprints. The next step's tell.
            recovered.append(step)
            continue
        compared += len(names)
        if not names or any(before[step][name] != row.get(name) for name in names):
            different.append(step)
    return {
        "steps": steps,
        "steps_lost": [step for step in range(1, steps + 1) if not counts[step]],
        "steps_doubled": sorted(step for step, count in counts.items() if count > 1),
        "fingerprints_compared": compared,
        "rows_recovered": recovered,
        "steps_with_other_weights": different,
        "losses_equal": all(before[step].get("loss") == after.get(step, {}).get("loss") for step in before if step > 0),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=180.0, help="seconds a driver may take to notice (180)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args(arguments)
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    done = out / "kills.jsonl"

    if not (out / "alone" / "summary.json").exists():
        say("the run that is left alone")
        if code := run_to_the_end(out, "alone", given.steps, given.overrides):
            say(f"it ended with {code}; see {out}/alone.txt")
            return 1
    kills = [Kill(**row) for row in read_json_lines(done)] if done.exists() else []
    for number, kill in enumerate(plan(given.kills, given.seed)[len(kills) :], len(kills) + 1):
        if not kill_once(out, "killed", given.steps, given.overrides, kill, given.patience):
            say(f"the run ended before kill {number}: more --steps for so many kills")
            break
        kills.append(kill)
        with open(done, "a") as file:
            file.write(json.dumps(asdict(kill)) + "\n")
        say(
            f"kill {number} of {given.kills}: {kill.target} in {kill.found} of step {kill.step}; code {kill.code} "
            f"after {kill.seconds_to_end} s" + ("" if kill.ended_by_itself else " (ended, it hung)")
        )
    code = 0
    if not (out / "killed" / "summary.json").exists():
        code = run_to_the_end(out, "killed", given.steps, given.overrides)
    report = {
        "kills": len(kills),
        "by_target": dict(Counter(kill.target for kill in kills)),
        "by_phase": dict(Counter(kill.found for kill in kills)),
        "hung": sum(not kill.ended_by_itself for kill in kills),
        "left_behind": sum(kill.left_behind for kill in kills),
        "last_code": code,
        **compare(out / "alone", out / "killed", given.steps),
    }
    good = code == 0 and report["losses_equal"] and not any(
        report[key] for key in ("steps_lost", "steps_doubled", "steps_with_other_weights")
    )  # fmt: skip
    write_atomically(out / "report.json", json.dumps(report | {"good": good}, indent=2) + "\n")
    print(json.dumps(report | {"good": good}))
    return 0 if good else 1


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
