"""The typed ``snr`` block of `python -m recipe.snr`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.config import ConfigError
from verl_ext.config_values import build

CENTRES = ("mean", "midpoint")
EDGES = ("exclude", "shrink")


@dataclass
class SnrConfig:
    """Which gradients are measured, and how they are read.

    Attributes:
        out: folder of the gradients and of the report. Questions whose gradient is there are not asked again.
        questions: the first so many of data.train_files; None: all.
        dimensions: of the random projection of a gradient (PACED's figures: 4,096 to 16,384).
        bins: of equal width, of the pass rate.
        centre: what stands for a bin in the fit: the ``mean`` rate of its questions, or its ``midpoint``.
        edges: rates of 0 and 1: ``exclude`` them from the fit, or ``shrink`` k/K to (k + 1/2)/(K + 1).
        resamples: of the bootstrap.
        confidence: of its intervals.
    """

    out: str | None = None
    questions: int | None = 300
    dimensions: int = 4096
    bins: int = 10
    centre: str = "mean"
    edges: str = "exclude"
    resamples: int = 1000
    confidence: float = 0.95

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        if not self.out:
            raise ConfigError("snr.out has no value; give the folder of the result, snr.out=DIR")
        for key, low in (("dimensions", 1), ("bins", 1), ("resamples", 2)):
            if getattr(self, key) < low:
                raise ConfigError(f"snr.{key} is {getattr(self, key)!r}; allowed: a whole number from {low}")
        if self.questions is not None and self.questions < 1:
            raise ConfigError(f"snr.questions is {self.questions!r}; allowed: a whole number from 1, or null for all")
        for key, allowed in (("centre", CENTRES), ("edges", EDGES)):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"snr.{key} is {getattr(self, key)!r}; allowed: {', '.join(allowed)}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"snr.confidence is {self.confidence!r}; allowed: a share between 0 and 1")


def snr_config(config: DictConfig) -> SnrConfig:
    """The checked ``snr`` block."""
    settings = build(SnrConfig, OmegaConf.to_container(config.snr, resolve=True), "snr")
    settings.validate()
    return settings


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(SnrConfig())
