"""The typed ``run`` block: where a run writes, how long it goes, on what it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from recipe.checkpoints import VERIFY
from verl_ext.config import ConfigError


@dataclass
class RunConfig:
    """Settings of one training run.

    Attributes:
        output_dir: folder of everything the run writes. A folder that holds checkpoints is resumed. None: a new one
            under ``outputs/``.
        seed: of data order, rollouts, demonstrations and initialisation.
        steps: trainer steps in all.
        val_every: validate every so many steps and after the last (-1: never after the start).
        val_before: validate before the first step.
        val_samples: samples per question in validation (the k of mean@k).
        save_every: checkpoint every so many steps (-1: only where the run is preempted).
        keep_checkpoints: newest complete checkpoints that are kept (-1: all).
        keep_best: beside them, keep the one whose own step validated best.
        verify_checkpoints: before a checkpoint is loaded, read every byte of it (``full``) or compare names and sizes
            (``size``).
        start_over: a folder whose run was ended before its first checkpoint is begun anew; otherwise it is refused.
        step_timeout: seconds that one phase of a step (rollout, update, checkpoint, validation) may take; then the run
            ends with the stacks of its processes in a file (-1: no limit).
        platform: ``cpu`` for a machine without an accelerator, None to let verl find one.
        quiet: no line per step.
        log_tail: lines of the log shown when something fails.
        ray_num_cpus: logical CPUs of a Ray cluster that this run starts; None: as many as its actors ask for.
        overrides: the words of the command line, or of a study's entry, that this configuration was composed from; it
            is filled in, whatever it is set to.
    """

    output_dir: str | None = None
    seed: int = 0
    steps: int = 40
    val_every: int = 20
    val_before: bool = True
    val_samples: int = 8
    save_every: int = -1
    keep_checkpoints: int = -1
    keep_best: bool = True
    verify_checkpoints: str = "full"
    start_over: bool = False
    step_timeout: float = 7200.0
    platform: str | None = None
    quiet: bool = False
    log_tail: int = 40
    ray_num_cpus: int | None = None
    overrides: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        for key, low in (("steps", 1), ("val_samples", 1), ("log_tail", 0), ("seed", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"run.{key} is {value!r}; allowed: a whole number from {low}")
        for key, off in (("val_every", "never"), ("save_every", "never"), ("keep_checkpoints", "all")):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value == 0 or value < -1:
                raise ConfigError(f"run.{key} is {value!r}; allowed: a whole number from 1, or -1 for {off}")
        if not isinstance(self.start_over, bool):
            raise ConfigError(f"run.start_over is {self.start_over!r}; allowed: true or false")
        limit = self.step_timeout
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not (limit > 0 or limit == -1):
            raise ConfigError(f"run.step_timeout is {limit!r}; allowed: seconds above 0, or -1 for no limit")
        if not isinstance(self.keep_best, bool):
            raise ConfigError(f"run.keep_best is {self.keep_best!r}; allowed: true, false")
        if self.verify_checkpoints not in VERIFY:
            raise ConfigError(f"run.verify_checkpoints is {self.verify_checkpoints!r}; allowed: {', '.join(VERIFY)}")
        if self.platform not in (None, "cpu"):
            raise ConfigError(f"run.platform is {self.platform!r}; allowed: cpu or null")


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(RunConfig())
