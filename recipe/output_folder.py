"""Is this output folder free, resumable, or another run's? Asked before anything is started."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from recipe.run_files import read_metric_records
from verl_ext.config import ConfigError

MUST_AGREE = (
    "distill.method",
    "distill.teacher.kind",
    "actor_rollout_ref.model.path",
    "data.train_files",
    "data.train_batch_size",
    "actor_rollout_ref.rollout.n",
    "run.seed",
    "distill.schedule",
    "distill.sequences",
    "distill.weighting.rates",
    "distill.weighting.store",
)
MINIMUM_FREE = 500_000_000


def check_output_folder(config: DictConfig, folder: Path) -> int:
    """The step to resume from; 0 for a new run.

    Raises:
        ConfigError: the folder cannot be written, holds another run, one of another world size, a finished run or an
            incomplete checkpoint; the message says which and what to do.
    """
    check_writable(folder, "run.output_dir")
    _check_space(folder)
    checkpoints = folder / "checkpoints"
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        metrics = folder / "metrics.jsonl"
        # A run that was stopped before its first step (while it took pass rates, say) has nothing to lose.
        if metrics.exists() and any(record["step"] > 0 for record in read_metric_records(metrics)):
            if not config.run.start_over:
                raise ConfigError(
                    f"run.output_dir {folder} holds a run without a checkpoint to resume from; "
                    "choose another folder, remove this one, or begin it anew with run.start_over=true"
                )
            _check_same_run(config, folder)
        return 0
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise ConfigError(f"{tracker} holds {text!r}, expected a step number; write the last whole step into it")
    step = int(text)
    _check_same_run(config, folder)
    _check_checkpoint(config, checkpoints / f"global_step_{step}")
    # Without a summary the run was ended after its last checkpoint: what is left to do is the result.
    if step > config.run.steps or (step == config.run.steps and (folder / "summary.json").exists()):
        raise ConfigError(
            f"{folder} is finished: its checkpoint is at step {step} and run.steps is {config.run.steps}; "
            "ask for more steps or choose another folder"
        )
    return step


def check_writable(folder: Path, key: str) -> None:
    """Makes the folder. Raises ConfigError with the key that named it where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{key} {folder} cannot be written: {error.strerror}; choose another folder") from error


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < MINIMUM_FREE:
        raise ConfigError(
            f"run.output_dir {folder} has {free / 1e9:.1f} GB free, at least {MINIMUM_FREE / 1e9:.1f} GB are needed; "
            "free some space or choose another disk"
        )


def _check_same_run(config: DictConfig, folder: Path) -> None:
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} holds checkpoints but no config.yaml: not a run of ours; choose another folder")
    before = OmegaConf.create(yaml.safe_load(path.read_text()))
    staged = any(OmegaConf.select(config, f"distill.{key}") for key in ("schedule.switch", "weighting.recompute_at"))
    for key in (*MUST_AGREE, *(("run.steps",) if staged else ())):
        old, new = OmegaConf.select(before, key), OmegaConf.select(config, key)
        if old != new:
            raise ConfigError(
                f"{folder} holds a run with {key}={old!r}, this one has {new!r}; "
                "resume with the same value or choose another folder"
            )


def _check_checkpoint(config: DictConfig, folder: Path) -> None:
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    sizes = {
        int(found.group(1))
        for path in (folder / "actor").glob("model_world_size_*_rank_*.pt")
        if (found := re.match(r"model_world_size_(\d+)_rank_", path.name))
    }
    if sizes and sizes != {ranks}:
        raise ConfigError(
            f"checkpoint {folder} was written by {min(sizes)} ranks, this run has {ranks}; "
            f"set trainer.n_gpus_per_node x trainer.nnodes to {min(sizes)} or choose another folder"
        )
    wanted = [folder / "actor" / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    if config.distill.coefficient > 0 and config.distill.teacher.kind in ("ema", "synced"):
        wanted += [folder / "teacher" / f"teacher_world_size_{ranks}_rank_{rank}.safetensors" for rank in range(ranks)]
    for path in wanted:
        if not path.exists() or path.stat().st_size == 0:
            raise ConfigError(f"checkpoint {folder} is incomplete: {path.name} is missing or empty; use an older one")


def unused_folder(wanted: Path) -> Path:
    """The folder of a run: as wanted, unless a run without a checkpoint to go on from was left in it."""
    folder, attempt = wanted, 1
    while (folder / "metrics.jsonl").exists() and not _resumable(folder):
        attempt += 1
        folder = wanted.with_name(f"{wanted.name}.{attempt}")
    return folder


def _resumable(folder: Path) -> bool:
    # A checkpoint at the last step is there when the run ended and only its row could not be written: run it anew.
    return (folder / "checkpoints" / "latest_checkpointed_iteration.txt").exists() and not (
        folder / "summary.json"
    ).exists()
