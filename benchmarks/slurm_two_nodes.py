"""scripts/slurm/train.sbatch under a real Slurm of two nodes: preempted, requeued, resumed, finished.

    python -m benchmarks.slurm_two_nodes --out FOLDER [--steps 6] [--preempt-at 2] [--set key=value ...]

Two network namespaces are the nodes, Debian's slurmctld, slurmd and munge run in them with a configuration of their
own, and `sbatch --nodes=2` gets train.sbatch as it is, for the tiny world with the CPU preset. In a rollout the job's
batch shell is sent SIGUSR1, which is what --signal=B:USR1@SECONDS does before the time limit. The run has to save, end
with 75 and be requeued by the script; the second start has to go on from that checkpoint and to finish, with every
step in metrics.jsonl once.

Needs root, iproute2 and Slurm's packages (apt-get install --no-install-recommends slurmctld slurmd slurm-client munge);
a few minutes. FOLDER/result.json has the result, FOLDER/job.out the job's output, FOLDER/launches the logs per node.
Exit code 0 where everything is as it should be. Whatever happens, Slurm, the namespaces and what runs in them end.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.namespaces import INTERFACE, Command, check_possible, making, namespaces, new_pair, removing
from benchmarks.node_runs import (
    CPUS,
    JOIN_SECONDS,
    RAY_ARGUMENTS,
    RUN_COMMAND,
    check_new,
    last_line,
    nodes_amiss,
    part_taken,
    say,
    tiny_run,
)
from benchmarks.run_checks import complaints, run_checks
from benchmarks.slurm_cluster import SlurmCluster, check_slurm, gres_conf, slurm_conf
from recipe.attempts import INTERRUPTED_EXIT, REFUSED_EXIT
from recipe.checkpoints import newest_complete
from recipe.compose import ROOT
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError
from verl_ext.heartbeat import FILE, ROLLOUT, read_beat

SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
RANKS = 2
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
PATIENCE = 600.0
POLL = 0.2


def job_command(out: Path, words: Sequence[str]) -> Command:
    """sbatch; its options win over those in train.sbatch."""
    return [
        "sbatch", "--parsable", f"--nodes={RANKS}", "--gpus-per-node=1", f"--cpus-per-task={CPUS}", "--time=60",
        f"--chdir={ROOT}", f"--output={out / 'job.out'}", str(SCRIPT), *words,
    ]  # fmt: skip


def job_variables(out: Path, temp_dir: Path, run_command: str) -> dict[str, str]:
    """What train.sbatch and node.sh are told; the head's address and the port they find themselves."""
    return {
        "VENV": sys.prefix,
        "RUN_COMMAND": run_command,
        "OUTPUT": str(out / "run"),
        "LOG_DIR": str(out / "launches"),
        "TEMP_DIR": str(temp_dir),
        "INTERFACE": INTERFACE,
        "LOGICAL_GPUS": "1",
        "RAY_START_ARGS": RAY_ARGUMENTS,
        "JOIN_TIMEOUT": str(JOIN_SECONDS),
    }


class Job:
    """One job, from its submission to its end."""

    def __init__(self, cluster: SlurmCluster, out: Path, number: str) -> None:
        self.cluster, self.out, self.number = cluster, out, number
        self.heartbeat = out / "run" / FILE
        self.now: dict[str, str] = {}
        self.parts: list[dict[str, Any]] = []
        self._shown = ""

    def preempt(self, at: int) -> dict[str, Any]:
        """SIGUSR1 in the rollout of step ``at`` or the first one after it; waits for the second start to begin steps.

        Returns:
            preempted_in (step), checkpoint (that was saved then), resumed_from, and seconds: to_requeue and to_restart
            from the signal, restart_to_rollout from the second start.
        """
        self._until(lambda: self._in_rollout(at), f"rollout of step {at}")
        beat = read_beat(self.heartbeat)
        self.parts = part_taken(self.cluster.nodes, self.out / "launches" / "0")
        self.cluster.client(["scancel", "--batch", "--signal=USR1", self.number])
        sent = time.monotonic()
        say(f"SIGUSR1 in {beat.place}")
        self._until(lambda: self.now["Restarts"] == "1", "requeue")
        requeued = time.monotonic()
        whole = newest_complete(self.out / "run" / "checkpoints")
        self._until(lambda: self.now["JobState"] == "RUNNING", "second start")
        again = time.monotonic()
        self._until(lambda: self._in_rollout(1, after=again), "first rollout of the second start")
        first = read_beat(self.heartbeat)
        say(f"it goes on from checkpoint {first.saved}")
        return {
            "preempted_in": beat.step,
            "checkpoint": whole.step if whole else None,
            "resumed_from": first.saved,
            "seconds": {
                "to_requeue": round(requeued - sent, 1),
                "to_restart": round(again - sent, 1),
                "restart_to_rollout": round(time.monotonic() - again, 1),
            },
        }

    def finish(self) -> None:
        """Waits for the job's end."""
        self._until(lambda: self.now["JobState"] in ENDED, "end", ended=True)

    def _in_rollout(self, step: int, *, after: float = 0.0) -> bool:
        beat = read_beat(self.heartbeat)
        return beat is not None and beat.phase == ROLLOUT and beat.step >= step and beat.monotonic > after

    def _until(self, reached: Callable[[], bool], what: str, *, ended: bool = False) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            self.now = self.cluster.job(self.number)
            shown = f"job {self.number}: {self.now['JobState']}, restarts {self.now['Restarts']}"
            if shown != self._shown:
                say(shown)
                self._shown = shown
            if reached():
                return
            if not ended and self.now["JobState"] in ENDED:
                raise RuntimeError(f"the job ended before its {what}: {last_line(self.out / 'job.out')}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} within {PATIENCE:g} s: {last_line(self.out / 'job.out')}")
            time.sleep(POLL)


def amiss_of(result: dict[str, Any], steps: int) -> list[str]:
    """What is not as it should be, in words."""
    said = nodes_amiss(result["nodes"]) + complaints(result, steps, RANKS)
    for key, wanted in (("state", "COMPLETED"), ("exit_code", "0:0"), ("restarts", "1")):
        if result[key] != wanted:
            said.append(f"the job's {key} is {result[key]}, not {wanted}")
    if result["outcomes"] != ["preempted", "done"]:
        said.append(f"the supervisor saw {result['outcomes']}, not ['preempted', 'done']")
    if not result["checkpoint"] or result["resumed_from"] != result["checkpoint"]:
        said.append(f"went on from {result['resumed_from']}, saved was {result['checkpoint']}")
    return said


def table(result: dict[str, Any]) -> str:
    """The preemption, the nodes, and what is amiss."""
    seconds = result["seconds"]
    lines = [
        f"job: {result['state']}, {result['restarts']} restart, exit code {result['exit_code']}, {result['total']} s",
        f"SIGUSR1 in step {result['preempted_in']}; requeued after {seconds['to_requeue']} s, running again after "
        f"{seconds['to_restart']} s, next rollout {seconds['restart_to_rollout']} s after that",
        f"went on from {result['resumed_from']} of {result['checkpoint']}; "
        f"steps lost {result['steps_lost'] or 'none'}, done twice {result['steps_doubled'] or 'none'}",
        *(f"{node['address']}: {', '.join(node['processes']) or 'nothing of Ray'}" for node in result["nodes"]),
    ]
    lines += [f"amiss: {text}" for text in result["amiss"]] or ["everything is as it should be"]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.slurm_two_nodes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, required=True, help="a new folder, on a disk")
    made.add_argument("--steps", type=int, default=6, help="of the run (6)")
    made.add_argument("--preempt-at", type=int, default=2, metavar="STEP", help="whose rollout is disturbed (2)")
    made.add_argument("--run-command", default=RUN_COMMAND, metavar="WORDS", help=f"({RUN_COMMAND})")
    made.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key=value", help="of the run")
    made.add_argument("--dry-run", action="store_true", help="print configuration and commands, and stop")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    given = parser().parse_args(arguments)
    out: Path = given.out.absolute()
    nodes = new_pair()
    # Short: the paths of sockets have 107 characters. Not in --out, which munge's user may not be able to enter.
    state = Path("/tmp") / nodes[0].name
    # No checkpoint but the one at the preemption and the last: it has to be that one that the run goes on from.
    words = tiny_run(out / "run", given.steps, given.steps, given.overrides)
    variables = job_variables(out, state / "ray", given.run_command)
    if given.dry_run:
        lines = [*map(shlex.join, making(nodes)), "# slurm.conf"]
        lines += [slurm_conf(state, socket.gethostname(), nodes, CPUS).rstrip(), "# gres.conf", gres_conf().rstrip()]
        lines.append(" ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items()) + " \\")
        lines += [shlex.join(nodes[0].inside(job_command(out, words))), *map(shlex.join, removing(nodes))]
        print("\n".join(lines))
        return 0
    try:
        if not 0 < given.preempt_at < given.steps:
            raise ConfigError(f"--preempt-at {given.preempt_at}: expected 1 to {given.steps - 1} (--steps less one)")
        check_possible()
        check_slurm()
        check_new(out)
        with ExitStack() as stack:
            state.mkdir(mode=0o755)
            stack.callback(shutil.rmtree, state, ignore_errors=True)
            stack.enter_context(namespaces(nodes))
            cluster = SlurmCluster(state, nodes, cpus=CPUS)
            cluster.start()
            say("Slurm is up")
            result = measure(cluster, out, words, variables, given.preempt_at)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED_EXIT
    except KeyboardInterrupt:
        say(f"interrupted; namespaces and processes are gone, logs are in {out}")
        return INTERRUPTED_EXIT
    except RuntimeError as error:
        print(f"error: {error}; logs are in {out}", file=sys.stderr)
        return 1
    result |= run_checks(out / "run", given.steps, RANKS)
    result["amiss"] = amiss_of(result, given.steps)
    result["good"] = not result["amiss"]
    write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 0 if result["good"] else 1


def measure(
    cluster: SlurmCluster, out: Path, words: Sequence[str], variables: dict[str, str], preempt_at: int
) -> dict[str, Any]:
    """Submits the job and goes along with it to its end."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_", "SBATCH_"))}
    started = time.monotonic()
    job = Job(cluster, out, cluster.client(job_command(out, words), inherited | variables).strip())
    preempted = job.preempt(preempt_at)
    job.finish()
    return {
        "state": job.now["JobState"],
        "restarts": job.now["Restarts"],
        "exit_code": job.now["ExitCode"],
        "total": round(time.monotonic() - started, 1),
        "nodes": job.parts,
        **preempted,
    }


if __name__ == "__main__":
    sys.exit(main())
