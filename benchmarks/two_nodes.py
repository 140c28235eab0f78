"""Train over two nodes for real, and lose one of them, again and again.

    python -m benchmarks.two_nodes --out FOLDER [--losses raylet:rollout link:update] [--steps 8] [key=value ...]

Two network namespaces are the nodes; scripts/slurm/node.sh runs in each, and the tiny world is trained over both: one
FSDP rank over gloo and one vLLM replica on each. Then the second node is lost: `raylet` is SIGKILL to its raylet,
`link` takes its network away; `rollout` or `update` is the phase of the step (the --save-every-th after a checkpoint).
The supervisor has --seconds to end the driver. The node is brought back and the cluster started again, as a requeue
does: the run has to go on from its last checkpoint and end with every step in metrics.jsonl once.

Needs root (ip netns) and the CPU stack; a few minutes. FOLDER/result.json has the result, FOLDER/launches the logs.
Exit code 0 where everything is as it should be. Whatever happens, the namespaces and all processes in them are removed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.namespaces import (
    Node,
    check_possible,
    end_processes,
    link_down,
    link_up,
    making,
    namespaces,
    new_pair,
    removing,
    run_all,
)
from benchmarks.node_launch import Launch, LaunchSettings, environment, node_command
from benchmarks.node_runs import RUN_COMMAND, check_new, last_line, nodes_amiss, part_taken, say, tiny_run
from benchmarks.run_checks import complaints, run_checks
from recipe.attempts import ATTEMPTS, INTERRUPTED_EXIT, REFUSED_EXIT
from recipe.checkpoints import newest_complete
from recipe.run_files import read_json_lines
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError
from verl_ext.heartbeat import FILE, ROLLOUT, START, UPDATE
from verl_ext.preemption import REQUEUE_EXIT

FAULTS, PHASES = ("raylet", "link"), (ROLLOUT, UPDATE)
DEFAULT_LOSSES = ("raylet:rollout", "link:update")
SECONDS = 30.0
PATIENCE = 300.0
SECONDS_TO_LEAVE = 45.0


@dataclass
class Loss:
    """One loss of the second node: what was planned, and what came of it.

    Attributes:
        fault: raylet (SIGKILL) or link (down).
        phase: of the step in which it came.
        step: that step; 0: it did not come to it.
        driver_seconds: from the loss to the driver's end; None: it had not ended after five minutes.
        exit_seconds: from the loss to the end of the head's node.sh, with whose exit code a job is requeued.
        code: that exit code.
        outcome: of the attempt, by the supervisor; ``reason`` in its words.
        checkpoint: step of the newest whole checkpoint then.
        resumed_from: step that the next launch went on from.
        left_behind: processes that were still in the namespaces after both node.sh had ended, and were killed.
    """

    fault: str
    phase: str
    step: int = 0
    driver_seconds: float | None = None
    exit_seconds: float | None = None
    code: int | None = None
    outcome: str = ""
    reason: str = ""
    checkpoint: int | None = None
    resumed_from: int | None = None
    left_behind: list[str] = field(default_factory=list)

    def amiss(self, seconds: float) -> list[str]:
        """What is not as it should be, in words."""
        name = f"{self.fault} in {self.phase}"
        if not self.step:
            return [f"{name}: the run ended before it"]
        said = []
        if self.driver_seconds is None or self.driver_seconds > seconds:
            took = "did not end" if self.driver_seconds is None else f"ended after {self.driver_seconds} s"
            said.append(f"{name}: the driver {took}, allowed are {seconds:g} s")
        if self.code != REQUEUE_EXIT:
            said.append(f"{name}: exit code {self.code}, not {REQUEUE_EXIT}")
        if self.outcome != "lost":
            said.append(f"{name}: the supervisor calls it {self.outcome!r}, not 'lost'")
        if self.resumed_from != self.checkpoint:
            said.append(f"{name}: went on from {self.resumed_from}, the last checkpoint was {self.checkpoint}")
        return said


def loss_of(text: str) -> Loss:
    """FAULT:PHASE, for argparse."""
    fault, _, phase = text.partition(":")
    if fault not in FAULTS or phase not in PHASES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected FAULT:PHASE, {' or '.join(FAULTS)} and {' or '.join(PHASES)}"
        )
    return Loss(fault, phase)


class Campaign:
    """The launches of one run, with the losses between them."""

    def __init__(self, nodes: Sequence[Node], settings: LaunchSettings, folder: Path, save_every: int) -> None:
        self.nodes, self.settings, self.folder, self.save_every = nodes, settings, folder, save_every
        self.heartbeat = folder / FILE
        self.launches = 0
        self.resumed_from = 0
        self.starts: list[float] = []
        self.parts: list[dict[str, Any]] = []

    def run(self, losses: Sequence[Loss]) -> int | None:
        """To the end, or to the first loss that does not end in a requeue. Returns the last exit code."""
        code: int | None = REQUEUE_EXIT
        before: Loss | None = None
        for loss in [*losses, None]:
            launch = self._start(before)
            if loss is None:
                code = launch.await_end(PATIENCE * 4)
            elif beat := launch.await_beat(
                self.heartbeat, loss.phase, saved=self.resumed_from + 1, steps_on=self.save_every
            ):
                self._lose(launch, loss, beat.step, beat.pid)
                code = loss.code
            else:
                code = launch.await_end(0)
            left = self._leave(launch)
            if loss is not None:
                loss.left_behind = left
            say(f"launch {self.launches - 1} ended with {code}" + (f"; left behind: {', '.join(left)}" if left else ""))
            if loss is not None and loss.fault == "link" and loss.step:
                run_all(link_up(self.nodes[1]))
                say("the link is up again")
            if code != REQUEUE_EXIT:
                break
            before = loss
        return code

    def _start(self, before: Loss | None) -> Launch:
        started = time.monotonic()
        self.heartbeat.unlink(missing_ok=True)
        launch = Launch(self.settings, self.nodes, self.launches)
        self.launches += 1
        say(f"launch {self.launches - 1}: node.sh on {', '.join(node.address for node in self.nodes)}")
        first = launch.await_beat(self.heartbeat, START)
        if before is not None and first is not None:
            before.resumed_from = self.resumed_from = first.saved
            say(f"it goes on from checkpoint {first.saved}")
        if launch.await_beat(self.heartbeat, ROLLOUT) is not None:
            self.starts.append(round(time.monotonic() - started, 1))
            self.parts = part_taken(self.nodes, launch.log_dir)
            say(f"the first rollout began after {self.starts[-1]} s")
        return launch

    def _lose(self, launch: Launch, loss: Loss, step: int, driver: int) -> None:
        second = self.nodes[1]
        if loss.fault == "raylet":
            for process in second.processes("raylet"):
                process.kill()
        else:
            run_all(link_down(second))
        struck = time.monotonic()
        loss.step = step
        say(f"{loss.fault} of {second.address} lost in {loss.phase} of step {step}")
        if launch.await_driver_end(driver, PATIENCE):
            loss.driver_seconds = round(time.monotonic() - struck, 1)
        loss.code = launch.await_end(SECONDS_TO_LEAVE)
        loss.exit_seconds = round(time.monotonic() - struck, 1) if loss.code is not None else None
        attempts = self.folder / ATTEMPTS
        if attempts.exists():
            last = read_json_lines(attempts)[-1]
            loss.outcome, loss.reason = last["outcome"], last["reason"]
        whole = newest_complete(self.folder / "checkpoints")
        loss.checkpoint = whole.step if whole else None
        say(f"the driver ended after {loss.driver_seconds} s, node.sh after {loss.exit_seconds} s: {loss.reason}")

    def _leave(self, launch: Launch) -> list[str]:
        """Waits for both node.sh, then ends what is in the namespaces; returns the names of what had to be."""
        deadline = time.monotonic() + SECONDS_TO_LEAVE
        while any(rank.poll() is None for rank in launch.ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        return end_processes(self.nodes, seconds=5.0)


def table(result: dict[str, Any]) -> str:
    """The losses, a line each, and what is amiss."""
    lines = [f"{'lost':8}{'phase':10}{'step':>5}{'driver ended':>14}{'node.sh ended':>15}{'code':>6}  went on from"]
    for loss in result["losses"]:
        seconds = [f"{loss[key]:.1f} s" if loss[key] is not None else "-" for key in ("driver_seconds", "exit_seconds")]
        lines.append(
            f"{loss['fault']:8}{loss['phase']:10}{loss['step']:>5}{seconds[0]:>14}{seconds[1]:>15}"
            f"{loss['code'] if loss['code'] is not None else '-':>6}  {loss['resumed_from']} of {loss['checkpoint']}"
        )
    for node in result["nodes"]:
        lines.append(f"{node['address']}: {', '.join(node['processes']) or 'nothing of Ray'}")
    lines += [f"amiss: {text}" for text in result["amiss"]] or ["everything is as it should be"]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.two_nodes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, required=True, help="a new folder, on a disk")
    made.add_argument(
        "--losses", type=loss_of, nargs="*", default=[loss_of(word) for word in DEFAULT_LOSSES], metavar="FAULT:PHASE",
        help=f"in turn ({' '.join(DEFAULT_LOSSES)}); none: only train",
    )  # fmt: skip
    made.add_argument("--steps", type=int, default=8, help="of the run (8)")
    made.add_argument("--save-every", type=int, default=2, metavar="N", help="steps between checkpoints (2)")
    made.add_argument("--seconds", type=float, default=SECONDS, help="that a driver may take to end (30)")
    made.add_argument("--run-command", default=RUN_COMMAND, metavar="WORDS", help=f"({RUN_COMMAND})")
    made.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    # Behind the options that take several words argparse would give them these as well.
    made.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key=value", help="of the run")
    return made


def dry_run(nodes: Sequence[Node], settings: LaunchSettings, losses: Sequence[Loss]) -> str:
    """What would be run, as a shell would take it."""
    lines = [shlex.join(command) for command in making(nodes)]
    for rank, node in enumerate(nodes):
        variables = " ".join(f"{k}={shlex.quote(v)}" for k, v in environment(settings, nodes, rank, 0).items())
        lines.append(f"{variables} {shlex.join(node_command(settings, node, rank))} &")
    for loss in losses:
        lines.append(f"# in {loss.phase}:")
        lines.append(
            shlex.join(["kill", "-9"]) + f" RAYLET  # one of `ip netns pids {nodes[1].name}`"
            if loss.fault == "raylet"
            else shlex.join(link_down(nodes[1])[0])
        )
    return "\n".join([*lines, *(shlex.join(command) for command in removing(nodes))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    given = parser().parse_args(arguments)
    out: Path = given.out.absolute()
    nodes = new_pair()
    temp_dir = Path("/tmp") / nodes[0].name
    settings = LaunchSettings(
        log_dir=out / "launches",
        temp_dir=temp_dir,
        overrides=(
            "trainer.nnodes=2",
            "trainer.n_gpus_per_node=1",
            *tiny_run(out / "run", given.steps, given.save_every, given.overrides),
        ),
        run_command=given.run_command,
    )
    if given.dry_run:
        print(dry_run(nodes, settings, given.losses))
        return 0
    try:
        check_possible()
        check_new(out)
        return measure(out, nodes, settings, given)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED_EXIT
    except KeyboardInterrupt:
        say(f"interrupted; namespaces and processes are gone, logs are in {out}")
        return INTERRUPTED_EXIT


def measure(out: Path, nodes: Sequence[Node], settings: LaunchSettings, given: argparse.Namespace) -> int:
    """Runs it, writes the result and prints it. Returns the exit code."""
    folder = out / "run"
    campaign = Campaign(nodes, settings, folder, given.save_every)
    with ExitStack() as stack:
        settings.temp_dir.mkdir()
        stack.callback(shutil.rmtree, settings.temp_dir, ignore_errors=True)
        stack.enter_context(namespaces(nodes))
        code = campaign.run(given.losses)
    found = run_checks(folder, given.steps, len(nodes))
    amiss = [text for loss in given.losses for text in loss.amiss(given.seconds)]
    amiss += nodes_amiss(campaign.parts) + complaints(found, given.steps, len(nodes))
    if code != 0:
        told = settings.log_dir / str(campaign.launches - 1) / "output_0.txt"
        amiss.append(f"the last launch ended with {code}: {last_line(told)}")
    result = {
        "steps": given.steps,
        "launches": campaign.launches,
        "seconds_to_first_rollout": campaign.starts,
        "losses": [asdict(loss) for loss in given.losses],
        "nodes": campaign.parts,
        **found,
        "code": code,
        "amiss": amiss,
        "good": not amiss,
    }
    write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 1 if amiss else 0


if __name__ == "__main__":
    sys.exit(main())
