"""The typed ``evaluation`` block of `python -m recipe.evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.config import ConfigError
from verl_ext.config_values import build


@dataclass
class EvaluationConfig:
    """How samples are summarised. What is drawn, and where to, stands in the block ``sample``.

    Attributes:
        setting: name of the preset of sampling settings, for the record.
        source: what it follows, for the record.
        ks: of pass@k; None: 1 to ``sample.k``.
        level: of confidence of the intervals.
        check_gold: put the data's own right answers before the verifier first, and refuse a verifier that does not
            accept them.
    """

    setting: str | None = None
    source: str | None = None
    ks: list[int] | None = None
    level: float = 0.95
    check_gold: bool = True

    def validate(self, samples: int) -> None:
        """Raises ConfigError with the key, the value and what is allowed; ``samples`` is ``sample.k``."""
        for k in self.ks or ():
            if isinstance(k, bool) or not isinstance(k, int) or k < 1:
                raise ConfigError(f"evaluation.ks holds {k!r}; allowed: whole numbers from 1")
            if k > samples:
                raise ConfigError(
                    f"evaluation.ks holds {k}; allowed: at most sample.k = {samples}, because pass@{k} needs {k} "
                    "samples of every question"
                )
        if not 0 < self.level < 1:
            raise ConfigError(f"evaluation.level is {self.level!r}; allowed: a share between 0 and 1")


def evaluation_config(config: DictConfig) -> EvaluationConfig:
    """The checked ``evaluation`` block. Raises ConfigError."""
    settings = build(EvaluationConfig, OmegaConf.to_container(config.evaluation, resolve=True), "evaluation")
    settings.validate(config.sample.k)
    return settings


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(EvaluationConfig())
