"""A teacher's states as fields of the batch, where the teacher has workers of its own."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from verl_ext.config import DistillConfig
from verl_ext.loss import WEIGHT
from verl_ext.passes import ROW_ID
from verl_ext.row_store import STORE

PREFIX = "teacher_state_"
"""Of the fields that carry a row's state; what follows is an attribute of :class:`verl_ext.row_store.RowState`."""
STATES = {
    "hidden_states": ("teacher_hidden",),
    "log_probs": ("support_ids", "teacher_log_probs", "teacher_token_log_probs", "teacher_entropy"),
}


STATE_DTYPES = {
    "support_ids": torch.int32,
    "teacher_log_probs": torch.float32,
    "teacher_token_log_probs": torch.float32,
    "teacher_entropy": torch.float32,
}


def state_names(distill: DistillConfig) -> tuple[str, ...]:
    """What travels of a row's state."""
    names = STATES[distill.teacher_states]
    return tuple(name for name in names if not (distill.one_token and name in ("support_ids", "teacher_log_probs")))


def take_states(data: TensorDict, head: torch.Tensor | None) -> None:
    """On a rank of the student: what the teacher's workers sent becomes the state of its rows."""
    names = [name.removeprefix(PREFIX) for name in data.keys() if name.startswith(PREFIX)]
    columns = {name: data[PREFIX + name].unbind() for name in names}
    for i, row_id in enumerate(data[ROW_ID].tolist()):
        if row_id < 0 or float(data[WEIGHT][i]) == 0:
            continue
        state = STORE.of(row_id)
        for name in names:
            setattr(state, name, columns[name][i])
    if head is not None:
        STORE.teacher_head = head
