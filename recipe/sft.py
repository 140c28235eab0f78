"""Fine-tune on prepared sequences: `python -m recipe.sft sft.files=[X.parquet] sft.out=DIR model=tiny hardware=cpu`."""
# ruff: noqa: E402  (the signals come before imports that take seconds)

from __future__ import annotations

from verl_ext.preemption import PREEMPTION

if __name__ == "__main__":
    PREEMPTION.listen()

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from data_prep.sources import sha256_of
from recipe.cluster import importing, prepare_environment, ray_cluster
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.console_format import StepClock, format_number
from recipe.environment import versions
from recipe.output_folder import check_writable
from recipe.preflight import check_attention, check_loggers
from recipe.run_files import RunFiles, json_line
from recipe.sft_settings import SftConfig, sft_config, verl_sft_config
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError
from verl_ext.heartbeat import START, beat, beating
from verl_ext.loggers import Loggers, running_loggers

if TYPE_CHECKING:
    from verl_ext.sft_rows import SftRows

HELP = """Fine-tune a model on prepared token sequences, on verl's SFT trainer; the result is a Hugging Face folder.

  python -m recipe.sft sft.files=[X.parquet] sft.out=DIR [group=preset ...] [key=value ...]

Presets (model and hardware count; the others are those of training):
{groups}

Keys:
  sft.files=[X.parquet,...] columns input_ids, loss_mask (1: trained on), kind, question_id
  sft.out=DIR               DIR/model is the result; a finished run is skipped, an interrupted one goes on
  sft.lr=LR  sft.schedule=cosine|constant  sft.warmup=SHARE  sft.min_lr_ratio=R     (5e-6, cosine, 0.05, 0)
  sft.epochs=N              passes over the rows (3), or
  sft.steps=N               optimiser steps in all
  sft.batch_size=N          sequences of an optimiser step, over all ranks (64)
  sft.max_length=N          tokens of a sequence; a longer one is refused, never cut (32768)
  sft.weight_decay=W  sft.betas=[B1,B2]  sft.clip=C         AdamW (1e-4, [0.9, 0.95]), norm of the gradient (1.0)
  sft.save_every=N          checkpoint to resume from every N steps (-1: only when preempted)
  sft.max_tokens_per_gpu=N  of a micro-batch (sft.max_length)
  run.seed=N                order of the rows
  actor_rollout_ref.model.path=DIR          the model to start from
  actor_rollout_ref.model.*, actor_rollout_ref.actor.fsdp_config.*, trainer.n_gpus_per_node=N trainer.nnodes=M

DIR also holds metrics.jsonl, checkpoints, config.yaml, run.log, tensorboard and sft.json (settings, digests of the
files). The last line on standard output is one JSON object: steps, rows, tokens, loss_first, loss_last, resumed_after,
seconds_to_first_step, seconds_per_step, seconds, skipped, model.

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""
MANIFEST = "sft.json"
SECONDS_BETWEEN_LINES = 5.0


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration. Raises ConfigError."""
    config = compose_config(overrides)
    sft_config(config)
    return config


def run(config: DictConfig, console: RunConsole | None = None) -> dict[str, Any]:
    """Fine-tunes, in an existing Ray cluster or one of its own; returns the summary.

    A run that ``sft.out`` holds finished, with the same settings, is not repeated: its summary comes back with
    ``skipped`` true.

    Raises:
        ConfigError: the configuration, a row, the model, the folder or the cluster does not fit; before Ray starts,
            except for the cluster.
    """
    started = time.perf_counter()
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    block = sft_config(config)
    prepare_environment(config.run.platform)
    folder = Path(str(block.out)).absolute()
    check_attention(config)
    check_loggers(config)
    rows = _read_rows(config, block)
    check_writable(folder, "sft.out")
    asked = _settings(config, block)
    before = _check_folder(folder, asked)
    steps = block.total_steps(len(rows))
    if before.get("finished") and _model_is_there(folder):
        summary = before["summary"] | {"skipped": True, "model": str(folder / "model")}
        with console or RunConsole(folder / "run.log", steps, config.run.quiet) as screen:
            screen.note(f"{folder} holds this run, finished")
            screen.summary(summary)
        return summary
    resume = _resume_step(config, folder / "checkpoints")
    files = RunFiles(folder)
    with (
        files,
        console
        or RunConsole(
            files.log_path, steps, config.run.quiet, start_step=resume, tail_lines=config.run.log_tail
        ) as screen,
    ):
        files.truncate_to_step(resume)
        files.write_config(config)
        manifest = {"settings": asked, "digest": _digest(asked), "files": list(block.files), "versions": versions()}
        _write_manifest(folder, manifest | {"finished": False})
        screen.phase(f"{len(rows)} sequences, {rows.trained()} tokens to train on, {steps} steps into {folder}")
        if resume:
            screen.note(f"resuming after step {resume} of {steps}")
        progress = _Progress(files, screen, started, steps)
        _train(config, block, steps, folder, progress, screen)
        summary = _summary(files, progress, rows, resume)
        summary |= {"seconds": round(time.perf_counter() - started, 1), "skipped": False}
        summary["model"] = str(folder / "model")
        _write_manifest(folder, manifest | {"finished": True, "summary": summary})
        screen.summary(summary)
    return summary


def _read_rows(config: DictConfig, block: SftConfig) -> SftRows:
    """The rows, checked against the settings and the model."""
    from transformers import AutoConfig

    from verl_ext.model_identity import local_folder
    from verl_ext.sft_rows import read_sft_rows

    model = config.actor_rollout_ref.model
    folder = local_folder(str(model.path))
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code).get_text_config()
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"actor_rollout_ref.model.path: {folder} cannot be read: {error}") from error
    rows = read_sft_rows(block.files)
    rows.check(max_length=block.max_length, vocabulary=found.vocab_size)
    longest = int(rows.lengths().max())
    positions = model.override_config.get("max_position_embeddings") or found.max_position_embeddings
    if longest > positions:
        row = int(rows.lengths().argmax())
        raise ConfigError(f"{rows.where(row)}: {longest} tokens; allowed: up to the model's {positions} positions")
    return rows


def _settings(config: DictConfig, block: SftConfig) -> dict[str, Any]:
    """What decides the result, by key."""
    from verl_ext.model_identity import model_identity

    engine = config.actor_rollout_ref.actor.fsdp_config
    return {
        **{f"sft.{key}": value for key, value in block.deciding().items()},
        "run.seed": config.run.seed,
        "weights of actor_rollout_ref.model.path": model_identity(str(config.actor_rollout_ref.model.path))[
            "fingerprint"
        ],
        "contents of sft.files": [sha256_of(Path(name)) for name in block.files],
        "actor_rollout_ref.actor.fsdp_config.model_dtype": engine.model_dtype,
        "actor_rollout_ref.actor.fsdp_config.mixed_precision": OmegaConf.to_container(engine)["mixed_precision"],
    }


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_atomically(folder / MANIFEST, json_line(manifest, MANIFEST) + "\n")


def _check_folder(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an earlier run with these settings, {} where there is none. Raises ConfigError for another."""
    path = folder / MANIFEST
    if not path.exists():
        for name in ("model", "checkpoints", "metrics.jsonl"):
            if (folder / name).exists():
                raise ConfigError(f"sft.out {folder} holds {name} but no {MANIFEST}; choose another folder")
        return {}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        settings = dict(before["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); choose another folder") from error
    for key in sorted(set(settings) | set(asked)):
        if settings.get(key) != asked.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key}={settings.get(key)!r}, this one has {asked.get(key)!r}; "
                "use the same value or choose another folder"
            )
    return before


def _model_is_there(folder: Path) -> bool:
    from verl_ext.model_identity import weights_fingerprint

    try:
        return bool(weights_fingerprint(folder / "model"))
    except ConfigError:
        return False


def _resume_step(config: DictConfig, checkpoints: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one; other checkpoints, which may be torn, are removed."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    text = tracker.read_text().strip() if tracker.exists() else "0"
    if not text.isdigit():
        raise ConfigError(f"{tracker} holds {text!r}, expected a step number; write the last whole step into it")
    newest = checkpoints / f"global_step_{text}"
    if tracker.exists():
        ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
        found = {int(re.findall(r"\d+", path.name)[0]) for path in newest.glob("model_world_size_*_rank_*.pt")}
        if found != {ranks}:
            raise ConfigError(
                f"checkpoint {newest} was written by {sorted(found)} ranks, this run has {ranks}; set "
                "trainer.n_gpus_per_node x trainer.nnodes as before or choose another folder"
            )
    for path in checkpoints.glob("global_step_*"):
        if path != newest:
            shutil.rmtree(path)
    return int(text)


def _train(
    config: DictConfig, block: SftConfig, steps: int, folder: Path, progress: _Progress, screen: RunConsole
) -> None:
    """Trains what is left to train and puts the model folder in place."""
    partial = folder / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    files = [str(Path(name).absolute()) for name in block.files]
    asked = verl_sft_config(config, block, files=files, checkpoints=folder / "checkpoints", steps=steps)
    screen.phase("starting Ray")
    with PREEMPTION.telling(screen.urgent), beating(folder), importing("verl_ext.sft_trainer"), ray_cluster(config):
        beat(START)
        from verl_ext.sft_trainer import fine_tune

        with running_loggers(config, lambda text: screen.note(f"warning: {text}")) as progress.loggers:
            screen.phase("starting workers")
            made = fine_tune(asked, progress, seed=config.run.seed, folder=partial, phase=screen.phase)
    place = folder / "model"
    # One that is there is of a run that was stopped between this and its last line.
    shutil.rmtree(place, ignore_errors=True)
    os.replace(made, place)
    shutil.rmtree(partial)
    if not _model_is_there(folder):
        raise RuntimeError(f"{place} was written without config.json or weights")


class _Progress:
    """Every step into metrics.jsonl; a line every few seconds, with loss and time left."""

    def __init__(self, files: RunFiles, screen: RunConsole, started: float, steps: int) -> None:
        self._files, self._screen, self._started, self._steps = files, screen, started, steps
        self._clock = StepClock(steps)
        self._last = -math.inf
        self.loggers = Loggers()
        self.seconds_to_first_step: float | None = None
        self.step_seconds: list[float] = []

    def __call__(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = time.perf_counter() - self._started
        else:
            self.step_seconds.append(values["time/step"])
        self.loggers.log(step, self._files.append_metrics(step, values | self.loggers.counts()))
        left = self._clock.add(step, now, values["time/step"])
        if not math.isfinite(values["grad_norm"]):
            self._screen.note(f"warning: step {step} was skipped, its loss or gradient is not finite")
        if now - self._last < SECONDS_BETWEEN_LINES and step < self._steps:
            return
        self._last = now
        shown = "  ".join(f"{name} {format_number(values[name])}" for name in ("loss", "grad_norm", "lr"))
        self._screen.progress(step, f"epoch {values['epoch']}  {shown}  tokens {values['tokens']}", left)


def _summary(files: RunFiles, progress: _Progress, rows: SftRows, resume: int) -> dict[str, Any]:
    records = files.read_metrics()
    seconds = progress.step_seconds
    return {
        "steps": records[-1]["step"],
        "rows": len(rows),
        "tokens": sum(record["tokens"] for record in records),
        "loss_first": records[0]["loss"],
        "loss_last": records[-1]["loss"],
        "resumed_after": resume,
        "seconds_to_first_step": progress.seconds_to_first_step and round(progress.seconds_to_first_step, 2),
        "seconds_per_step": round(sum(seconds) / len(seconds), 3) if seconds else None,
    }


def help_text() -> str:
    """What `--help` prints."""
    return HELP.format(groups=preset_lines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    return command_line(
        arguments,
        help_text=help_text,
        config_name="train",
        run=lambda overrides: run(compose(overrides)),
        refusals=ConfigError,
    )


if __name__ == "__main__":
    sys.exit(main())
