"""Questions of a run's data files as requests for the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from verl_ext import question_data
from verl_ext.config import ConfigError
from verl_ext.config_axes import ContextConfig
from verl_ext.reference_context import build_reference_contexts, check_reference, check_special_tokens
from verl_ext.sampling import SampleRequest

NO_CONTEXT = ("without_reference", "special_token", "too_long")
"""Why a question has no teacher's prompt."""


def read_questions(config: DictConfig, split: str, limit: int | None = None) -> tuple[list[SampleRequest], int]:
    """Of ``data.train_files`` or ``data.val_files``; see :func:`verl_ext.question_data.read_questions`."""
    key = "train_files" if split == "train" else "val_files"
    files = question_data.file_list(config.data[key])
    return question_data.read_questions(
        files, f"data.{key}", prompt_key=config.data.get("prompt_key", "prompt"), limit=limit
    )


def teacher_questions(
    requests: Sequence[SampleRequest],
    context: ContextConfig,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[SampleRequest], dict[str, list[str]]]:
    """The questions as the teacher reads them, with the reference solution in its prompt.

    Tokenised with ``context.template_kwargs`` laid over ``template_kwargs``, their messages have the ids of
    :func:`verl_ext.batch_plan.teacher_prompts`, under which training scores the samples. Questions for which it has
    none are left out.

    Args:
        context: of kind ``reference``.
        template_kwargs: ``data.apply_chat_template_kwargs``.

    Returns:
        the questions with such a prompt, and reason (all of ``NO_CONTEXT``) -> ids of the others.

    Raises:
        ConfigError: no question has one, or a row cannot be used; names the key.
    """
    names = [request.question_id for request in requests]
    infos = [request.extra_info for request in requests]
    key, thinking_removed = context.reference_key, context.remove_thinking
    try:
        # First, because its messages name the question.
        contexts = build_reference_contexts(
            [request.messages for request in requests],
            infos,
            response_lengths_N=[0] * len(requests),
            tokenizer=tokenizer,
            config=context,
            template_kwargs={**(template_kwargs or {}), **context.template_kwargs},
            row_names_N=names,
        )
        missing = check_reference(infos, key, thinking_removed=thinking_removed)
        special = check_special_tokens(infos, key, tokenizer, thinking_removed=thinking_removed)
    except ValueError as error:
        raise ConfigError(f"sample.context with distill.context.reference_key={key}: {error}") from error
    too_long = [name for name, row in zip(names, contexts.rows, strict=True) if row.too_long]
    of_reason = ([names[number] for number, _ in missing], [names[number] for number, *_ in special], too_long)
    left_out = dict(zip(NO_CONTEXT, of_reason, strict=True))
    kept = [
        replace(request, messages=row.messages)
        for request, row in zip(requests, contexts.rows, strict=True)
        if row.token_ids is not None
    ]
    if not kept:
        counts = ", ".join(f"{reason} {len(ids)}" for reason, ids in left_out.items() if ids)
        raise ConfigError(
            f"sample.context is true, but none of {len(names)} questions has a teacher's prompt ({counts}); see "
            f"distill.context.reference_key={key} and distill.context.max_length={context.max_length}"
        )
    return kept, left_out


def context_identity(context: ContextConfig) -> dict[str, Any]:
    """What of a reference context decides a sample, as a store's settings hold it.

    ``template_kwargs`` are among those of the chat template there; ``max_length`` decides only who is sampled.
    """
    return {
        "kind": context.kind,
        "reference_key": context.reference_key,
        "reference_template": context.reference_template,
        "remove_thinking": context.remove_thinking,
    }
