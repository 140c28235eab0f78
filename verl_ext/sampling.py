"""One sampler for everything that needs samples: messages -> K verified samples each, from verl's rollout servers.

The client is that of a running trainer (``trainer.get_llm_client()``, its weights of the moment) or of standalone
servers with the weights of a checkpoint (:mod:`verl_ext.rollout_servers`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from verl_ext.sample_store import SampleStore
from verl_ext.sampling_prompts import PromptBuilder, PromptError, prompt_digest
from verl_ext.verification import Verdict, Verifier

ABORTED = ("aborted", "abort")
ABORT_RETRIES = 60
SECONDS_BETWEEN_RETRIES = 1.0


class Client(Protocol):
    """The part of verl's ``LLMServerClient`` that is used."""

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        """Returns an object with ``token_ids`` and ``stop_reason``."""


@dataclass(frozen=True)
class SampleRequest:
    """One question.

    Attributes:
        question_id: names the question in the store.
        messages: chat messages; the last one is not the assistant's.
        prefix: text of an assistant turn that is begun and shall be continued. The sample's text is what follows it.
        judge_prefix: the verifier sees prefix and text together; otherwise the text alone (a revision stands for
            itself).
        data_source, ground_truth, extra_info: for the verifier, as in the data's schema.
    """

    question_id: str
    messages: Sequence[Mapping[str, Any]]
    prefix: str | None = None
    judge_prefix: bool = True
    data_source: str = ""
    ground_truth: Any = None
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn.

    Attributes:
        temperature, top_p, top_k: as vLLM (top_k -1: all tokens). Temperature 0 is greedy and allows k=1 only.
        max_tokens: of the response.
        k: samples per question. No part of a store's identity: a store can be topped up.
        seed: every sample gets its own seed from this one, its question and its index, so that a resumed store holds
            what an uninterrupted one would. None: unseeded.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 1024
    k: int = 8
    seed: int | None = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0, "a number from 0"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 for all tokens, or a whole number from 1"),
            ("max_tokens", self.max_tokens >= 1, "a whole number from 1"),
            ("k", self.k >= 1, "a whole number from 1"),
            ("k", self.k == 1 or self.temperature > 0, "1 with temperature 0, where all samples would be equal"),
        )
        for name, good, allowed in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

    def identity(self) -> dict[str, Any]:
        """What decides a sample, as a store's settings hold it."""
        return {name: value for name, value in asdict(self).items() if name != "k"}

    def parameters(self, question_id: str, sample: int) -> dict[str, Any]:
        """vLLM's parameters of one sample. A new dict each time: the server takes keys out of it."""
        parameters: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "logprobs": False,
        }
        if self.seed is not None:
            digest = hashlib.sha256(f"{self.seed}:{question_id}:{sample}".encode()).digest()
            parameters["seed"] = int.from_bytes(digest[:8], "big") % 2**31
        return parameters


@dataclass(frozen=True)
class SampleResult:
    """One finished sample; a row of the store.

    Attributes:
        sample: index among the question's samples.
        prompt: digest of the prompt's token ids.
        text: the response without the prefix and without special tokens.
        tokens: of the response, its end token included.
        finish: ``stop`` or ``length``.
        truncated: whether it was cut off.
        score, acc, pred, status, feedback, error, format: see :class:`verl_ext.verification.Verdict`.
    """

    question_id: str
    sample: int
    prompt: str
    text: str
    tokens: int
    finish: str
    truncated: bool
    score: float | None
    acc: float | None
    pred: str | None
    status: str
    feedback: str | None
    error: str | None = None
    format: float | None = None


@dataclass(frozen=True)
class _Job:
    request: SampleRequest
    sample: int
    prompt_ids: list[int]
    prompt: str


class Sampler:
    """Draws and verifies samples; a fixed number of requests is under way at a time."""

    def __init__(
        self,
        client: Client,
        tokenizer: Any,
        settings: SamplingSettings,
        verifier: Verifier,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
        stop_token_ids: Sequence[int] = (),
        concurrency: int = 256,
    ) -> None:
        """
        Args:
            client: verl's client of running rollout servers.
            template_kwargs: ``data.apply_chat_template_kwargs`` of training.
            max_model_len: of the servers. A prompt that leaves less than ``max_tokens`` is refused, because the server
                would silently shorten the response.
            stop_token_ids: that end a response beside the tokenizer's end token (the generation config's).
            concurrency: requests under way at a time.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency!r}; allowed: a whole number from 1")
        self._client, self._tokenizer = client, tokenizer
        self.settings, self.verifier = settings, verifier
        self._prompts = PromptBuilder(tokenizer, template_kwargs)
        self._max_model_len = max_model_len
        self._stop = {int(token) for token in (*stop_token_ids, tokenizer.eos_token_id) if token is not None}
        self._concurrency = concurrency

    def identity(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a store for this sampler; ``model`` says which weights the servers hold."""
        return store_settings(model, self.settings, self._prompts, self.verifier)

    def run(
        self,
        requests: Sequence[SampleRequest],
        store: SampleStore | None = None,
        on_result: Callable[[SampleResult, int, int], None] | None = None,
    ) -> list[SampleResult]:
        """:meth:`collect` for callers without an event loop."""
        return asyncio.run(self.collect(requests, store, on_result))

    async def collect(
        self,
        requests: Sequence[SampleRequest],
        store: SampleStore | None = None,
        on_result: Callable[[SampleResult, int, int], None] | None = None,
    ) -> list[SampleResult]:
        """Draws what is missing, k samples a question, and returns the new samples in the order they finished.

        Args:
            store: each sample is written there as soon as it is verified; samples it holds are not drawn again.
            on_result: called with the sample, the number of new samples so far and their number in all.

        Raises:
            PromptError: a prompt cannot be made or leaves no room; before anything is drawn.
            Exception: of the client. What was finished before is in the store.
        """
        jobs = self.jobs(requests, store)
        results: list[SampleResult] = []
        # All workers take from one iterator: never more tasks than requests under way.
        queue: Iterator[_Job] = iter(jobs)

        async def work() -> None:
            for job in queue:
                result = await self._sample(job)
                if store is not None:
                    store.append(asdict(result))
                results.append(result)
                if on_result is not None:
                    on_result(result, len(results), len(jobs))

        tasks = [asyncio.create_task(work()) for _ in range(min(self._concurrency, len(jobs)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return results

    def jobs(self, requests: Sequence[SampleRequest], store: SampleStore | None = None) -> list[_Job]:
        """What is still to be drawn. Question by question, so that their samples share the server's prefix cache."""
        return plan_jobs(requests, self.settings, self._prompts, store, self._max_model_len)

    async def _sample(self, job: _Job) -> SampleResult:
        request = job.request
        tokens = await self._generate(job)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        ended = bool(tokens) and tokens[-1] in self._stop
        full = len(tokens) >= self.settings.max_tokens
        if self._max_model_len is not None:
            full = full or len(job.prompt_ids) + len(tokens) >= self._max_model_len
        verdict: Verdict = await self.verifier(
            data_source=request.data_source,
            solution_str=(request.prefix or "") * request.judge_prefix + text,
            ground_truth=request.ground_truth,
            extra_info=request.extra_info,
        )
        # verl's server calls both ends "completed".
        truncated = full and not ended
        return SampleResult(
            question_id=request.question_id,
            sample=job.sample,
            prompt=job.prompt,
            text=text,
            tokens=len(tokens),
            finish="length" if truncated else "stop",
            truncated=truncated,
            **asdict(verdict),
        )

    async def _generate(self, job: _Job) -> list[int]:
        """The response's tokens. A weight update of the trainer aborts requests: those are asked again."""
        for attempt in range(ABORT_RETRIES):
            if attempt:
                await asyncio.sleep(SECONDS_BETWEEN_RETRIES)
            output = await self._client.generate(
                uuid4().hex,
                prompt_ids=list(job.prompt_ids),
                sampling_params=self.settings.parameters(job.request.question_id, job.sample),
            )
            if output.stop_reason not in ABORTED:
                return [int(token) for token in output.token_ids]
        raise RuntimeError(
            f"the rollout server aborted sample {job.sample} of question {job.request.question_id} "
            f"{ABORT_RETRIES} times"
        )


def store_settings(
    model: Mapping[str, Any], settings: SamplingSettings, prompts: PromptBuilder, verifier: Verifier
) -> dict[str, Any]:
    """Everything that decides what a sample and its verdict are."""
    return {
        "model": dict(model),
        "sampling": settings.identity(),
        "chat_template": prompts.identity,
        "verifier": verifier.identity,
    }


def plan_jobs(
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    prompts: PromptBuilder,
    store: SampleStore | None,
    max_model_len: int | None,
) -> list[_Job]:
    """Checks every prompt and lists the samples that are missing.

    Raises:
        PromptError: a prompt cannot be made, leaves no room for the response, or two questions share an id.
        StoreError: a finished sample was drawn from another prompt.
    """
    jobs: list[_Job] = []
    seen: set[str] = set()
    for request in requests:
        if request.question_id in seen:
            raise PromptError(f"question {request.question_id} is there twice")
        seen.add(request.question_id)
        ids = prompts(request.question_id, request.messages, request.prefix)
        if max_model_len is not None and len(ids) + settings.max_tokens > max_model_len:
            raise PromptError(
                f"question {request.question_id}: its prompt has {len(ids)} tokens, which with max_tokens="
                f"{settings.max_tokens} is more than the model length {max_model_len} of the servers"
            )
        digest = prompt_digest(ids)
        for sample in range(settings.k):
            if store is None or (request.question_id, sample) not in store:
                jobs.append(_Job(request, sample, ids, digest))
            else:
                store.check_prompt(request.question_id, sample, digest)
    return jobs
