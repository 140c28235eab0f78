"""A row as a record for a person to read: sampled completions, rows of a step that went wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from verl_ext.batch_plan import BatchPlan
from verl_ext.rollout_rows import RolloutRows


def row_record(rows: RolloutRows, plan: BatchPlan, i: int) -> dict[str, Any]:
    """Row i in plain values, with the teacher's context and the question's pass rate and weight."""
    messages = plan.contexts_N[i].messages
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
    }


def sampled_completions(rows: RolloutRows, plan: BatchPlan, step: int, count: int) -> list[dict[str, Any]]:
    """``count`` rows, spread evenly over the batch."""
    total = len(rows.meta.keys)
    chosen = np.linspace(0, total - 1, min(count, total)).astype(int)
    return [{"step": step, **row_record(rows, plan, i)} for i in chosen.tolist()]


def skipped_rows(rows: RolloutRows, plan: BatchPlan, ids: list[int], suspects: set[int]) -> list[dict[str, Any]]:
    """Rows of a skipped optimiser step, with their tokens; ``suspect`` where the row's own loss is not finite."""
    return [
        row_record(rows, plan, i) | {"response_ids": rows.data["responses"][i].tolist(), "suspect": i in suspects}
        for i in ids
    ]
