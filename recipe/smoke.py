"""First contact with a cluster: does the whole stack run on this node? `scripts/gpu_smoke.sh` starts it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipe.compose import ROOT, compose_config
from recipe.doctor_machine import gpu_memory, installed_versions
from recipe.environment import commit
from recipe.output_folder import check_writable
from recipe.smoke_bundle import write_bundle
from recipe.smoke_checks import data_written, doctor_found, trained
from recipe.smoke_run import Smoke, Step, gpu_bytes, host_bytes, output_of, table
from verl_ext.config import ConfigError

MODEL = "Qwen/Qwen3-0.6B"
STEPS, SAVED = 3, 2
RANKS = (8, 4, 2, 1)
"""Devices that a batch of 16 questions with 8 answers can be shared among."""
LEAN = (
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "data.train_batch_size=16",
    "actor_rollout_ref.rollout.n=8",
    "run.val_every=-1",
    "run.val_before=false",
)
SHORT = (
    "data.max_prompt_length=512",
    "data.max_response_length=1024",
    "distill.context.max_length=2048",
    "actor_rollout_ref.rollout.max_model_len=3072",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=8192",
)
GPU_PATH = {
    "trainer.device": "cuda",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2",
    "actor_rollout_ref.rollout.name": "vllm",
    "distill.method": "sc_sdpo",
}
CPU_PATH = {
    "trainer.device": "cpu",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.rollout.name": "vllm",
    "distill.method": "sc_sdpo",
}
LIMITS = {"data": 120.0, "doctor": 300.0, "tiny": 420.0, "train": 600.0, "resume": 420.0}
"""Seconds; far above what a step should take: a first import from a network disk can take minutes."""


def overrides(folder: Path, *, cpu: bool, gpus: int, model: str, small: bool, extra: Sequence[str]) -> list[str]:
    """The settings of a run, less its steps and its folder: of the tiny world, or of a real model on small numbers."""
    data = folder / "data" / ("tiny_world" if small or cpu else "arithmetic")
    chosen = ["model=tiny", "data=tiny_world"] if small or cpu else ["model=qwen3_0_6b", "data=gsm8k", *SHORT]
    if not (small or cpu):
        chosen.append(f"actor_rollout_ref.model.path={model}")
    return [
        "method=sc_sdpo",
        f"hardware={'cpu' if cpu else 'gpu'}",
        *chosen,
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/test.parquet",
        f"trainer.n_gpus_per_node={gpus}",
        *LEAN,
        *extra,
    ]


def plan(folder: Path, *, cpu: bool, gpus: int, model: str, extra: Sequence[str] = ()) -> list[Step]:
    """The steps in order. ``extra``: overrides that go behind those of every run and of the doctor."""
    common: dict[str, Any] = {"cpu": cpu, "gpus": gpus, "model": model, "extra": extra}
    tiny, real = (overrides(folder, small=small, **common) for small in (True, False))
    runs = {name: folder / "runs" / name for name in ("tiny", "train")}
    python = (sys.executable, "-m")
    # What was asked for otherwise is not held against a run.
    given = {text.partition("=")[0].lstrip("+~") for text in extra}
    path = {key: value for key, value in (CPU_PATH if cpu else GPU_PATH).items() if key not in given}
    what = "the tiny model again" if cpu else model
    train = (*python, "recipe.train")

    def run(name: str, steps: int, *, save: int = -1) -> list[str]:
        return [f"run.output_dir={runs[name]}", f"run.steps={steps}", f"run.save_every={save}"]

    return [
        Step("data", "questions made here", (*python, "recipe.smoke_data", "--out", str(folder / "data")),
             LIMITS["data"], data_written(folder / "data")),
        Step("doctor", f"the doctor on {what}", (*python, "recipe.doctor", "--json", *real), LIMITS["doctor"],
             doctor_found(folder / "doctor.json"), needs=("data",), codes=(0, 1)),
        Step("tiny", f"the tiny world, {STEPS} steps of SC-SDPO", (*train, *tiny, *run("tiny", STEPS)), LIMITS["tiny"],
             trained(runs["tiny"], STEPS, path), needs=("data",), folder=runs["tiny"]),
        Step("train", f"{what}, {SAVED} steps of SC-SDPO and a checkpoint",
             (*train, *real, *run("train", SAVED, save=SAVED)), LIMITS["train"],
             trained(runs["train"], SAVED, path, saved=SAVED), needs=("data",), folder=runs["train"]),
        Step("resume", "another process goes on from it", (*train, *real, *run("train", STEPS, save=SAVED)),
             LIMITS["resume"], trained(runs["train"], STEPS, path, resumed=SAVED), needs=("train",), continues="train"),
    ]  # fmt: skip


def child_environment() -> dict[str, str]:
    """This one with the project on the path and a Ray of its own: a cluster that others use stays out of it."""
    found = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    path = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH"))))
    # Compilers' helpers (ninja) lie beside the interpreter, which need not be the first on the caller's path.
    programs = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), found.get("PATH"))))
    return found | {"PYTHONPATH": path, "PATH": programs, "PYTHONUNBUFFERED": "1"}


def visible_gpus() -> int:
    """Of this machine and this job."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(gpu_memory())
    return there if named is None else min(there, len([one for one in named.split(",") if one.strip()]))


def machine_report() -> dict[str, str]:
    """Files about the machine, by their name in the archive."""
    versions = {"packages": installed_versions(), "python": sys.version, "commit": commit(ROOT)}
    commands = (
        ["nvidia-smi"],
        ["nvidia-smi", "topo", "-m"],
        ["uname", "-a"],
        ["lscpu"],
        ["free", "-g"],
        ["df", "-h", "/dev/shm"],
    )
    said = "\n".join(f"$ {' '.join(command)}\n{output_of(command)}" for command in commands)
    return {"versions.json": json.dumps(versions, indent=1) + "\n", "machine.txt": said}


def chosen_gpus(asked: int | None, *, cpu: bool) -> int:
    """Ranks of the runs. Raises ConfigError: none are there, or not as many as were asked for."""
    if cpu:
        if asked not in (None, 1):
            raise ConfigError("--gpus goes with GPUs; --cpu has one rank")
        return 1
    there = visible_gpus()
    if there == 0:
        raise ConfigError(
            "no NVIDIA GPU was found (nvidia-smi, CUDA_VISIBLE_DEVICES): run on a GPU node, or with --cpu"
        )
    if asked is None:
        return next(ranks for ranks in RANKS if ranks <= there)
    if asked not in RANKS or asked > there:
        raise ConfigError(f"--gpus is {asked}; allowed: {', '.join(str(one) for one in RANKS if one <= there)}")
    return asked


def with_limits(steps: Sequence[Step], texts: Sequence[str]) -> list[Step]:
    """``NAME=SECONDS`` put in. Raises ConfigError for another form or name."""
    limits: dict[str, float] = {}
    for text in texts:
        name, _, seconds = text.partition("=")
        if name not in LIMITS or not seconds.isdigit() or int(seconds) < 1:
            raise ConfigError(f"--limit is {text!r}; allowed: NAME=SECONDS with one of {', '.join(LIMITS)}")
        limits[name] = float(seconds)
    return [replace(step, limit=limits.get(step.name, step.limit)) for step in steps]


def parser() -> argparse.ArgumentParser:
    """The command line, which is also that of scripts/gpu_smoke.sh."""
    found = argparse.ArgumentParser(
        prog="scripts/gpu_smoke.sh",
        description="Ten minutes on one GPU node: the doctor; the tiny world through vLLM, FSDP2 and packed "
        f"flash-attention; {MODEL} with SC-SDPO, a checkpoint and a resume. Ends with a table and an archive for bug "
        "reports. What has passed is not run again by the same command.",
        epilog="Exit code: 0 every step passed, 1 one did not, 2 refused, 130 interrupted.",
    )
    found.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run and the doctor, after our own")
    found.add_argument("--cpu", action="store_true", help="the same steps with the CPU preset and the tiny model alone")
    found.add_argument(
        "--model", default=MODEL, metavar="PATH", help=f"{MODEL} in a local folder, where nothing is downloaded"
    )
    found.add_argument("--gpus", type=int, metavar="N", help="devices to use (default: all of the node, at most 8)")
    found.add_argument(
        "--out", type=Path, metavar="DIR", help="where everything goes (default: outputs/gpu_smoke or cpu_smoke)"
    )
    found.add_argument("--limit", action="append", default=[], metavar="STEP=SECONDS", help="time limit of a step: "
                       + ", ".join(f"{name} {seconds:.0f}" for name, seconds in LIMITS.items()))  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    args = parser().parse_intermixed_args(arguments)
    folder: Path = (args.out or Path("outputs") / ("cpu_smoke" if args.cpu else "gpu_smoke")).absolute()
    try:
        gpus = chosen_gpus(args.gpus, cpu=args.cpu)
        steps = with_limits(plan(folder, cpu=args.cpu, gpus=gpus, model=args.model, extra=args.overrides), args.limit)
        for small in (True, False):
            compose_config(
                overrides(folder, cpu=args.cpu, gpus=gpus, model=args.model, small=small, extra=args.overrides)
            )
        check_writable(folder, "--out")
        settings = {"cpu": args.cpu, "gpus": gpus, "model": args.model, "overrides": list(args.overrides)}
        smoke = Smoke(folder, steps, settings, memory=host_bytes if args.cpu else gpu_bytes)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Ends the step and what it started; without it they would live on.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    passed, code = False, 1
    try:
        passed = smoke.run(child_environment())
        code = 0 if passed else 1
    except KeyboardInterrupt:
        code = 130
    finally:
        shown = table(smoke.ordered(), {step.name: step.title for step in steps})
        archive, names = write_bundle(folder, {"table.txt": shown, **machine_report()})
        print(f"\n{shown}")
        signal.signal(signal.SIGTERM, before)
    print("everything passed" if passed else "not everything passed; the same command repeats what did not", flush=True)
    print(f"With a bug report send {archive} ({archive.stat().st_size / 1e3:.0f} kB): {', '.join(names)}")
    print(
        "Passwords, keys and access tokens that are recognised as such are hidden in it; look through it all the same."
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
