"""Optimiser steps that were skipped because loss or gradient was not finite: counted, written out, and an end to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from verl_ext.step_sink import StepSink

NAMED_ROWS = 8
"""Rows named in the message; all of them are in the file."""


class NonFiniteSteps(RuntimeError):
    """Too many optimiser steps in a row were skipped."""


class NonFiniteWatch:
    """Counts skipped optimiser steps; one that is not skipped ends the series."""

    def __init__(self, limit: int, sink: StepSink) -> None:
        self.limit, self.sink = limit, sink
        self.in_a_row = 0

    def look(
        self, step: int, grad_norms: Sequence[float], rows_of: Callable[[int], list[dict[str, Any]]]
    ) -> dict[str, float]:
        """Looks at one trainer step.

        Args:
            grad_norms: one for each optimiser step; not finite where it was skipped.
            rows_of: the rows of the i-th optimiser step, with at least ``question_id``, ``rollout`` and ``suspect``
                (its own loss is not finite).

        Returns:
            ``update/skipped_non_finite``: optimiser steps skipped in this trainer step.

        Raises:
            NonFiniteSteps: more than ``limit`` in a row; the message names rows of the last one.
        """
        skipped = 0
        for index, norm in enumerate(grad_norms):
            if math.isfinite(norm):
                self.in_a_row = 0
                continue
            skipped += 1
            self.in_a_row += 1
            rows = rows_of(index)
            self.sink.non_finite([{"step": step, "optimizer_step": index, **row} for row in rows])
            named = self._named(rows)
            if self.in_a_row > self.limit:
                raise NonFiniteSteps(
                    f"loss or gradient was not finite in {self.in_a_row} optimiser steps in a row, up to step {step} "
                    f"(distill.non_finite_limit={self.limit}); {named}. Nothing was updated in them; their batches are "
                    "in non_finite.jsonl. A lower learning rate, actor_rollout_ref.actor.optim.clip_grad or fp32 may "
                    "help"
                )
            self.sink.warning(f"step {step}: loss or gradient was not finite, no update; {named} (non_finite.jsonl)")
        return {"update/skipped_non_finite": float(skipped)}

    @staticmethod
    def _named(rows: list[dict[str, Any]]) -> str:
        suspects = [row for row in rows if row["suspect"]]
        chosen = suspects or rows
        names = ", ".join(f"{row['question_id']} rollout {row['rollout']}" for row in chosen[:NAMED_ROWS])
        rest = f" and {len(chosen) - NAMED_ROWS} more" if len(chosen) > NAMED_ROWS else ""
        return f"{'rows with a non-finite loss' if suspects else 'rows of the batch'}: {names}{rest}"
