"""A row as a record for a person to read: sampled completions, rows of a step that went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_ext.batch_plan import BatchPlan
from verl_ext.rollout_rows import RolloutRows

DIGITS = 5  # of a divergence in a record
UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are not yet a character


def row_record(rows: RolloutRows, plan: BatchPlan, i: int) -> dict[str, Any]:
    """Row i in plain values, with the teacher's context and the question's pass rate and weight."""
    messages = plan.contexts_N[i].messages
    foreign = rows.batch.foreign
    sampler = {} if foreign is None else {"sampled_by": "teacher" if foreign[i] else "student"}
    return {
        "question_id": rows.question_ids[i],
        "rollout": int(rows.batch.rollout_index[i]),
        "prompt": rows.batch.raw_prompts[i][-1]["content"],
        "response": rows.batch.responses[i],
        "teacher_context": messages[-1]["content"] if messages else None,
        "reward": float(rows.rewards[i]),
        "pass_rate": float(plan.rates_P[plan.question_index_N[i]]),
        "weight": float(plan.weights_N[i]),
        "has_demonstration": plan.demonstrations_N[i] is not None,
        **sampler,
    }


def sampled_rows(total: int, count: int) -> list[int]:
    """``count`` row numbers, spread evenly over the batch."""
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the text of all of them.

    A token that ends inside a character (bytes of a byte-level vocabulary) has no text of its own: the token that
    completes the character has it. Vocabularies that write a space only between tokens keep it.
    """
    alone = [tokenizer.decode([token]) for token in ids]
    if "".join(alone) == tokenizer.decode(ids):
        return alone
    texts: list[str] = []
    context = told = 0  # tokens [context, told) have their text, and are decoded again for what they do to the next one
    for end in range(1, len(ids) + 1):
        before, after = tokenizer.decode(ids[context:told]), tokenizer.decode(ids[context:end])
        if after.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        context, told = told, end
    return texts


def sampled_completions(
    rows: RolloutRows,
    plan: BatchPlan,
    step: int,
    chosen: Sequence[int],
    divergences: Mapping[int, Sequence[float]],
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """The chosen rows; those that were distilled with their tokens and the divergence (nats) at each."""
    records = []
    for i in chosen:
        record = {"step": step, **row_record(rows, plan, i)}
        if i in divergences:
            record["tokens"] = token_texts(tokenizer, rows.data["responses"][i].tolist())
            record["divergence"] = [round(value, DIGITS) for value in divergences[i]]
        records.append(record)
    return records


def skipped_rows(rows: RolloutRows, plan: BatchPlan, ids: list[int], suspects: set[int]) -> list[dict[str, Any]]:
    """Rows of a skipped optimiser step, with their tokens; ``suspect`` where the row's own loss is not finite."""
    return [
        row_record(rows, plan, i) | {"response_ids": rows.data["responses"][i].tolist(), "suspect": i in suspects}
        for i in ids
    ]
