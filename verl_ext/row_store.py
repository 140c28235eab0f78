"""Token-level teacher state, kept on the rank that trains the row.

Nothing of width K ever crosses the object store: the student pass leaves the support here, the teacher pass adds its
log-probabilities, the update reads both, and the next step clears everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class RowState:
    """One row; T response tokens, K support tokens.

    Attributes:
        support_ids: int32 [T, K], the student's most likely tokens at each response position.
        student_log_probs: float32 [T], of the sampled tokens.
        teacher_log_probs: float32 [T, K] on the support, normalised over the vocabulary, at the rollout temperature.
        teacher_token_log_probs: float32 [T], of the sampled tokens.
    """

    support_ids: torch.Tensor
    student_log_probs: torch.Tensor
    teacher_log_probs: torch.Tensor | None = None
    teacher_token_log_probs: torch.Tensor | None = None


class RowStore:
    """Rows by ``row_id``, which the driver gives out anew every step."""

    def __init__(self) -> None:
        self._rows: dict[int, RowState] = {}

    def clear(self) -> None:
        """Forgets the last step."""
        self._rows.clear()

    def put(self, row_id: int, state: RowState) -> None:
        """Keeps a row; a row seen before is replaced."""
        self._rows[row_id] = state

    def __getitem__(self, row_id: int) -> RowState:
        """Raises KeyError where the row's student pass did not run on this rank."""
        try:
            return self._rows[row_id]
        except KeyError:
            raise KeyError(
                f"row {row_id} has no student pass on this rank ({len(self._rows)} rows have one); "
                "the passes of one step must see the rows in the same order"
            ) from None

    def __contains__(self, row_id: int) -> bool:
        return row_id in self._rows


STORE = RowStore()
"""The store of this process: one rank, one process."""
