"""The typed ``sample`` block of `python -m recipe.sample`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.config import ConfigError
from verl_ext.sampling import SamplingSettings

SPLITS = ("train", "test")


@dataclass
class SampleConfig:
    """What to sample, and where to.

    Attributes:
        out: folder of the store. A store that is there is topped up; one of other settings is refused.
        k: samples per question.
        split: ``train`` (data.train_files) or ``test`` (data.val_files).
        limit: only the first so many questions; None: all.
        temperature, top_p, top_k: as in vLLM.
        max_tokens: of a response; None: data.max_response_length.
        seed: every sample's own seed comes from this one; None: unseeded.
        context: the model reads the teacher's prompt, made by ``distill.context`` (kind ``reference``) of a question.
        checkpoint: model folder, or a checkpoint that holds one, to sample from; None: the model's own weights.
        concurrency: requests under way at a time.
        verify_workers: threads of the verifier.
    """

    out: str | None = None
    k: int = 8
    split: str = "test"
    limit: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = None
    seed: int | None = 0
    context: bool = False
    checkpoint: str | None = None
    concurrency: int = 256
    verify_workers: int = 8

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        if not self.out:
            raise ConfigError("sample.out has no value; give the folder of the store, sample.out=DIR")
        if self.split not in SPLITS:
            raise ConfigError(f"sample.split is {self.split!r}; allowed: {', '.join(SPLITS)}")
        for key in ("k", "limit", "max_tokens", "concurrency", "verify_workers"):
            value = getattr(self, key)
            if value is None and key in ("limit", "max_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"sample.{key} is {value!r}; allowed: a whole number from 1")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ConfigError(f"sample.seed is {self.seed!r}; allowed: a whole number, or null for none")
        if not isinstance(self.context, bool):
            raise ConfigError(f"sample.context is {self.context!r}; allowed: true, false")
        self.sampling(1)

    def sampling(self, default_max_tokens: int) -> SamplingSettings:
        """The sampler's settings."""
        try:
            return SamplingSettings(
                temperature=float(self.temperature),
                top_p=float(self.top_p),
                top_k=int(self.top_k),
                max_tokens=self.max_tokens or default_max_tokens,
                k=self.k,
                seed=self.seed,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"sample.{error}") from error


def sample_config(config: DictConfig) -> SampleConfig:
    """The checked ``sample`` block. Raises ConfigError."""
    settings = SampleConfig(**OmegaConf.to_container(config.sample, resolve=True))
    settings.validate()
    if settings.context and config.distill.context.kind != "reference":
        raise ConfigError(
            f"distill.context.kind is {config.distill.context.kind!r}; allowed: reference with sample.context=true, "
            "because no other context exists before there is a rollout"
        )
    return settings


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(SampleConfig())
