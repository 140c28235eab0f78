"""The forward passes before the update: what they read of the model, and what they leave in the store.

verl's engine calls a pass as its loss function, twice per micro-batch: inside the forward with the model's output
(``student_logits`` of verl's logits processor, or ``hidden_states`` before the head, see :mod:`verl_ext.engine`), and
afterwards with ``model_output``, where loss and metrics are expected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_ext.chunks import Head, Logits
from verl_ext.packing import lengths, response_positions
from verl_ext.row_store import STORE
from verl_ext.sequence_parallel import Part, current_part
from verl_ext.token_reading import Reading, read

ROW_ID = "row_id"
"""Field: int64 [B], the row's key in the rank's store; -1 for padding rows."""

Source = Head | Logits


@dataclass(frozen=True)
class Responses:
    """The response tokens of a packed micro-batch, and those of them that this rank holds.

    Attributes:
        positions: int64 [M], this rank's rows that predict the response tokens it holds.
        tokens: int64 [M].
        sizes: response tokens of each row of the micro-batch, held or not.
        own: bool over all response tokens, which ones are held; None: all.
    """

    positions: Tensor
    tokens: Tensor
    sizes: list[int]
    own: Tensor | None
    part: Part

    def held(self, values: Tensor) -> Tensor:
        """Of values for all response tokens, this rank's."""
        return values if self.own is None else values[self.own]

    def completed(self, values: Tensor) -> list[Tensor]:
        """Values of all response tokens, row by row, from each rank's own."""
        return list(self.part.completed(values, self.own).split(self.sizes))


def responses(data: TensorDict, held_rows: int) -> Responses:
    """Where the micro-batch's response tokens are predicted.

    Args:
        held_rows: rows of the model's output on this rank.
    """
    part = current_part()
    response_lengths_B = lengths(data["responses"])
    positions_M = response_positions(lengths(data["input_ids"]), response_lengths_B)
    tokens_M = data["responses"].values()
    own = part.own(positions_M, held_rows)
    if own is not None:
        positions_M, tokens_M = positions_M[own] - part.first(held_rows), tokens_M[own]
    return Responses(positions_M, tokens_M, response_lengths_B.tolist(), own, part)


def temperature_of(data: TensorDict, source: Source) -> float:
    """What the source is to be divided by: verl's logits processor gets logits that already are."""
    if isinstance(source, Logits):
        return 1.0
    return rollout_temperature(data)


def rollout_temperature(data: TensorDict) -> float:
    """The rollout temperature, one for all rows."""
    temperature = data["temperature"]
    return float(temperature.flatten()[0]) if isinstance(temperature, Tensor) else float(temperature)


class ForwardPass(ABC):
    """A pass without gradient that leaves its result in the store instead of returning it."""

    reads_hidden_states = False

    def __call__(
        self,
        *,
        data: TensorDict,
        student_logits: Tensor | None = None,
        hidden_states: Head | None = None,
        model_output: dict[str, Any] | None = None,
        dp_group: Any = None,
    ) -> Any:
        if student_logits is not None:
            self.collect(Logits(student_logits.squeeze(0)), data)
            return {}
        if hidden_states is not None:
            self.collect(hidden_states, data)
            return {}
        return torch.zeros((), device=data["input_ids"].device), {}

    @abstractmethod
    def collect(self, source: Source, data: TensorDict) -> None:
        """Reads one packed micro-batch."""


class StudentPass(ForwardPass):
    """The log-probability of the sampled token, and the student's top-k ids where they are the support."""

    def __init__(self, topk: int | None, *, hidden_states: bool = False) -> None:
        self.topk = topk
        self.reads_hidden_states = hidden_states

    def collect(self, source: Source, data: TensorDict) -> None:
        where = responses(data, len(source))
        reading = read(
            source,
            positions=where.positions,
            tokens=where.tokens,
            topk=self.topk,
            temperature=temperature_of(data, source),
        )
        _leave(data, where, student_log_probs=reading.token_log_probs, support_ids=reading.ids if self.topk else None)


class TeacherPass(ForwardPass):
    """The teacher's hidden states, or its log-probabilities on the support, the sampled tokens, and its entropy.

    Args:
        keep: ``hidden_states`` or ``log_probs``.
        support: ``given`` (ids that the student pass left), ``teacher_topk``, or ``none``.
        share: factor of the hidden states, for a teacher that is a sum of two (their logits are linear in them).
        on_host: keep the hidden states in host memory.
        from_logits: read log-probabilities from the logits, for models that change them after the head.
    """

    def __init__(
        self,
        keep: str,
        *,
        support: str = "none",
        topk: int = 0,
        share: float = 1.0,
        on_host: bool = False,
        from_logits: bool = False,
    ) -> None:
        self.keep, self.support, self.topk, self.share, self.on_host = keep, support, topk, share, on_host
        self.reads_hidden_states = not (from_logits and keep == "log_probs")
        self.head: Tensor | None = None

    def collect(self, source: Source, data: TensorDict) -> None:
        where = responses(data, len(source))
        if self.keep == "log_probs":
            _leave(data, where, **_teacher_log_probs(self, source, where, data))
            return
        assert isinstance(source, Head)
        if self.head is None:
            # The same in every micro-batch of a pass; in the precision of the product it will be part of.
            self.head = source.weight.detach().to(source.hidden.dtype, copy=True)
        hidden = source.hidden.detach()[where.positions] * self.share
        for row_id, row in zip(data[ROW_ID].tolist(), where.completed(hidden), strict=True):
            if row_id >= 0:
                state, row = STORE.of(row_id), row.cpu() if self.on_host else row.clone()
                before = state.teacher_hidden
                state.teacher_hidden = row if before is None else torch.cat([before, row], dim=-1)

    def leave_head(self) -> None:
        """Once the pass is over: beside the head of an earlier pass of the step, if there was one."""
        if self.head is not None:
            before = STORE.teacher_head
            STORE.teacher_head = self.head if before is None else torch.cat([before, self.head], dim=-1)
            self.head = None


def _teacher_log_probs(
    settings: TeacherPass, source: Source, where: Responses, data: TensorDict
) -> dict[str, Tensor | None]:
    ids = None
    if settings.support == "given":
        rows = zip(data[ROW_ID].tolist(), where.sizes, strict=True)
        known = (state.support_ids.shape[-1] for state in STORE.rows() if state.support_ids is not None)
        width = next(known, settings.topk)
        ids = where.held(torch.cat([_given_ids(row_id, size, width, where.tokens.device) for row_id, size in rows]))
    reading: Reading = read(
        source,
        positions=where.positions,
        tokens=where.tokens,
        ids=ids,
        topk=settings.topk if settings.support == "teacher_topk" else None,
        entropy=True,
        temperature=temperature_of(data, source),
    )
    return {
        "support_ids": reading.ids if settings.support == "teacher_topk" else None,
        "teacher_log_probs": reading.log_probs,
        "teacher_token_log_probs": reading.token_log_probs,
        "teacher_entropy": reading.entropy,
    }


def _given_ids(row_id: int, size: int, width: int, device: torch.device) -> Tensor:
    """A row's support; any ids will do for a padding row."""
    if row_id >= 0:
        return STORE[row_id].support_ids
    return torch.zeros(size, width, dtype=torch.int32, device=device)


def _leave(data: TensorDict, where: Responses, **values: Tensor | None) -> None:
    """Puts values of the response tokens into the rows' states, except of padding rows."""
    for name, value in values.items():
        if value is None:
            continue
        for row_id, row in zip(data[ROW_ID].tolist(), where.completed(value), strict=True):
            if row_id >= 0:
                setattr(STORE.of(row_id), name, row.clone())


def settle_mixed_teacher(*, support: str, topk: int, temperature: float, tokens: dict[int, Tensor]) -> None:
    """Turns hidden states of a teacher of two parts into log-probabilities, where those are to be kept.

    Args:
        support: as :class:`TeacherPass`.
        tokens: sampled tokens by row id.
    """
    device = STORE.teacher_head.device
    for row_id, row_tokens in tokens.items():
        state = STORE[row_id]
        reading = read(
            Head(state.teacher_hidden.to(device), STORE.teacher_head),
            tokens=row_tokens.to(device),
            ids=state.support_ids if support == "given" else None,
            topk=topk if support == "teacher_topk" else None,
            entropy=True,
            temperature=temperature,
        )
        state.teacher_hidden = None
        state.teacher_log_probs, state.teacher_token_log_probs = reading.log_probs, reading.token_log_probs
        state.teacher_entropy = reading.entropy
        if support == "teacher_topk":
            state.support_ids = reading.ids
    STORE.teacher_head = None
