"""The typed ``sft`` block of `python -m recipe.sft`, and verl's SFT configuration made from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.config import ConfigError

SCHEDULES = ("cosine", "constant")
CHECKPOINTS_KEPT = 2
"""verl removes an old checkpoint before the new one is whole; with two there is always one to resume from."""


@dataclass
class SftConfig:
    """What is fine-tuned on, how, and where to. Learning rate to weight decay: SD-Zero's published code.

    Attributes:
        files: parquet files with the columns of verl_ext/sft_rows.py.
        out: folder of checkpoints, metrics and, in ``model``, the result. A finished run is skipped, an interrupted one
            resumed, one of other settings refused.
        lr: highest learning rate.
        epochs: passes over the rows.
        steps: optimiser steps in all, instead of ``epochs``; rows are gone through again as often as that takes.
        batch_size: sequences of an optimiser step, over all ranks.
        max_length: tokens of a sequence; a longer one is refused.
        schedule: ``cosine`` falls to ``min_lr_ratio`` x lr at the last step, ``constant`` stays.
        warmup: share of the steps in which the learning rate rises from 0, rounded down to whole steps.
        min_lr_ratio: where the cosine ends, as a share of lr.
        weight_decay, betas: of AdamW.
        clip: largest norm of the gradient.
        save_every: checkpoint to resume from every so many steps; -1: only where the run is preempted.
        max_tokens_per_gpu: of a micro-batch; None: max_length. Changes speed and memory only.
    """

    files: list[str] | None = None
    out: str | None = None
    lr: float = 5e-6
    epochs: int = 3
    steps: int | None = None
    batch_size: int = 64
    max_length: int = 32768
    schedule: str = "cosine"
    warmup: float = 0.05
    min_lr_ratio: float = 0.0
    weight_decay: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float = 1.0
    save_every: int = -1
    max_tokens_per_gpu: int | None = None

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        if not self.files:
            raise ConfigError("sft.files has no value; give parquet files of token sequences, sft.files=[X.parquet]")
        if not isinstance(self.files, list) or not all(isinstance(name, str) and name for name in self.files):
            raise ConfigError(f"sft.files is {self.files!r}; allowed: a list of files")
        if not self.out:
            raise ConfigError("sft.out has no value; give the folder of the result, sft.out=DIR")
        for key, low in (("epochs", 1), ("steps", 1), ("batch_size", 1), ("max_length", 2), ("max_tokens_per_gpu", 1)):
            value = getattr(self, key)
            if value is None and key in ("steps", "max_tokens_per_gpu"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"sft.{key} is {value!r}; allowed: a whole number from {low}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"sft.schedule is {self.schedule!r}; allowed: {', '.join(SCHEDULES)}")
        for key, allowed, right in (
            ("lr", "a number above 0", lambda x: x > 0),
            ("clip", "a number above 0", lambda x: x > 0),
            ("weight_decay", "a number from 0", lambda x: x >= 0),
            ("warmup", "a share from 0 to below 1", lambda x: 0 <= x < 1),
            ("min_lr_ratio", "a share from 0 to 1", lambda x: 0 <= x <= 1),
        ):
            if not (_is_number(getattr(self, key)) and right(getattr(self, key))):
                raise ConfigError(f"sft.{key} is {getattr(self, key)!r}; allowed: {allowed}")
        betas = self.betas
        if not (isinstance(betas, list) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)):
            raise ConfigError(f"sft.betas is {betas!r}; allowed: two numbers from 0 to below 1")
        every = self.save_every
        if isinstance(every, bool) or not isinstance(every, int) or every == 0 or every < -1:
            raise ConfigError(f"sft.save_every is {every!r}; allowed: a whole number from 1, or -1 for the end only")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps over so many rows; the rows of an epoch that do not fill a batch take one too."""
        return self.epochs * math.ceil(rows / self.batch_size) if self.steps is None else self.steps

    def deciding(self) -> dict[str, Any]:
        """The keys that decide the result."""
        found = asdict(self)
        for key in ("files", "out", "save_every", "max_tokens_per_gpu", "epochs" if self.steps is not None else ""):
            found.pop(key, None)
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def sft_config(config: DictConfig) -> SftConfig:
    """The checked ``sft`` block. Raises ConfigError."""
    settings = SftConfig(**OmegaConf.to_container(config.sft, resolve=True))
    settings.validate()
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    parallel = actor.ulysses_sequence_parallel_size
    if settings.max_tokens_per_gpu is not None and settings.max_tokens_per_gpu * parallel < settings.max_length:
        raise ConfigError(
            f"sft.max_tokens_per_gpu is {settings.max_tokens_per_gpu}; allowed: at least sft.max_length = "
            f"{settings.max_length} over the {parallel} ranks that share a sequence"
        )
    if model.lora_rank:
        raise ConfigError(f"actor_rollout_ref.model.lora_rank is {model.lora_rank}; allowed: 0 (all weights are tuned)")
    return settings


def verl_sft_config(
    config: DictConfig, settings: SftConfig, *, files: list[str], checkpoints: Path, steps: int
) -> DictConfig:
    """verl's ``sft_trainer_engine`` configuration; model, engine, precision and ranks are those of the run's actor."""
    whole = OmegaConf.to_container(config, resolve=True)
    actor, trainer = whole["actor_rollout_ref"]["actor"], whole["trainer"]
    tokens = settings.max_tokens_per_gpu or settings.max_length
    return OmegaConf.create(
        {
            "model": whole["actor_rollout_ref"]["model"],
            "engine": actor["fsdp_config"]
            | {
                # As verl's actor does.
                "strategy": actor["strategy"],
                "ulysses_sequence_parallel_size": actor["ulysses_sequence_parallel_size"],
                "use_dynamic_bsz": True,
                "max_token_len_per_gpu": tokens,
            },
            "optim": actor["optim"]
            | {
                "lr": settings.lr,
                "weight_decay": settings.weight_decay,
                "betas": settings.betas,
                "clip_grad": settings.clip,
                "lr_scheduler_type": settings.schedule,
                "lr_warmup_steps": -1,
                "lr_warmup_steps_ratio": settings.warmup,
                "min_lr_ratio": settings.min_lr_ratio,
                "warmup_style": None,
            },
            # What a run resumes from; the model folder is written once, at the end.
            "checkpoint": actor["checkpoint"] | {"save_contents": ["model", "optimizer", "extra"]},
            "profiler": actor["profiler"],
            "data": {
                "train_files": files,
                "val_files": None,
                "train_batch_size": settings.batch_size,
                "use_dynamic_bsz": True,
                "max_token_len_per_gpu": tokens,
                "micro_batch_size_per_gpu": None,
                "pad_mode": "no_padding",
                "max_length": settings.max_length,
                "custom_cls": {"path": "pkg://verl_ext.sft_rows", "name": "TokenRows"},
            },
            "trainer": {
                "default_local_dir": str(checkpoints),
                "total_training_steps": steps,
                "save_freq": settings.save_every,
                "max_ckpt_to_keep": CHECKPOINTS_KEPT,
                "resume_mode": "auto",
                "profile_interval": [-1, -1],
                **{key: trainer[key] for key in ("device", "nnodes", "n_gpus_per_node")},
            },
        }
    )


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(SftConfig())
