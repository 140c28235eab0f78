"""The doctor's checks of prompts: chat template, the same prompt for student and teacher, lengths that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as parquet
from omegaconf import DictConfig

from recipe.findings import FAIL, OK, SKIP, WARN, Finding
from verl_ext.config import DistillConfig, distill_config
from verl_ext.question_data import file_list
from verl_ext.stages import stages

ROWS = 500
"""Rows of the training data whose prompts are tokenised: enough to see a share, seconds at most."""
COMPARED = 3
"""Rows whose prompts are compared between student and teacher."""
THINKING = "enable_thinking"


@dataclass(frozen=True)
class Question:
    """A row of the training data: the messages, and ``extra_info``."""

    messages: list[dict[str, Any]]
    extra_info: Mapping[str, Any]


def read_questions(config: DictConfig, limit: int = ROWS) -> list[Question]:
    """The first rows of the training files."""
    found: list[Question] = []
    for file in file_list(config.data.train_files):
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=limit, columns=["prompt", "extra_info"]):
            for row in batch.to_pylist():
                found.append(Question(row["prompt"], row["extra_info"] or {}))
                if len(found) == limit:
                    return found
    return found


def template_arguments(config: DictConfig) -> dict[str, Any]:
    """The student's arguments of the chat template."""
    return dict(config.data.get("apply_chat_template_kwargs") or {})


def student_prompts(config: DictConfig, tokenizer: Any, questions: Sequence[Question]) -> list[list[int]]:
    """Prompt ids as verl's agent loop makes them. Imports verl."""
    from transformers import AutoConfig
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    model = config.actor_rollout_ref.model
    kind = AutoConfig.from_pretrained(model.path, trust_remote_code=bool(model.get("trust_remote_code", False)))
    builder = create_continuous_token_builder(
        tokenizer, hf_model_type=kind.model_type, chat_template_kwargs=template_arguments(config)
    )
    return [[int(token) for token in builder.build_initial_tokens(question.messages)] for question in questions]


def check_template(config: DictConfig, tokenizer: Any) -> Finding:
    """There is a chat template, and it opens the assistant's turn; a thinking flag that it knows is set."""
    name = "chat template"
    if not getattr(tokenizer, "chat_template", None):
        todo = "take an instruct model, or set actor_rollout_ref.model.custom_chat_template"
        return Finding(name, FAIL, "the tokenizer has none", todo)
    given = template_arguments(config)
    message = [{"role": "user", "content": "1+1"}]
    closed, opened = (
        tokenizer.apply_chat_template(message, add_generation_prompt=add, tokenize=False, **given)
        for add in (False, True)
    )
    if opened == closed:
        todo = "the model would answer in the user's turn: set actor_rollout_ref.model.custom_chat_template"
        return Finding(name, WARN, "it opens no assistant turn (add_generation_prompt adds nothing)", todo)
    if THINKING in str(tokenizer.chat_template) and THINKING not in given:
        todo = f"say which: data.apply_chat_template_kwargs={{{THINKING}: false}} (or true)"
        return Finding(name, WARN, f"it knows {THINKING}, which is not set", todo)
    shown = f", {THINKING}={given[THINKING]}" if THINKING in given else ""
    return Finding(name, OK, f"opens the turn with {opened[len(closed) :]!r}{shown}")


def check_parity(config: DictConfig, tokenizer: Any, questions: Sequence[Question], prompts: list[list[int]]) -> str:
    """Without privileged text the teacher's prompt is the student's, token for token. Raises ValueError."""
    from verl_ext.contexts import check_prompt_parity

    given = template_arguments(config)
    for row, (question, ids) in enumerate(zip(questions, prompts, strict=False)):
        check_prompt_parity(question.messages, ids, tokenizer, given, row=row)
    line = f"{len(prompts)} prompts are the same for both, {dict(given) or 'no'} template arguments"
    for stage in stages(distill_config(config.distill)):
        if stage.enabled and stage.context.template_kwargs:
            line += f"; with its context the teacher is also given {dict(stage.context.template_kwargs)}"
            break
    return line


def check_prompt_lengths(config: DictConfig, tokenizer: Any, questions: Sequence[Question]) -> Finding:
    """Prompts of the training data against ``data.max_prompt_length``; longer ones never enter a batch."""
    from verl_ext.contexts import PromptTokenizer

    tokenize, limit = PromptTokenizer(tokenizer, template_arguments(config)), config.data.max_prompt_length
    sizes = sorted(len(tokenize(question.messages)) for question in questions)
    longer = sum(size > limit for size in sizes)
    line = f"median {sizes[len(sizes) // 2]}, longest {sizes[-1]} tokens of {len(sizes)} rows; limit {limit}"
    if longer == len(sizes):
        return Finding("prompt lengths", FAIL, line, "no prompt fits: raise data.max_prompt_length")
    if longer:
        todo = f"{longer} of {len(sizes)} rows are too long and left out: raise data.max_prompt_length to keep them"
        return Finding("prompt lengths", WARN, line, todo)
    return Finding("prompt lengths", OK, line)


def check_context_lengths(config: DictConfig, tokenizer: Any, questions: Sequence[Question]) -> Finding:
    """Teacher prompts against ``distill.context.max_length``; a row with a longer one carries no distillation."""
    name = "teacher prompt lengths"
    parts = [stage for stage in stages(distill_config(config.distill)) if stage.enabled]
    asked = [stage for stage in parts if stage.context.kind == "reference"]
    if not parts:
        return Finding(name, SKIP, "no distillation")
    if not asked:
        kinds = ", ".join(sorted({stage.context.kind for stage in parts}))
        room = min(stage.context.max_length for stage in parts) - config.data.max_prompt_length
        if kinds != "none" and room < config.data.max_response_length:
            todo = "rows with a long one are not distilled (context/too_long): raise distill.context.max_length"
            line = f"context {kinds}: {room} tokens are left for what is shown, a response has up to "
            return Finding(name, WARN, f"{line}{config.data.max_response_length}", todo)
        return Finding(name, OK, f"context {kinds}: known only once there are responses")
    return _reference_lengths(config, asked[0], tokenizer, questions)


def _reference_lengths(
    config: DictConfig, stage: DistillConfig, tokenizer: Any, questions: Sequence[Question]
) -> Finding:
    from verl_ext.reference_context import build_reference_contexts

    contexts = build_reference_contexts(
        [question.messages for question in questions],
        [question.extra_info for question in questions],
        response_lengths_N=[0] * len(questions),
        tokenizer=tokenizer,
        config=stage.context,
        template_kwargs=template_arguments(config) | dict(stage.context.template_kwargs),
    )
    counts = contexts.metrics
    rows, there = int(counts["context/rows"]), int(counts["context/with_reference"])
    too_long, fit = int(counts["context/too_long"]), int(counts["context/distilled"])
    line = f"{fit} of {rows} rows have a teacher prompt of up to {stage.context.max_length} tokens"
    line += f" (mean {counts['context/prompt_tokens_mean']:.0f})"
    if fit == 0:
        todo = "raise distill.context.max_length, or give another distill.context.reference_key"
        return Finding("teacher prompt lengths", FAIL, line, todo)
    if too_long or there < rows:
        todo = f"{too_long} are too long, {rows - there} have no usable reference text: these rows are not distilled"
        return Finding("teacher prompt lengths", WARN, line, todo)
    return Finding("teacher prompt lengths", OK, line)
