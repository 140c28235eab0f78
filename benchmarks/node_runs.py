"""What the campaigns over nodes share: the tiny run, its folder, and who takes part on which node."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.namespaces import Node
from verl_ext.config import ConfigError

RUN_COMMAND = "python -m recipe.train"
RAY_ARGUMENTS = "--object-store-memory=500000000"
JOIN_SECONDS = 240
CPUS = 16
"""Logical ones of a node; the run takes 12 in all."""
KINDS = {"model worker": ("ray::WorkerDict", "ray::DistillWorker"), "vLLM": ("VLLM::",)}


def tiny_run(folder: Path, steps: int, save_every: int, given: Sequence[str]) -> tuple[str, ...]:
    """Overrides of a run in ``folder`` whose steps take seconds; those ``given`` win."""
    return (
        "model=tiny", "data=tiny_world", "hardware=cpu", "data.train_batch_size=4", f"run.steps={steps}",
        f"run.save_every={save_every}", "run.val_before=false", "run.val_every=-1", *given, f"run.output_dir={folder}",
    )  # fmt: skip


def titles(node: Node) -> list[str]:
    """What Ray's and vLLM's processes on a node call themselves, without what they are doing."""
    found = set()
    for process in node.processes():
        with suppress(psutil.Error):
            if match := re.match(r"(ray|VLLM)::\w+", " ".join(process.cmdline())):
                found.add(match[0])
    return sorted(found)


def address_in(log: Path) -> str | None:
    """The address under which Ray started on a node, from the log that node.sh keeps there; None: it did not."""
    if not log.exists():
        return None
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    found = re.findall(r"Local node IP: (\S+)", text)
    return found[-1] if found else None


def part_taken(nodes: Sequence[Node], log_dir: Path) -> list[dict[str, Any]]:
    """Address, Ray's address and processes of every node while a run goes on whose node.sh write to ``log_dir``."""
    return [
        {"address": node.address, "ray_address": address_in(log_dir / f"node_{rank}.log"), "processes": titles(node)}
        for rank, node in enumerate(nodes)
    ]


def nodes_amiss(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Nodes that take no part: Ray has another address there, or no model worker or no vLLM engine runs."""
    said = [] if parts else ["no node was looked at"]
    for part in parts:
        if part["ray_address"] != part["address"]:
            said.append(f"{part['address']}: Ray started under {part['ray_address']}")
        for kind, prefixes in KINDS.items():
            if not any(title.startswith(prefixes) for title in part["processes"]):
                said.append(f"{part['address']}: no {kind} ran there")
    return said


def check_new(out: Path) -> None:
    """Makes the folder. Raises ConfigError where it holds something."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; choose a new folder")


def last_line(path: Path) -> str:
    """The last of a text file that is not empty."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return next((line for line in reversed(text.splitlines()) if line.strip()), f"{path} is empty")


def say(text: str) -> None:
    """One line on standard error, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
