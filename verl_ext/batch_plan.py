"""From graded rollouts to the plan of a training step: pass rates, question weights, teacher contexts.

One pure function on plain columns, run on the driver once per train batch, before anything is padded, reordered or
dropped: pass rates and the normaliser of the weights need the whole batch (SC-SDPO, arXiv 2605.27765; PACED, arXiv
2603.11178), the demonstrations need the whole group (SDPO, arXiv 2601.20802, public code, ``self_distillation`` block).
Which rows are left out of the forward passes is decided afterwards, in ``verl_ext.compaction``.

Rows may come in any order; the plan of a row does not depend on it, to the last bit.
Shape suffixes: N rows, P questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from verl_ext.config_axes import CONTEXTS
from verl_ext.contexts import PromptTokenizer, RowContext, build_contexts
from verl_ext.pass_rates import GroupPassRates, group_pass_rates, pass_rate_metrics, success_mask
from verl_ext.question_weights import BatchWeigher, Weighed, Weigher
from verl_ext.reference_context import build_reference_contexts
from verl_ext.revision_context import build_revision_contexts
from verl_ext.weighting import effective_sample_size

# verl reduces a list of metric values by substrings of its name ("max", "min"), so no key of ours contains either.


@dataclass(frozen=True)
class RowBatch:
    """The rows of a train batch as columns, one entry a rollout, any order.

    Attributes:
        uids: the sampling each row belongs to (verl's ``uid``): the group of its siblings.
        rollout_index: number of the rollout in its group; unique there.
        rewards: summed reward; finite where ``errors`` is false.
        errors: the verifier failed on this row. It then says nothing about the answer: left out of the pass rate and
            never a demonstration.
        responses: decoded response text without special tokens.
        feedback: text from the environment on this row's attempt, or None; None for the column: there is none. Not used
            where ``errors`` is true.
        raw_prompts: message list of each row.
        prompt_lengths, response_lengths: tokens of the student's prompt and response.
        question_ids: identity of the question across steps, the key of a random choice; the uid where None.
        prompt_ids: the student's prompt token ids; the teacher's prompt where the context is "none".
        extra_infos: the data set's columns of each row; they hold the text of the context "reference".
        foreign: rows that the student did not sample (the teacher's side of a pair); they take no part in pass rates.
            None: none.
        padding: verl's synthetic rows. They copy the fields of a real row, so everything of ours is zeroed there. None:
            recognised by their uid.

    Raises ValueError for columns of different length, a negative length or a reward that is not a number.
    """

    uids: Sequence[str]
    rollout_index: Sequence[int]
    rewards: Sequence[float]
    errors: Sequence[bool]
    responses: Sequence[str]
    feedback: Sequence[str | None] | None
    raw_prompts: Sequence[Sequence[Mapping[str, Any]]]
    prompt_lengths: Sequence[int]
    response_lengths: Sequence[int]
    question_ids: Sequence[str] | None = None
    prompt_ids: Sequence[Sequence[int]] | None = None
    padding: Sequence[bool] | None = None
    extra_infos: Sequence[Mapping[str, Any]] | None = None
    foreign: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            column = getattr(self, name)
            if column is not None and len(column) != len(self.uids):
                raise ValueError(f"column {name} has {len(column)} entries for {len(self.uids)} rows")
        columns = zip(self.rewards, self.errors, self.is_padding(), strict=True)
        for i, (reward, error, padded) in enumerate(columns):
            if not (error or padded or math.isfinite(float(reward))):
                raise ValueError(f"row {self.name(i)}: reward {reward!r} is not a finite number and no verifier error")
        for name in ("prompt_lengths", "response_lengths"):
            for i, length in enumerate(getattr(self, name)):
                if int(length) < 0:
                    raise ValueError(f"row {self.name(i)}: {name} is {length}, expected 0 or more tokens")

    def __len__(self) -> int:
        return len(self.uids)

    def is_padding(self) -> list[bool]:
        """[N] whether each row is synthetic."""
        return [is_padding_row(uid) for uid in self.uids] if self.padding is None else [bool(p) for p in self.padding]

    def name(self, row: int) -> str:
        """What an error message calls a row."""
        return f"{row} (uid {self.uids[row]}, rollout {self.rollout_index[row]})"


@dataclass(frozen=True)
class BatchPlan:
    """What a training step needs to know of its rows, in the order of the batch.

    Attributes:
        weights_N: float32, the row's question weight W_q; 0 for questions without a verdict and for padding rows.
        distill_N: bool, the row carries the distillation term (it has a context and fits the limits).
        teacher_prompt_ids_N: the teacher's prompt where ``distill_N``, else None. Equal prompts share one list.
        contexts_N: messages, lengths and reasons behind the two columns above, for the sample dump.
        pass_rates: result of ``group_pass_rates`` on the rows that are not padding.
        rates_P: float64, the pass rates that the weights were made of; those of ``pass_rates`` unless they come from
            elsewhere. NaN where there is none.
        question_index_N: int64, position of the row's question in ``pass_rates``; -1 for padding rows.
        question_weights_P: float64, before the cast.
        metrics: flat floats.
    """

    weights_N: torch.Tensor
    distill_N: torch.Tensor
    teacher_prompt_ids_N: list[list[int] | None]
    contexts_N: list[RowContext]
    pass_rates: GroupPassRates
    rates_P: torch.Tensor
    question_index_N: torch.Tensor
    question_weights_P: torch.Tensor
    metrics: dict[str, float]

    @property
    def demonstrations_N(self) -> list[int | None]:
        """Row whose response the teacher reads, for the sample dump."""
        return [context.demonstration for context in self.contexts_N]

    @property
    def used_feedback_N(self) -> list[bool]:
        return [context.used_feedback for context in self.contexts_N]


def is_padding_row(uid: str, tag: Mapping[str, Any] | None = None) -> bool:
    """Whether a row is one of verl's synthetic padding rows: by its tag, or by the uid verl gives it.

    verl's own uids are hexadecimal, so the prefix cannot be met by chance.
    """
    return bool((tag or {}).get("is_padding", False)) or str(uid).startswith("pad")


def plan_batch(
    batch: RowBatch,
    *,
    weighting: Any,
    context: Any,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None = None,
    max_total: int | None = None,
    seed: int = 0,
    step: int = 0,
    enabled: bool = True,
    weigher: Weigher | None = None,
) -> BatchPlan:
    """Steps 1 to 3 of a batch's way, and all that step 4 (compaction) needs of them.

    ``weighting`` and ``context`` have the attributes of ``WeightingConfig`` and ``ContextConfig``. Success, for the
    pass rate and for the pool of demonstrations alike, is a reward of at least ``context.success_threshold``.

    ``context.kind``: "sibling" as in ``verl_ext.contexts``; "reference" as in ``verl_ext.reference_context``;
    "revision" as in ``verl_ext.revision_context``, without a context where the verifier failed; "none": the teacher
    reads the student's own prompt, every row is distilled. ``template_kwargs`` are the student's arguments of the chat
    template; ``context.template_kwargs`` are laid over them. ``weigher``: where the pass rates of the weights
    come from; None: from the batch. ``enabled=False`` (no distillation in the loss): no prompt is rendered and no row
    is distilled.
    ``max_total``: largest number of tokens of teacher prompt and response together; None: no limit.

    Raises ValueError for bad columns, prompts, feedback or settings, naming the row or key.
    """
    if context.kind not in CONTEXTS:
        raise ValueError(f"context kind {context.kind!r} is unknown; allowed are {list(CONTEXTS)}")
    rows = len(batch)
    real = np.flatnonzero(~np.array(batch.is_padding(), dtype=bool))
    pick = real.tolist()
    errors = torch.tensor([bool(batch.errors[i]) for i in pick], dtype=torch.bool)
    rewards = _rewards(batch, pick)

    foreign = torch.tensor([batch.foreign is not None and bool(batch.foreign[i]) for i in pick], dtype=torch.bool)
    rates = group_pass_rates(
        [batch.uids[i] for i in pick], rewards, errors | foreign, threshold=context.success_threshold
    )
    question = rates.index_N.cpu().numpy()
    keys = _question_keys(batch, pick, question)
    weighed = (weigher or BatchWeigher(weighting))(keys, rates)
    weights_P = weighed.weights_P

    contexts = [RowContext()] * rows
    metrics = _rate_metrics(rates) | _weight_metrics(weighed)
    metrics["pass_rate/rows_with_verifier_error"] = float(errors.sum())
    if enabled and pick:
        success = (~errors & success_mask(rewards, threshold=context.success_threshold)).numpy()
        found, context_metrics = _contexts(
            batch, pick, question, keys, success, context, tokenizer, template_kwargs, max_total, seed, step
        )
        metrics |= context_metrics
        for i, row_context in zip(pick, found, strict=True):
            contexts[i] = row_context

    weights_N = torch.zeros(rows, dtype=torch.float64)
    question_index_N = torch.full((rows,), -1, dtype=torch.int64)
    if pick:
        index = torch.from_numpy(real)
        question_index_N[index] = torch.from_numpy(question)
        weights_N[index] = weights_P[question_index_N[index]]
    return BatchPlan(
        weights_N=weights_N.to(torch.float32),
        distill_N=torch.tensor([row_context.distill for row_context in contexts], dtype=torch.bool),
        teacher_prompt_ids_N=[row_context.token_ids for row_context in contexts],
        contexts_N=contexts,
        pass_rates=rates,
        rates_P=weighed.rates_P,
        question_index_N=question_index_N,
        question_weights_P=weights_P,
        metrics=metrics,
    )


def teacher_prompts(
    raw_prompts_P: Sequence[Sequence[Mapping[str, Any]]],
    extra_infos_P: Sequence[Mapping[str, Any]],
    *,
    context: Any,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int] | None]:
    """Token ids of the teacher's prompts before there is a rollout, as :func:`plan_batch` makes them afterwards.

    Returns:
        one list a question; None where it has no privileged text, or a prompt of more than ``context.max_length``.

    Raises ValueError for the context kinds that need rollouts, and as :func:`plan_batch`.
    """
    if context.kind not in ("reference", "none"):
        raise ValueError(f"context kind {context.kind!r} has no prompt before there is a rollout")
    template_kwargs = {**(template_kwargs or {}), **context.template_kwargs}
    if context.kind == "none":
        tokenize = PromptTokenizer(tokenizer, template_kwargs)
        prompts = [tokenize(messages) for messages in raw_prompts_P]
        return [ids if len(ids) <= context.max_length else None for ids in prompts]
    result = build_reference_contexts(
        raw_prompts_P,
        extra_infos_P,
        response_lengths_N=[0] * len(raw_prompts_P),
        tokenizer=tokenizer,
        config=context,
        template_kwargs=template_kwargs,
    )
    return [row.token_ids for row in result.rows]


def _rewards(batch: RowBatch, pick: list[int]) -> torch.Tensor:
    """[N] in the precision of the column, so that a float32 0.7 meets a threshold of 0.7; plain lists count as float32.

    The reward of a verifier error means nothing and may be anything; 0 stands in for it and is never looked at.
    """
    dtype = batch.rewards.dtype if isinstance(batch.rewards, torch.Tensor | np.ndarray) else torch.float32
    if isinstance(dtype, np.dtype):
        dtype = torch.float32 if dtype == np.float32 else torch.float64
    values = [0.0 if batch.errors[i] else float(batch.rewards[i]) for i in pick]
    return torch.tensor(values, dtype=torch.float64).to(dtype if dtype.is_floating_point else torch.float64)


def _contexts(
    batch: RowBatch,
    pick: list[int],
    question: np.ndarray,
    keys: list[str],
    success: np.ndarray,
    config: Any,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None,
    max_total: int | None,
    seed: int,
    step: int,
) -> tuple[list[RowContext], dict[str, float]]:
    """RowContexts of the rows in ``pick``, demonstrations as rows of the whole batch, and their metrics."""
    lengths = [int(batch.response_lengths[i]) for i in pick]
    template_kwargs = {**(template_kwargs or {}), **config.template_kwargs}
    if config.kind == "none":
        return _plain_contexts(batch, pick, lengths, config, tokenizer, template_kwargs, max_total)
    if config.kind == "reference":
        return _reference_contexts(batch, pick, lengths, config, tokenizer, template_kwargs, max_total)
    if config.kind == "revision":
        return _revision_contexts(batch, pick, lengths, success, config, tokenizer, template_kwargs, max_total)
    result = build_contexts(
        [batch.raw_prompts[i] for i in pick],
        [batch.responses[i] for i in pick],
        # What a broken verifier wrote is about the verifier, not about the attempt.
        None if batch.feedback is None else [None if batch.errors[i] else batch.feedback[i] for i in pick],
        question_index_N=question,
        successes_N=success,
        rollout_index_N=[int(batch.rollout_index[i]) for i in pick],
        response_lengths_N=lengths,
        tokenizer=tokenizer,
        config=config,
        template_kwargs=template_kwargs,
        max_total=max_total,
        seed=seed,
        step=step,
        question_keys_Q=keys,
        row_names_N=[batch.name(i) for i in pick],
    )
    moved = [
        row if row.demonstration is None else _with_demonstration(row, pick[row.demonstration]) for row in result.rows
    ]
    return moved, result.metrics


def _with_demonstration(row: RowContext, demonstration: int) -> RowContext:
    # dataclasses.replace would do, but for the cost of a field walk per row in a large batch
    return RowContext(demonstration, row.used_feedback, row.messages, row.token_ids, row.prompt_tokens, row.too_long)


def _plain_contexts(
    batch: RowBatch,
    pick: list[int],
    lengths: list[int],
    config: Any,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None,
    max_total: int | None,
) -> tuple[list[RowContext], dict[str, float]]:
    """No privileged text: the teacher reads the student's prompt, token for token where its ids are given."""
    tokenize = PromptTokenizer(tokenizer, template_kwargs)
    found = []
    for i, length in zip(pick, lengths, strict=True):
        ids = tokenize(batch.raw_prompts[i]) if batch.prompt_ids is None else [int(t) for t in batch.prompt_ids[i]]
        too_long = len(ids) > config.max_length or (max_total is not None and len(ids) + length > max_total)
        messages = [dict(message) for message in batch.raw_prompts[i]]
        found.append(RowContext(None, False, messages, None if too_long else ids, len(ids), too_long))
    return found, {
        "context/rows": float(len(found)),
        "context/too_long": float(sum(row.too_long for row in found)),
        "context/distilled": float(sum(row.distill for row in found)),
    }


def _reference_contexts(
    batch: RowBatch,
    pick: list[int],
    lengths: list[int],
    config: Any,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None,
    max_total: int | None,
) -> tuple[list[RowContext], dict[str, float]]:
    """The data set's own solution in the teacher's prompt."""
    if batch.extra_infos is None:
        raise ValueError("context kind 'reference' needs the column extra_infos")
    result = build_reference_contexts(
        [batch.raw_prompts[i] for i in pick],
        [batch.extra_infos[i] for i in pick],
        response_lengths_N=lengths,
        tokenizer=tokenizer,
        config=config,
        template_kwargs=template_kwargs,
        max_total=max_total,
        row_names_N=[batch.name(i) for i in pick],
    )
    return result.rows, result.metrics


def _revision_contexts(
    batch: RowBatch,
    pick: list[int],
    lengths: list[int],
    success: np.ndarray,
    config: Any,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None,
    max_total: int | None,
) -> tuple[list[RowContext], dict[str, float]]:
    """The row's own attempt and the phrase of its outcome."""
    result = build_revision_contexts(
        [batch.raw_prompts[i] for i in pick],
        [batch.responses[i] for i in pick],
        successes_N=success,
        judged_N=[not batch.errors[i] for i in pick],
        response_lengths_N=lengths,
        tokenizer=tokenizer,
        config=config,
        template_kwargs=template_kwargs,
        max_total=max_total,
        row_names_N=[batch.name(i) for i in pick],
    )
    return result.rows, result.metrics


def _question_keys(batch: RowBatch, pick: list[int], question: np.ndarray) -> list[str]:
    """[P] the key of each question's random choices: its id across steps where the batch has one, else its uid."""
    keys: dict[int, str] = {}
    for i, q in zip(pick, question.tolist(), strict=True):
        key = str(batch.uids[i] if batch.question_ids is None else batch.question_ids[i])
        if keys.setdefault(q, key) != key:
            raise ValueError(f"row {batch.name(i)}: question_id {key!r}, but another row of this uid has {keys[q]!r}")
    return [keys[q] for q in range(len(keys))]


# ------------------------------------------------------------------------------------------------------------ metrics


def _rate_metrics(rates: GroupPassRates) -> dict[str, float]:
    """Spread of the pass rates, questions by number of successes.

    A group that lost rollouts counts at the nearest number of successes of a whole one.
    """
    rates_P = rates.rates_P.sort().values  # sorted, so that rounding does not depend on the order of the batch
    group = int(rates.counts_P.max()) if len(rates.counts_P) else 0
    successes = torch.bincount((rates_P[~rates_P.isnan()] * group).round().to(torch.int64), minlength=group + 1)
    return {
        **{f"pass_rate/{name}": value for name, value in pass_rate_metrics(rates_P).items()},
        **{f"pass_rate/successes_{k:02d}": float(count) for k, count in enumerate(successes.tolist())},
    }


def _weight_metrics(weighed: Weighed) -> dict[str, float]:
    """Over the questions with a rate. Effective questions: the sample size that the weights leave."""
    known = ~weighed.rates_P.isnan()
    weights = weighed.weights_P[known].sort().values
    return {
        "weight/mean": float(weights.mean()) if len(weights) else 0.0,
        "weight/largest": float(weights[-1]) if len(weights) else 0.0,
        "weight/active_share": float((weights > 0).sum()) / len(weights) if len(weights) else 0.0,
        "weight/effective_sample_size": effective_sample_size(weights),
        "weight/rate_mean": float(weighed.rates_P[known].sort().values.mean()) if len(weights) else 0.0,
    }
