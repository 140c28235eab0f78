"""The typed ``chain`` block: methods that are several commands one after the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.config import ConfigError

STAGES = ("collect", "sft", "distil", "evaluate")
MODELS = ("base", "sft", "distil")


@dataclass
class ChainConfig:
    """Which stages `python -m recipe.train` runs instead of one training.

    Attributes:
        stages: out of collect (recipe.srt collect), sft (recipe.sft), distil (the training of the other blocks) and
            evaluate, in this order; empty: no chain. Without collect the student starts from the model itself.
        fresh_questions: distil on the training questions that collect did not ask (those beyond srt.skip + srt.limit,
            and before srt.skip).
        evaluate: which models: base (before the first stage), sft, distil; those that there are.
        evaluate_revisions: revisions per attempt in the evaluation, for the reviser's correction rate; 0: none.
    """

    stages: list[str] = field(default_factory=list)
    fresh_questions: bool = False
    evaluate: list[str] = field(default_factory=lambda: list(MODELS))
    evaluate_revisions: int = 1

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        if sorted(set(self.stages), key=_place) != list(self.stages):
            raise ConfigError(f"chain.stages is {list(self.stages)}; allowed: some of {list(STAGES)}, in this order")
        if ("collect" in self.stages) != ("sft" in self.stages):
            raise ConfigError(f"chain.stages is {list(self.stages)}; allowed: collect and sft together or neither")
        if not set(self.evaluate) <= set(MODELS) or not self.evaluate:
            raise ConfigError(f"chain.evaluate is {list(self.evaluate)}; allowed: some of {list(MODELS)}")
        count = self.evaluate_revisions
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"chain.evaluate_revisions is {count!r}; allowed: a whole number from 0")


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else -1


def chain_config(config: DictConfig) -> ChainConfig:
    """The checked ``chain`` block. Raises ConfigError."""
    settings = ChainConfig(**OmegaConf.to_container(config.chain, resolve=True))
    unknown = [stage for stage in settings.stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"chain.stages names {unknown[0]!r}; allowed: {', '.join(STAGES)}")
    settings.validate()
    return settings


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(ChainConfig())
