"""The student's side of a micro-batch: divergence to what the teacher pass left, and what goes with it, per token."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_ext.chunks import Head, OnSupport, Teacher
from verl_ext.config import DistillConfig
from verl_ext.divergence import sampled_token_loss
from verl_ext.passes import (
    ROW_ID,
    ForwardPass,
    Source,
    responses,
    rollout_temperature,
    temperature_of,
)
from verl_ext.row_store import STORE, RowState
from verl_ext.token_losses import Measure, token_losses

DETAILS = ("student_log_probs", "teacher_log_probs", "teacher_entropy", "student_mass", "teacher_mass")
"""Without gradient, at the response tokens of distilled rows; zeros where one does not exist."""


def measure_of(config: DistillConfig) -> Measure:
    """The ``divergence`` block as the measure of :func:`verl_ext.token_losses.token_losses`."""
    block = config.divergence
    return Measure(
        block.kind,
        block.alpha,
        support=block.support,
        topk=block.topk,
        tail=block.tail,
        clip=block.clip,
        clip_level=block.clip_level,
    )


def student_values(
    source: Source,
    data: TensorDict,
    rows_B: Tensor,
    config: DistillConfig,
    *,
    log_probs_of_all: bool = False,
    entropy: bool = False,
) -> dict[str, Tensor]:
    """Values at every row of the source: [N], zero outside the responses.

    ``divergence`` and the ``DETAILS`` at the responses of the chosen rows. With ``log_probs_of_all`` (needed where the
    source is hidden states, because verl then has no logits) also ``log_probs`` and ``entropy`` of every row's.

    Args:
        rows_B: bool, the rows to distil. Nothing of other rows is read, so that a NaN there stays there.
    """
    where = responses(data, len(source))
    device = where.positions.device
    sizes = torch.tensor(where.sizes, device=device)
    chosen = where.held(torch.repeat_interleave(rows_B.to(device), sizes))
    order = torch.nonzero(chosen).flatten()
    taught = len(order)
    if log_probs_of_all:
        order = torch.cat([order, torch.nonzero(~chosen).flatten()])
    picked = [row_id for row_id, use in zip(data[ROW_ID].tolist(), rows_B.tolist(), strict=True) if use]
    states = [STORE[row_id] for row_id in picked]
    # Of the chosen rows' response tokens, those that this rank holds.
    own = None if where.own is None else where.own[torch.repeat_interleave(rows_B.to(device), sizes)]
    teacher = None if config.one_token else _teacher(states, own, config, device)
    positions = where.positions[order]
    hidden = isinstance(source, Head)
    values = token_losses(
        source.hidden if hidden else source.values,
        source.weight if hidden else None,
        measure=None if teacher is None else measure_of(config),
        teacher=teacher,
        positions=positions,
        tokens=where.tokens[order],
        temperature=temperature_of(data, source),
        teacher_temperature=rollout_temperature(data),
        entropy=entropy,
        teacher_entropy=True,
    )
    log_probs = values.log_prob[:taught]
    kept_log_probs = _kept(states, "teacher_token_log_probs", own, device, required=teacher is None)
    if teacher is not None:
        divergence = values.divergence[:taught]
    else:
        divergence = sampled_token_loss(log_probs, log_probs.detach() if kept_log_probs is None else kept_log_probs)
    parts = {
        "divergence": divergence,
        "student_log_probs": log_probs.detach(),
        "teacher_log_probs": _first(values.teacher_log_prob, kept_log_probs, taught),
        "teacher_entropy": _first(values.teacher_entropy, _kept(states, "teacher_entropy", own, device), taught),
        "student_mass": _first(values.student_mass, None, taught),
        "teacher_mass": _first(values.teacher_mass, None, taught),
    }
    zeros = torch.zeros(len(source), dtype=torch.float32, device=device)
    out = {
        name: zeros.index_put((positions[:taught],), value.float()) if value is not None else zeros
        for name, value in parts.items()
    }
    if log_probs_of_all:
        out["log_probs"] = zeros.index_put((positions,), values.log_prob.float())
        if entropy:
            out["entropy"] = zeros.index_put((positions,), values.entropy.float())
    return out


def _teacher(states: list[RowState], own: Tensor | None, config: DistillConfig, device: torch.device) -> Teacher:
    if config.teacher_states == "hidden_states":
        head = STORE.teacher_head
        hidden = _kept(states, "teacher_hidden", own, device, required=True)
        return Head(head.new_empty(0, head.shape[-1]) if hidden is None else hidden, head)
    ids = _kept(states, "support_ids", own, device, required=True)
    log_probs = _kept(states, "teacher_log_probs", own, device, required=True)
    if ids is None:
        width = config.divergence.topk
        ids, log_probs = torch.empty(0, width, dtype=torch.int32), torch.empty(0, width)
    return OnSupport(ids.to(device), log_probs.to(device))


def _kept(
    states: list[RowState], name: str, own: Tensor | None, device: torch.device, *, required: bool = False
) -> Tensor | None:
    """What the passes left of these rows, in their order; None where there are no rows, or it was not asked for."""
    rows = [getattr(state, name) for state in states]
    missing = sum(row is None for row in rows)
    if missing and (required or missing < len(rows)):
        raise KeyError(f"{missing} of {len(rows)} distilled rows have no {name}: no teacher pass saw them on this rank")
    if missing == len(rows):
        return None
    values = torch.cat(rows).to(device)
    return values if own is None else values[own]


def _first(computed: Tensor | None, kept: Tensor | None, taught: int) -> Tensor | None:
    return computed[:taught] if computed is not None else kept


class Discrepancy(ForwardPass):
    """Largest and mean divergence between the student and what the teacher pass left (the self-check)."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.reads_hidden_states = config.student_inputs == "hidden_states"
        self.total, self.tokens, self.largest = 0.0, 0, 0.0

    def collect(self, source: Source, data: TensorDict) -> None:
        rows_B = data[ROW_ID] >= 0
        divergence_N = student_values(source, data, rows_B, self.config)["divergence"]
        where = responses(data, len(source))
        rows = where.completed(divergence_N[where.positions])
        for row, use in zip(rows, rows_B.tolist(), strict=True):
            if use and row.numel():
                self.total += float(row.sum())
                self.tokens += row.numel()
                # The new one first: max keeps its first argument where the other is NaN.
                self.largest = max(float(row.abs().max()), self.largest)
