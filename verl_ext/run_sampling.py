"""The one sampler inside a run: on the trainer's own rollout servers, with the student's weights of the moment.

For pass rates that a run takes itself (PACED: before the first step, at the midpoint, every n steps) and for held-out
accuracy before and after (forgetting). Samples go into a store below the run's folder, so a run that was killed while
it sampled goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_ext.model_identity import local_folder, model_identity
from verl_ext.rollout_servers import stop_token_ids
from verl_ext.sample_store import SampleStore
from verl_ext.sampling import Client, Sampler, SampleRequest, SampleResult, SamplingSettings, store_settings
from verl_ext.sampling_prompts import PromptBuilder
from verl_ext.verification import Verifier
from verl_ext.verifier_config import verifier_config
from verl_ext.verifier_watch import VerifierWatch

SECONDS_BETWEEN_SIGNS = 5.0


def rollout_settings(config: DictConfig, samples: int) -> SamplingSettings:
    """How the run draws its training rollouts, for ``samples`` of every question."""
    rollout = config.actor_rollout_ref.rollout
    return SamplingSettings(
        temperature=float(rollout.temperature),
        top_p=float(rollout.top_p),
        top_k=int(rollout.top_k),
        max_tokens=int(config.data.max_response_length),
        k=samples,
        seed=int(config.run.seed),
    )


def prompt_builder(config: DictConfig, tokenizer: Any) -> PromptBuilder:
    """Prompts as the run's rollouts have them."""
    return PromptBuilder(tokenizer, dict(config.data.get("apply_chat_template_kwargs") or {}))


def expected_rollouts(config: DictConfig, tokenizer: Any) -> dict[str, Any]:
    """Settings that a store of this run's own starting pass rates would have."""
    verifier = Verifier.from_config(config, workers=1)
    try:
        identity = model_identity(config.actor_rollout_ref.model.path)
        return store_settings(identity, rollout_settings(config, 1), prompt_builder(config, tokenizer), verifier)
    finally:
        verifier.close()


class RunSampling:
    """Draws samples while the rollout servers are awake (before a step, or in a validation)."""

    def __init__(
        self,
        config: DictConfig,
        client: Client,
        tokenizer: Any,
        warn: Callable[[str], None],
        working: Callable[[str, float | None], None] = lambda text, seconds_left: None,
    ) -> None:
        """``working`` is told what is being drawn and the seconds left, several times a minute."""
        self._config, self._client, self._tokenizer, self._warn = config, client, tokenizer, warn
        self._working = working
        # Read once: the folder may change while the run goes on.
        self._model = model_identity(config.actor_rollout_ref.model.path)
        self._stop = stop_token_ids(local_folder(config.actor_rollout_ref.model.path))

    def draw(
        self,
        requests: Sequence[SampleRequest],
        folder: Path,
        settings: SamplingSettings,
        *,
        step: int,
        what: str,
        config: DictConfig | None = None,
    ) -> None:
        """Draws what the store in ``folder`` lacks.

        Args:
            requests: the questions.
            settings: how samples are drawn.
            step: optimiser steps that the weights have seen: part of the store's identity.
            what: the samples are for, in words.
            config: another one, whose verifier judges.

        Raises:
            PromptError, StoreError: a prompt or the store does not fit.
            VerifierBroken: more verdicts failed than ``verifier.max_error_rate`` allows.
        """
        config = config if config is not None else self._config
        identity: Mapping[str, Any] = self._model | ({"step": step} if step else {})
        verifier = Verifier.from_config(config)
        prompts = prompt_builder(config, self._tokenizer)
        try:
            with SampleStore(folder, store_settings(identity, settings, prompts, verifier)) as store:
                sampler = Sampler(
                    self._client,
                    self._tokenizer,
                    settings,
                    verifier,
                    template_kwargs=dict(config.data.get("apply_chat_template_kwargs") or {}),
                    max_model_len=config.actor_rollout_ref.rollout.max_model_len,
                    stop_token_ids=self._stop,
                )

                # In a thread of its own: asyncio.run would leave the caller's without an event loop, which verl uses.
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(asyncio.run, sampler.collect(requests, store, self._said(what))).result()
                self._look(folder, list(store.rows()), config)
        finally:
            verifier.close()

    def _said(self, what: str) -> Callable[[SampleResult, int, int], None]:
        started = said = time.monotonic()

        def on_result(_: SampleResult, done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= SECONDS_BETWEEN_SIGNS:
                said = now
                self._working(f"{what}: {done} of {total} samples", (now - started) / done * (total - done))

        return on_result

    def _look(self, folder: Path, rows: list[dict[str, Any]], config: DictConfig) -> None:
        VerifierWatch(verifier_config(config.verifier).max_error_rate, self._warn).look(
            str(folder), rows, lambda i: f"question {rows[i]['question_id']}, response {rows[i]['text'][:80]!r}"
        )
