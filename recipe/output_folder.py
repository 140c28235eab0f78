"""Is this output folder free, resumable, or another run's? Asked before anything is started."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from recipe.checkpoints import newest_complete, steps_on_disk
from recipe.run_files import read_metric_records
from verl_ext.checkpoint_manifest import STATE_FILE, Manifest
from verl_ext.checkpoint_saving import TRACKER
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
PARTS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
"""What verl calls a content of a checkpoint in its settings, and in the names of its files."""


def check_output_folder(config: DictConfig, folder: Path, note: Callable[[str], None] = lambda _: None) -> int:
    """The step to resume from; 0 for a new run. Changes nothing.

    Args:
        note: told of checkpoints that are passed over for an older one.

    Raises:
        ConfigError: the folder cannot be written, holds another run, one of another world size, a finished run or no
            complete checkpoint; the message says which and what to do.
    """
    check_writable(folder, "run.output_dir")
    _check_space(folder)
    if OmegaConf.select(config, "trainer.resume_mode", default="auto") != "auto":
        raise ConfigError(
            f"trainer.resume_mode is {config.trainer.resume_mode!r}; allowed: auto (a run goes on from the newest "
            "complete checkpoint of run.output_dir; another folder starts anew)"
        )
    checkpoints = folder / "checkpoints"
    full = OmegaConf.select(config, "run.verify_checkpoints", default="full") == "full"
    if steps_on_disk(checkpoints):
        _check_same_run(config, folder)
    manifest = newest_complete(checkpoints, full=full, note=note)
    if manifest is None:
        _check_nothing_lost(config, folder, checkpoints / TRACKER)
        return 0
    _check_checkpoint(config, checkpoints / f"global_step_{manifest.step}", manifest)
    # Without a summary the run was ended after its last checkpoint: what is left to do is the result.
    finished = manifest.step == config.run.steps and (folder / "summary.json").exists()
    if finished or manifest.step > config.run.steps:
        raise ConfigError(
            f"{folder} is finished: its checkpoint is at step {manifest.step} and run.steps is {config.run.steps}; "
            "ask for more steps or choose another folder"
        )
    return manifest.step


def _check_nothing_lost(config: DictConfig, folder: Path, tracker: Path) -> None:
    metrics = folder / "metrics.jsonl"
    # A run that was stopped before its first step (while it took pass rates, say) has nothing to lose.
    if tracker.exists() or metrics.exists() and any(record["step"] > 0 for record in read_metric_records(metrics)):
        if config.run.start_over and not tracker.exists():
            _check_same_run(config, folder)
            return
        raise ConfigError(
            f"run.output_dir {folder} holds a run without a checkpoint to resume from; choose another folder or remove "
            "this one" + ("" if tracker.exists() else ", or begin it anew with run.start_over=true")
        )


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


def _check_checkpoint(config: DictConfig, folder: Path, manifest: Manifest) -> None:
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if manifest.world_size != ranks:
        raise ConfigError(
            f"checkpoint {folder} was written by {manifest.world_size} ranks, this run has {ranks}; set "
            f"trainer.n_gpus_per_node x trainer.nnodes to {manifest.world_size}, or export its model (python -m "
            "recipe.export) and start a new run from it"
        )
    contents = OmegaConf.select(config, "actor_rollout_ref.actor.checkpoint.load_contents", default=list(PARTS))
    parts = [part for content, part in PARTS.items() if content in contents]
    wanted = [f"actor/{part}_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks) for part in parts]
    wanted += ["data.pt", STATE_FILE]
    if config.distill.coefficient > 0 and config.distill.teacher.kind in ("ema", "synced"):
        wanted += [f"teacher/teacher_world_size_{ranks}_rank_{rank}.safetensors" for rank in range(ranks)]
    for name in wanted:
        if name not in manifest.files:
            raise ConfigError(
                f"checkpoint {folder} does not hold {name}, which this run needs to go on; it was saved with other "
                "settings (actor_rollout_ref.actor.checkpoint.save_contents, distill.teacher): choose another folder"
            )


def unused_folder(wanted: Path) -> Path:
    """The folder of a run: as wanted, unless a run without a checkpoint to go on from was left in it."""
    folder, attempt = wanted, 1
    while (folder / "metrics.jsonl").exists() and not _resumable(folder):
        attempt += 1
        folder = wanted.with_name(f"{wanted.name}.{attempt}")
    return folder


def _resumable(folder: Path) -> bool:
    # A checkpoint at the last step is there when the run ended and only its row could not be written: run it anew.
    return (folder / "checkpoints" / TRACKER).exists() and not (folder / "summary.json").exists()
