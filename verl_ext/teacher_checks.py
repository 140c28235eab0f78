"""Is the teacher what it should be? Equality before the first update, and the gap its context makes."""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta

from verl_ext.config import DistillConfig


class NegativeTeacherGap(RuntimeError):
    """The teacher with its context finds the student's right answers less likely than the student does."""


def check_equality(few: KVBatchMeta, tolerance: float) -> dict[str, float]:
    """Reads what the workers' ``compute_discrepancy`` left: on equal prompts the divergence must be 0.

    Raises:
        RuntimeError: it is not; the run would train on a broken alignment or another model.
    """
    data = tq.kv_batch_get(keys=few.keys, partition_id=few.partition_id, select_fields=["mean", "largest"])
    # Estimates at the sampled token only may have either sign.
    mean, largest = float(data["mean"].abs().max()), float(data["largest"].abs().max())
    if not mean <= tolerance:
        raise RuntimeError(
            f"self-check: on equal prompts teacher and student differ by {mean:.3g} nats a token (largest "
            f"{largest:.3g}), more than distill.teacher.self_check_tolerance={tolerance:g}. They must start from "
            "the same weights, in the same precision and with the same chat template."
        )
    return {"self_check/divergence": mean, "self_check/divergence_largest": largest}


class GapAlarm:
    """Looks at the gap of the first step that has right answers with a context."""

    def __init__(self, config: DistillConfig) -> None:
        self.action = config.teacher.on_negative_gap
        self.measured = not config.enabled

    def look(self, metrics: dict[str, Any], step: int) -> str | None:
        """The warning to show, if there is one.

        Raises:
            NegativeTeacherGap: the gap is negative and ``distill.teacher.on_negative_gap`` is ``stop``.
        """
        gap = metrics.get("teacher/gap")
        if self.measured or gap is None:
            return None
        self.measured = True
        if gap >= 0 or self.action == "ignore":
            return None
        message = (
            f"the teacher with its context finds the student's right answers less likely than the student does "
            f"(median gap {gap:.3f} nats a token at step {step}): the model may not read this context. "
            "Look at completions.jsonl; set distill.teacher.on_negative_gap=ignore to go on without this message."
        )
        if self.action == "stop":
            raise NegativeTeacherGap(message)
        return message
