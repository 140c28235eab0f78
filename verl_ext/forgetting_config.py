"""The typed ``forgetting`` block. Cheap to import: settings are read before verl may be."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import OmegaConf

from verl_ext.config_values import ConfigError, build
from verl_ext.sampling import SamplingSettings


@dataclass
class ForgettingConfig:
    """What is asked before the first and after the last step.

    Attributes:
        files: parquet files; empty: nothing is asked.
        samples: per question.
        temperature: of the samples; 0 is greedy and allows one sample.
        max_tokens: of a response; None: data.max_response_length.
        function, options: the verifier of these files; None: that of the block ``verifier``.
    """

    files: list[str] = field(default_factory=list)
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None
    function: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        try:
            self.sampling(1)
        except ValueError as error:
            raise ConfigError(f"forgetting: {error}") from error
        if self.options and self.function is None:
            raise ConfigError("forgetting.options belong to forgetting.function, which has no value")

    def sampling(self, max_tokens: int, seed: int = 0) -> SamplingSettings:
        """The sampler's settings; ``max_tokens`` where the block has none."""
        return SamplingSettings(
            temperature=self.temperature,
            max_tokens=max_tokens if self.max_tokens is None else self.max_tokens,
            k=self.samples,
            seed=seed,
        )


def forgetting_config(values: Any) -> ForgettingConfig:
    """Builds and validates the block from a mapping or an OmegaConf node. Raises ConfigError."""
    if values is not None and not isinstance(values, dict):
        values = OmegaConf.to_container(values, resolve=True)
    settings = build(ForgettingConfig, values, "forgetting")
    settings.validate()
    return settings


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(ForgettingConfig())
