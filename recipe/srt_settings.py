"""The typed ``srt`` block of `python -m recipe.srt`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.sample_settings import SPLITS
from verl_ext.config import ConfigError
from verl_ext.config_values import build
from verl_ext.revision import PLACEMENTS
from verl_ext.sampling import SamplingSettings

LOSSES = ("joint", "generation", "revision", "two_stage")
_COUNTS = ("attempts", "concurrency", "verify_workers")
_OPTIONAL_COUNTS = (
    *("limit", "max_tokens", "revision_max_tokens", "max_traces", "per_attempt", "per_question"),
    *("generation_rows", "revision_rows", "max_length"),
)


@dataclass
class SrtConfig:
    """What is collected for self-revision training, and what rows are made of it (SD-Zero, arXiv 2604.12002).

    Attributes:
        out: folder of the two stores, ``traces.parquet``, the training rows and ``manifest.json``.
        split: ``train`` (data.train_files) or ``test`` (data.val_files).
        limit: questions; None: all.
        skip: the first so many questions are left out, so that a later phase sees fresh ones.
        attempts: first responses per question.
        revisions: drawn per attempt; 0: none, and the rows are the right attempts behind their prompts
            (rejection-sampling fine-tuning, RFT).
        revise_right: rephrase right attempts (the paper; off in the public code).
        revise_wrong: correct wrong attempts.
        temperature, top_p, top_k: as in vLLM, of both rounds.
        max_tokens: of an attempt; None: data.max_response_length.
        revision_max_tokens: of a revision; None: as max_tokens.
        seed: every sample's own seed comes from this one; None: unseeded.
        concurrency: requests under way at a time.
        verify_workers: threads of the verifier.
        checkpoint: model folder, or a checkpoint that holds one, to sample from; None: the model's own weights.
        max_traces: keep at most so many traces, spread over the questions (6,000 in the paper); None: all.
        per_attempt: keep at most so many right revisions of one attempt, the first ones; None: all.
        per_question: with revisions=0, keep at most so many right attempts of a question, the first ones; None: all, so
            that a question weighs as its pass rate says.
        losses: ``joint`` (both rows of every trace in one file), ``generation`` or ``revision`` alone, or ``two_stage``
            (the public code: one file for each, to be trained on one after the other).
        placement: where the phrase stands in the rows of L_revision: in the ``assistant`` turn (the paper) or at the
            end of the ``user`` turn (the public code).
        generation_rows, revision_rows: sizes of the two stages; None: all.
        max_length: tokens of a training row. Longer ones are left out and counted, never cut; None: no bound.
        write: write traces and training rows; otherwise draw and count only, and no branch may be called empty.
    """

    out: str | None = None
    split: str = "train"
    limit: int | None = None
    skip: int = 0
    attempts: int = 1
    revisions: int = 3
    revise_right: bool = True
    revise_wrong: bool = True
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = -1
    max_tokens: int | None = None
    revision_max_tokens: int | None = None
    seed: int | None = 0
    concurrency: int = 256
    verify_workers: int = 8
    checkpoint: str | None = None
    max_traces: int | None = None
    per_attempt: int | None = None
    per_question: int | None = None
    losses: str = "joint"
    placement: str = "assistant"
    generation_rows: int | None = None
    revision_rows: int | None = None
    max_length: int | None = None
    write: bool = True

    @property
    def branches(self) -> tuple[str, ...]:
        """Which attempts are revised."""
        switched_on = {"right": self.revise_right, "wrong": self.revise_wrong}
        return tuple(branch for branch, on in switched_on.items() if on)

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        if not self.out:
            raise ConfigError("srt.out has no value; give the folder of what is collected, srt.out=DIR")
        for key, allowed in (("split", SPLITS), ("losses", LOSSES), ("placement", PLACEMENTS)):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"srt.{key} is {getattr(self, key)!r}; allowed: {', '.join(allowed)}")
        for key in (*_COUNTS, *_OPTIONAL_COUNTS):
            value = getattr(self, key)
            if value is not None and value < 1:
                or_null = ", or null" if key in _OPTIONAL_COUNTS else ""
                raise ConfigError(f"srt.{key} is {value!r}; allowed: a whole number from 1{or_null}")
        for key in ("skip", "revisions"):
            if getattr(self, key) < 0:
                raise ConfigError(f"srt.{key} is {getattr(self, key)!r}; allowed: a whole number from 0")
        if not self.branches:
            raise ConfigError("srt.revise_wrong is False; allowed: true where srt.revise_right is false, or no branch")
        if self.losses == "two_stage" and not self.revise_wrong:
            raise ConfigError(
                "srt.revise_wrong is False; allowed: true with srt.losses=two_stage, whose first stage trains on "
                "revisions of wrong attempts only"
            )
        for key in ("generation_rows", "revision_rows"):
            if getattr(self, key) is not None and self.losses != "two_stage":
                raise ConfigError(
                    f"srt.{key} is {getattr(self, key)!r}; allowed: null with srt.losses={self.losses}, which has no "
                    "stages (srt.max_traces bounds the traces)"
                )
        self.attempt_sampling(1)
        if self.revisions:
            self.revision_sampling(1)

    def attempt_sampling(self, default_max_tokens: int) -> SamplingSettings:
        """The sampler's settings of the first round."""
        return self._sampling("attempts", self.max_tokens or default_max_tokens)

    def revision_sampling(self, default_max_tokens: int) -> SamplingSettings:
        """The sampler's settings of the second round."""
        return self._sampling("revisions", self.revision_max_tokens or self.max_tokens or default_max_tokens)

    def _sampling(self, count: str, max_tokens: int) -> SamplingSettings:
        try:
            return SamplingSettings(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_tokens=max_tokens,
                k=getattr(self, count),
                seed=self.seed,
            )
        except ValueError as error:
            # The sampler calls k what is a count of ours.
            raise ConfigError(f"srt.{str(error).replace('k is', f'{count} is', 1)}") from error


def srt_config(config: DictConfig) -> SrtConfig:
    """The checked ``srt`` block. Raises ConfigError."""
    settings = build(SrtConfig, OmegaConf.to_container(config.srt, resolve=True), "srt")
    settings.validate()
    return settings


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(SrtConfig())
