"""Drawing into stores from one set of rollout servers, which start with the first sample that is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.cluster import importing, ray_cluster
from recipe.console import RunConsole
from recipe.environment import versions
from verl_ext.config import ConfigError
from verl_ext.sample_store import SampleStore
from verl_ext.sampling import Client, Sampler, SampleRequest, SampleResult, SamplingSettings, plan_jobs, store_settings
from verl_ext.sampling_prompts import PromptBuilder
from verl_ext.verifier_config import verifier_config
from verl_ext.verifier_watch import VerifierWatch

SECONDS_BETWEEN_LINES = 5.0
VERDICTS_BETWEEN_LOOKS = 64


class Drawer:
    """Context manager that draws into any number of stores; what it started is ended on leaving.

    Attributes:
        tokenizer: as verl's workers load it.
        template_kwargs: ``data.apply_chat_template_kwargs``, and laid over them those given.
        prompts: makes the ids that the servers see.
        verifier: judges every sample.
        max_model_len: of the servers; None where neither the configuration nor the model bounds it.
    """

    def __init__(
        self,
        config: DictConfig,
        *,
        checkpoint: str | None,
        verify_workers: int,
        concurrency: int,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Reads the model folder; starts nothing. With a ``checkpoint`` the model's path is changed in ``config``.

        Args:
            template_kwargs: arguments of the chat template beside those of the configuration, which they override.

        Raises:
            ConfigError: the model, its tokenizer or the verifier cannot be used.
        """
        from verl_ext.model_identity import local_folder, model_identity
        from verl_ext.verification import Verifier

        use_checkpoint(config, checkpoint)
        model = config.actor_rollout_ref.model
        self._config, self._concurrency = config, concurrency
        self._identity = model_identity(model.path)
        self._weights = local_folder(model.path)
        self.tokenizer = load_tokenizer(config)
        self.template_kwargs = chat_template_kwargs(config) | dict(template_kwargs or {})
        self.prompts = PromptBuilder(self.tokenizer, self.template_kwargs)
        self.max_model_len = config.actor_rollout_ref.rollout.max_model_len or _position_limit(self._weights)
        self.verifier = Verifier.from_config(config, workers=verify_workers)
        self._open = ExitStack()
        self._open.callback(self.verifier.close)
        self._client: tuple[Client, list[int]] | None = None

    def __enter__(self) -> Drawer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def store(self, folder: Path, settings: SamplingSettings, more: Mapping[str, Any] | None = None) -> SampleStore:
        """Opens the store of these settings, to be closed by the caller; ``more`` are further settings of it.

        Raises StoreError where the folder holds a store of other settings.
        """
        stored = store_settings(self._identity, settings, self.prompts, self.verifier) | dict(more or {})
        return SampleStore(folder, stored, info={"versions": versions()})

    def draw(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        store: SampleStore,
        screen: RunConsole,
        *,
        before: int = 0,
    ) -> int:
        """Draws what the store lacks; the number of new samples.

        Everything that can go wrong without a server does so before one starts. ``before``: samples of other stores
        that the console's count includes.

        Raises:
            PromptError, StoreError: as :func:`verl_ext.sampling.plan_jobs`; before anything is drawn.
        """
        missing = plan_jobs(requests, settings, self.prompts, store, self.max_model_len)
        if not missing:
            screen.note("the store holds them all")
            return 0
        if self._client is None:
            screen.note(f"{len(missing)} samples are missing; starting Ray and the rollout servers")
            self._client = self._open.enter_context(rollout_client(self._config, self._weights))
        client, stop_token_ids = self._client
        sampler = Sampler(
            client,
            self.tokenizer,
            settings,
            self.verifier,
            template_kwargs=self.template_kwargs,
            max_model_len=self.max_model_len,
            stop_token_ids=stop_token_ids,
            concurrency=self._concurrency,
        )
        screen.phase("sampling")
        done = before + len(requests) * settings.k - len(missing)
        report = _Progress(screen, done, verifier_config(self._config.verifier).max_error_rate)
        return len(sampler.run(requests, store, report))


def use_checkpoint(config: DictConfig, checkpoint: str | None) -> None:
    """Puts the checkpoint's weights and tokenizer in the model's place. Raises ConfigError where it holds none."""
    from verl_ext.model_identity import checkpoint_weights

    if checkpoint:
        model = config.actor_rollout_ref.model
        with open_dict(config):
            model.path = str(checkpoint_weights(checkpoint).absolute())
            model.tokenizer_path = None


def chat_template_kwargs(config: DictConfig) -> dict[str, Any]:
    """``data.apply_chat_template_kwargs``."""
    return OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create())


@contextmanager
def rollout_client(config: DictConfig, weights: Path) -> Iterator[tuple[Client, list[int]]]:
    """Ray, rollout servers with the model's weights, their client, and the end tokens that vLLM stops at."""
    with importing("verl.workers.rollout.llm_server"), ray_cluster(config):
        from verl_ext.rollout_servers import standalone_servers, stop_token_ids

        with standalone_servers(config) as servers:
            yield servers.get_client(), stop_token_ids(weights)


def load_tokenizer(config: DictConfig) -> Any:
    """As verl's workers load it. Raises ConfigError."""
    from verl.utils import hf_tokenizer

    model = config.actor_rollout_ref.model
    path = model.get("tokenizer_path") or model.path
    try:
        tokenizer = hf_tokenizer(path, trust_remote_code=model.get("trust_remote_code", False))
    except Exception as error:
        raise ConfigError(f"the tokenizer of {path} cannot be loaded: {error}") from error
    if model.get("custom_chat_template"):
        tokenizer.chat_template = model.custom_chat_template
    return tokenizer


def _position_limit(folder: Path) -> int | None:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return settings.get("max_position_embeddings") or settings.get("text_config", {}).get("max_position_embeddings")


class _Progress:
    """A line every few seconds, with the share of right answers so far and the time left; stops a broken verifier."""

    def __init__(self, screen: RunConsole, done_before: int, max_error_rate: float) -> None:
        self._screen, self._done_before = screen, done_before
        self._watch = VerifierWatch(max_error_rate, lambda text: screen.note(f"warning: {text}"))
        self._results: list[SampleResult] = []
        self._first: float | None = None
        self._last = 0.0
        self._right = self._judged = 0.0

    def __call__(self, result: SampleResult, done: int, total: int) -> None:
        if result.acc is not None:
            self._right += result.acc
            self._judged += 1
        self._results.append(result)
        if done % VERDICTS_BETWEEN_LOOKS == 0 or done == total:
            self._watch.look(
                "sampling",
                [{"status": row.status, "error": row.error} for row in self._results],
                lambda i: f"question {self._results[i].question_id}, response {self._results[i].text[:80]!r}",
            )
        now = time.monotonic()
        if self._first is None:
            # The first one takes the servers' warm-up; the pace is measured from here.
            self._first = self._last = now
        if now - self._last < SECONDS_BETWEEN_LINES and done < total:
            return
        self._last = now
        right = f"{self._right / self._judged:.3f} right" if self._judged else "none judged"
        left = (now - self._first) / max(1, done - 1) * (total - done)
        self._screen.progress(self._done_before + done, f"samples, {right}", left)
