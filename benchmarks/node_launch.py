"""scripts/slurm/node.sh on every namespace of a pair: what train.sbatch does with srun, without Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.namespaces import INTERFACE, Command, Node
from benchmarks.node_runs import CPUS, JOIN_SECONDS, RAY_ARGUMENTS, RUN_COMMAND
from recipe.compose import ROOT
from verl_ext.heartbeat import Beat, read_beat

NODE_SCRIPT = ROOT / "scripts" / "slurm" / "node.sh"
SUPERVISOR = "python -m recipe.supervise --"
POLL = 0.01


@dataclass(frozen=True)
class LaunchSettings:
    """Of every launch of one run.

    Attributes:
        log_dir: folder of all launches; each has one of its own in it.
        temp_dir: Ray's files, a folder a node in it. Short: the paths of sockets have 107 characters.
        run_command: what rank 0 runs under the supervisor, words without quotes.
        overrides: its arguments.
        cpus: logical CPUs of a node.
    """

    log_dir: Path
    temp_dir: Path
    overrides: tuple[str, ...]
    run_command: str = RUN_COMMAND
    cpus: int = CPUS


def environment(settings: LaunchSettings, nodes: Sequence[Node], rank: int, number: int) -> dict[str, str]:
    """What node.sh is told; ``number`` counts launches from 0."""
    return {
        "HEAD_ADDRESS": nodes[0].address,
        "NODE_ADDRESS": nodes[rank].address,
        "NODE_RANK": str(rank),
        "NODES": str(len(nodes)),
        # Its own in the namespace; another one a launch, because the one before may keep it for a minute.
        "PORT": str(20000 + number),
        "LOG_DIR": str(settings.log_dir / str(number)),
        "TEMP_DIR": str(settings.temp_dir / str(rank)),
        "GPUS_PER_NODE": "1",
        "LOGICAL_GPUS": "1",
        "CPUS_PER_NODE": str(settings.cpus),
        "RAY_START_ARGS": RAY_ARGUMENTS,
        "JOIN_TIMEOUT": str(JOIN_SECONDS),
        "POLL_SECONDS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "VENV": sys.prefix,
        "RUN_COMMAND": f"{SUPERVISOR} {settings.run_command}",
    }


def node_command(settings: LaunchSettings, node: Node, rank: int) -> Command:
    """node.sh of one rank; the head gets the driver's arguments."""
    return node.inside(["bash", str(NODE_SCRIPT), *(settings.overrides if rank == 0 else ())])


class Launch:
    """One start of the cluster and its driver; what node.sh prints goes to output_RANK.txt in its folder."""

    def __init__(self, settings: LaunchSettings, nodes: Sequence[Node], number: int) -> None:
        self.nodes, self.log_dir = nodes, settings.log_dir / str(number)
        self.log_dir.mkdir(parents=True)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.ranks: list[subprocess.Popen[bytes]] = []
        for rank, node in enumerate(nodes):
            with open(self.log_dir / f"output_{rank}.txt", "wb") as printed:
                self.ranks.append(
                    subprocess.Popen(
                        node_command(settings, node, rank),
                        env=inherited | environment(settings, nodes, rank, number),
                        stdin=subprocess.DEVNULL,
                        stdout=printed,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def running(self) -> bool:
        """Whether the head's node.sh, and with it the supervisor, is there."""
        return self.ranks[0].poll() is None

    def await_beat(self, heartbeat: Path, wanted: str, *, saved: int = 0, steps_on: int = 0) -> Beat | None:
        """Waits for a phase, in the ``steps_on``-th step or later after a checkpoint of step ``saved`` or later.

        None where the head ended before.
        """
        while self.running():
            beat = read_beat(heartbeat)
            if beat is not None and beat.phase == wanted:
                if beat.saved >= saved and beat.step - beat.saved >= steps_on:
                    return beat
            time.sleep(POLL)
        return None

    def await_driver_end(self, pid: int, seconds: float) -> bool:
        """Whether the driver ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(POLL)
        return False

    def await_end(self, seconds: float) -> int | None:
        """The head's exit code; None where it does not end within so many seconds."""
        try:
            return self.ranks[0].wait(seconds)
        except subprocess.TimeoutExpired:
            return None
