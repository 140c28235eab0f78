"""Token-level teacher state, kept on the rank that trains the row.

Nothing as wide as the support, the hidden states or the vocabulary ever crosses the object store: the passes of a step
leave it here, the update reads it, and then it is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class RowState:
    """One row; T response tokens, K support tokens, E width of the teacher (of both parts, for a mixed teacher).

    Attributes:
        support_ids: int32 [T, K], the tokens on which teacher and student are compared.
        student_log_probs: float32 [T], of the sampled tokens.
        teacher_log_probs: float32 [T, K] on the support, normalised over the vocabulary, at the rollout temperature.
        teacher_token_log_probs: float32 [T], of the sampled tokens.
        teacher_entropy: float32 [T], nats.
        teacher_hidden: [T, E], the teacher before its head.
    """

    support_ids: torch.Tensor | None = None
    student_log_probs: torch.Tensor | None = None
    teacher_log_probs: torch.Tensor | None = None
    teacher_token_log_probs: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None
    teacher_hidden: torch.Tensor | None = None


class RowStore:
    """Rows by ``row_id``, which the driver gives out anew every step, and the head that reads the hidden states."""

    def __init__(self) -> None:
        self._rows: dict[int, RowState] = {}
        self.teacher_head: torch.Tensor | None = None

    def clear(self) -> None:
        """Forgets the step."""
        self._rows.clear()
        self.teacher_head = None

    def of(self, row_id: int) -> RowState:
        """The row's state, a new one where no pass has seen it."""
        return self._rows.setdefault(row_id, RowState())

    def __getitem__(self, row_id: int) -> RowState:
        """Raises KeyError where no pass of this step saw the row on this rank."""
        try:
            return self._rows[row_id]
        except KeyError:
            raise KeyError(
                f"row {row_id} was in no earlier pass on this rank ({len(self._rows)} rows were); "
                "the passes of one step must see the rows on the same rank"
            ) from None

    def __contains__(self, row_id: int) -> bool:
        return row_id in self._rows

    def rows(self) -> list[RowState]:
        """Every row's state."""
        return list(self._rows.values())


STORE = RowStore()
"""The store of this process: one rank, one process."""
