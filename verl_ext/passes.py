"""What the forward passes do with their logits: functions that verl's engine calls as its loss function.

verl's engine calls the same function twice per micro-batch: with ``student_logits`` inside the forward (the logits
processor: it must return one value per token), and with ``model_output`` afterwards (it must return loss and metrics).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from tensordict import TensorDict

from verl_ext.config import DivergenceConfig
from verl_ext.divergence import student_topk, support_log_probs, topk_divergence
from verl_ext.packing import lengths, response_positions
from verl_ext.row_store import STORE, RowState

ROW_ID = "row_id"
"""Field: int64 [B], the row's key in the rank's store; -1 for padding rows."""

CHUNK_TOKENS = 1024


def _response_logits(logits_1NV: torch.Tensor, data: TensorDict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed positions [M], response lengths [B] and response token ids [M] of a micro-batch."""
    response_lengths_B = lengths(data["responses"])
    positions_M = response_positions(lengths(data["input_ids"]), response_lengths_B)
    return positions_M, response_lengths_B, data["responses"].values()


def _token_log_probs(logits_MV: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
    return support_log_probs(logits_MV, ids_M.unsqueeze(1)).squeeze(1)


class ForwardPass(ABC):
    """A pass without gradient that leaves its result in the store instead of returning it."""

    def __call__(
        self,
        *,
        data: TensorDict,
        student_logits: torch.Tensor | None = None,
        model_output: dict[str, Any] | None = None,
        dp_group: Any = None,
    ) -> Any:
        if student_logits is not None:
            self.collect(student_logits.squeeze(0), data)
            return {}
        return torch.zeros((), device=data["input_ids"].device), {}

    @abstractmethod
    def collect(self, logits_NV: torch.Tensor, data: TensorDict) -> None:
        """Reads the logits of one packed micro-batch, already divided by the temperature."""


class StudentSupport(ForwardPass):
    """The student's top-k ids at every response position, and the log-probability of the sampled token."""

    def __init__(self, topk: int) -> None:
        self.topk = topk

    def collect(self, logits_NV: torch.Tensor, data: TensorDict) -> None:
        positions_M, response_lengths_B, tokens_M = _response_logits(logits_NV, data)
        k = min(self.topk, logits_NV.shape[-1])
        ids, token_log_probs = [], []
        for start in range(0, len(positions_M), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = logits_NV[positions_M[part]]
            ids.append(student_topk(logits, k).to(torch.int32))
            token_log_probs.append(_token_log_probs(logits, tokens_M[part]))
        sizes = response_lengths_B.tolist()
        rows = zip(torch.cat(ids).split(sizes), torch.cat(token_log_probs).split(sizes), strict=True)
        for row_id, (row_ids, row_log_probs) in zip(data[ROW_ID].tolist(), rows, strict=True):
            if row_id >= 0:
                STORE.put(row_id, RowState(row_ids.clone(), row_log_probs.clone()))


class TeacherSupport(ForwardPass):
    """The teacher's log-probabilities at the ids the student pass left."""

    def collect(self, logits_NV: torch.Tensor, data: TensorDict) -> None:
        positions_M, response_lengths_B, tokens_M = _response_logits(logits_NV, data)
        sizes = response_lengths_B.tolist()
        row_ids = data[ROW_ID].tolist()
        for row_id, positions, tokens in zip(row_ids, positions_M.split(sizes), tokens_M.split(sizes), strict=True):
            if row_id < 0:
                continue
            state = STORE[row_id]
            ids = state.support_ids.to(torch.int64)
            on_support, on_tokens = [], []
            for start in range(0, len(positions), CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                logits = logits_NV[positions[part]]
                both = torch.cat([ids[part], tokens[part].unsqueeze(1)], dim=1)
                log_probs = support_log_probs(logits, both)
                on_support.append(log_probs[:, :-1])
                on_tokens.append(log_probs[:, -1])
            state.teacher_log_probs = torch.cat(on_support)
            state.teacher_token_log_probs = torch.cat(on_tokens)


def packed_divergence(
    logits_NV: torch.Tensor, data: TensorDict, rows_B: torch.Tensor, config: DivergenceConfig
) -> torch.Tensor:
    """Divergence at every packed position: [N], zero outside the responses of the chosen rows.

    Args:
        logits_NV: student logits of the packed micro-batch, already divided by the temperature.
        rows_B: bool, the rows to distil. Logits of other rows are not read, so that a NaN there stays there.
    """
    positions_M, response_lengths_B, _ = _response_logits(logits_NV, data)
    sizes = response_lengths_B.tolist()
    chosen = rows_B.tolist()
    states = [STORE[row_id] for row_id, use in zip(data[ROW_ID].tolist(), chosen, strict=True) if use]
    out_N = torch.zeros(logits_NV.shape[0], dtype=torch.float32, device=logits_NV.device)
    if not states:
        # Zero times the logits keeps the micro-batch in the graph: every rank must run its backward.
        return out_N + 0.0 * torch.nan_to_num(logits_NV[:1, :1].float()).sum()
    positions = torch.cat([p for p, use in zip(positions_M.split(sizes), chosen, strict=True) if use])
    divergence = topk_divergence(
        logits_NV[positions],
        torch.cat([s.teacher_log_probs for s in states]),
        torch.cat([s.support_ids for s in states]).to(torch.int64),
        kind=config.kind,
        alpha=config.alpha,
        tail=config.tail,
        temperature=1.0,
    )
    return out_N.index_put((positions,), divergence)


class Discrepancy(ForwardPass):
    """Largest and mean divergence between the student's logits and what the teacher pass left (the self-check)."""

    def __init__(self, config: DivergenceConfig) -> None:
        self.config = config
        self.total, self.tokens, self.largest = 0.0, 0, 0.0

    def collect(self, logits_NV: torch.Tensor, data: TensorDict) -> None:
        rows_B = data[ROW_ID] >= 0
        divergence_N = packed_divergence(logits_NV, data, rows_B, self.config)
        self.total += float(divergence_N.sum())
        self.tokens += int(lengths(data["responses"])[rows_B].sum())
        self.largest = max(self.largest, float(divergence_N.abs().max()))
