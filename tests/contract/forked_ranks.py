"""Ranks of torch.distributed, forked from one process that has imported what all of them need.

torch, verl and transformers take several seconds to import, longer than many a rank's work. A program calls
``become_a_rank`` after its imports, before anything starts a thread or a process group; a test starts that program with
``run_ranks``. A child ends as any Python process does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FAILED = "failed.json"


class World(NamedTuple):
    """So many ranks, and what their program is told."""

    size: int
    argument: str


def log_of(folder: Path, world: World, rank: int) -> Path:
    """Where a rank's output goes."""
    return folder / f"world{world.size}_rank{rank}.log"


def become_a_rank(plan: Path) -> str:
    """Forks the ranks that ``run_ranks`` planned. Returns in every child: its world's argument. The parent ends here.

    Worlds of one inner list run at the same time. After the first rank that fails no other goes on: they would wait for
    it in a collective. The parent's exit status is 1 then, and FAILED beside the plan says who ended how.
    """
    for together in json.loads(plan.read_text()):
        worlds = [World(*world) for world in together]
        running: dict[int, tuple[World, int]] = {}
        codes: dict[tuple[World, int], int] = {}
        for world in worlds:
            port = _free_port()
            for rank in range(world.size):
                process = os.fork()
                if not process:
                    _prepare(world, rank, port, log_of(plan.parent, world, rank))
                    return world.argument
                running[process] = (world, rank)
        while running and not any(codes.values()):
            process, status = os.wait()
            codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
        for process in running:
            os.kill(process, signal.SIGKILL)
        for process in running:
            os.waitpid(process, 0)
        if any(codes.values()):
            ended = [[world.size, rank, code] for (world, rank), code in codes.items()]
            (plan.parent / FAILED).write_text(json.dumps({"ended": ended, "stopped": len(running)}))
            sys.exit(1)
    sys.exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _prepare(world: World, rank: int, port: int, log: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def run_ranks(
    program: Path, folder: Path, worlds: Sequence[Sequence[World]], environment: dict[str, str], timeout: float
) -> None:
    """Runs a program that calls ``become_a_rank``, in a folder of its own, and leaves nothing running.

    Raises:
        RuntimeError: a rank failed or the time (seconds) is up; with the end of what the first one that failed wrote.
    """
    plan, log = folder / "worlds.json", folder / "forking.log"
    plan.write_text(json.dumps(worlds))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(program), str(plan)],
            env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        code = process.poll()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code == 0:
        return
    if not (folder / FAILED).exists():
        state = "took longer than the time it has" if code is None else f"ended with {code} before any rank did"
        logs = [log, *sorted(folder.glob("world*_rank*.log"))]
        raise RuntimeError(f"{program.name} {state}:\n" + "\n".join(f"{one.name}: {_end(one, 8)}" for one in logs))
    found = json.loads((folder / FAILED).read_text())
    size, rank, code = next(one for one in found["ended"] if one[2])
    path = next(one for one in folder.glob(f"world{size}_rank{rank}.log"))
    raise RuntimeError(
        f"{program.name}: rank {rank} of {size} ended with {code} ({found['stopped']} others were stopped)"
        f"{_where(path)}:\n{_end(path, 40)}"
    )


def _text(log: Path) -> list[str]:
    # What Triton's bindings say at the end of a process that failed is not about the failure.
    return log.read_text(errors="replace").split("nanobind: leaked")[0].splitlines()


def _where(log: Path) -> str:
    """The last line that names a case, where a program writes such lines."""
    return next((f" in {line}" for line in reversed(_text(log)) if line.startswith("case ")), "")


def _end(log: Path, lines: int) -> str:
    return "\n".join(_text(log)[-lines:])
