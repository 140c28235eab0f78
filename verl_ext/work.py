"""Steps 4 and 5 of a batch's way: which rows are forwarded, on which rank, and the fields the workers read of them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size

from verl_ext.batch_plan import BatchPlan
from verl_ext.compaction import PADDING_ROW, MiniBatchPlan, keep_rows, plan_mini_batches
from verl_ext.config import DistillConfig
from verl_ext.loss import RECORDED, ROWS, TOKENS, WEIGHT, without_first
from verl_ext.packing import to_jagged
from verl_ext.passes import ROW_ID
from verl_ext.rollout_rows import RolloutRows
from verl_ext.worker import MINI_BATCH, TEACHER_PROMPT


@dataclass
class Work:
    """The rows of one step that are forwarded.

    Attributes:
        meta: in the order of the ranks; None where no row trains.
        ranks: data-parallel ranks; each has an equal, contiguous part of ``meta``.
        padding: rows added to TransferQueue, as (key, tag): to be cleared with the rest.
        metrics: flat floats.
    """

    meta: KVBatchMeta | None
    ranks: int
    padding: list[tuple[str, dict]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def part(self, rows_per_rank: int, multiple: int) -> KVBatchMeta:
        """The leading rows of every rank, a whole number of ``multiple``."""
        assert self.meta is not None
        per_rank = len(self.meta.keys) // self.ranks
        few = min(per_rank, max(rows_per_rank, multiple))
        few -= few % multiple
        picked = [rank * per_rank + i for rank in range(self.ranks) for i in range(few)]
        return KVBatchMeta(
            partition_id=self.meta.partition_id,
            keys=[self.meta.keys[i] for i in picked],
            tags=[self.meta.tags[i] for i in picked],
        )


def rows_per_rank_multiple(config: DictConfig) -> int:
    """Without dynamic batches verl wants a whole number of micro-batches on every rank."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if actor.use_dynamic_bsz:
        return 1
    return math.lcm(int(actor.ppo_micro_batch_size_per_gpu), int(rollout.log_prob_micro_batch_size_per_gpu or 1))


def real_rows(batch: KVBatchMeta) -> KVBatchMeta:
    """A batch without verl's padding rows."""
    real = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
    return KVBatchMeta(
        partition_id=batch.partition_id, keys=[batch.keys[i] for i in real], tags=[batch.tags[i] for i in real]
    )


def read_advantages(meta: KVBatchMeta) -> list[torch.Tensor]:
    """Token advantages of every row, as the advantage step left them."""
    data = tq.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id, select_fields=["advantages"])
    return list(data["advantages"].unbind())


def lay_out(
    rows: RolloutRows,
    plan: BatchPlan,
    distill: DistillConfig,
    config: DictConfig,
    *,
    ranks: int,
    eos_token_id: int,
    recorded: Collection[int] = (),
) -> Work:
    """Leaves rows out, assigns mini-batches and ranks, and writes the fields of what remains to TransferQueue.

    Args:
        recorded: rows whose divergence is wanted token by token.
    """
    actor = config.actor_rollout_ref.actor
    skip = distill.divergence.skip_tokens if distill.divergence_loss else 0
    loss_tokens = [int(without_first(mask, skip).sum()) for mask in rows.data["response_mask"].unbind()]
    # A response of skipped tokens only has a loss of exactly 0.
    taught = plan.distill_N & (torch.tensor(loss_tokens) > 0) if skip else plan.distill_N
    advantages = None
    if distill.coefficient < 1:
        advantages = [float(row.abs().max()) if row.numel() else 0.0 for row in read_advantages(rows.meta)]
    active = keep_rows(
        plan.weights_N,
        taught,
        coefficient=distill.coefficient,
        advantages_N=advantages,
        kl_coefficient=float(actor.kl_loss_coef) if actor.use_kl_loss else 0.0,
        entropy_coefficient=float(actor.entropy_coeff),
    )
    taught = taught & (plan.weights_N != 0)
    mini_batches = _mini_batches(rows, plan, taught, active, loss_tokens, distill, config, ranks)
    metrics = dict(mini_batches.metrics)
    metrics["rows/train_share"] = float(np.mean(active)) if len(active) else 0.0
    if not mini_batches.mini_batches:
        return Work(None, ranks, [], metrics)
    multiple = rows_per_rank_multiple(config)
    meta, padding = _write(rows, plan, mini_batches, taught, ranks, multiple, eos_token_id, set(recorded))
    return Work(meta, ranks, padding, metrics)


def _mini_batches(
    rows: RolloutRows,
    plan: BatchPlan,
    taught: torch.Tensor,
    active: np.ndarray,
    loss_tokens: list[int],
    distill: DistillConfig,
    config: DictConfig,
    ranks: int,
) -> MiniBatchPlan:
    responses = rows.batch.response_lengths
    student = [p + r for p, r in zip(rows.batch.prompt_lengths, responses, strict=True)]
    teacher = [
        len(ids) + r if ids and use else 0
        for ids, r, use in zip(plan.teacher_prompt_ids_N, responses, taught.tolist(), strict=True)
    ]
    size = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    planned = plan_mini_batches(active, loss_tokens, student, teacher, mini_batch_rows=size, ranks=ranks)
    if distill.compaction.enable or not planned.mini_batches:
        return planned
    # The same mini-batches train; only the rows that would have been left out are forwarded as well.
    trained = {mini_batch.number for mini_batch in planned.mini_batches}
    everything = np.array([i // size in trained for i in range(len(active))])
    return plan_mini_batches(everything, loss_tokens, student, teacher, mini_batch_rows=size, ranks=ranks)


def _write(
    rows: RolloutRows,
    plan: BatchPlan,
    mini_batches: MiniBatchPlan,
    taught: torch.Tensor,
    ranks: int,
    multiple: int,
    eos_token_id: int,
    recorded: set[int],
) -> tuple[KVBatchMeta, list[tuple[str, dict]]]:
    keys: list[list[str]] = [[] for _ in range(ranks)]
    tags: list[list[dict]] = [[] for _ in range(ranks)]
    columns: dict[str, dict[str, Any]] = {}
    added: list[tuple[str, dict]] = []
    for mini_batch in mini_batches.mini_batches:
        per_rank = len(mini_batch.ranks[0])
        per_rank += -per_rank % multiple
        members = [[row for row in rank if row != PADDING_ROW] for rank in mini_batch.ranks]
        padding = _padding_rows(rows.meta, sum(per_rank - len(rank) for rank in members), eos_token_id)
        added += padding
        spare = iter(padding)
        for rank, rank_rows in enumerate(members):
            entries: list[tuple[str, dict, int | None]] = [
                (rows.meta.keys[row], rows.meta.tags[row], row) for row in rank_rows
            ]
            entries += [(*next(spare), None) for _ in range(per_rank - len(rank_rows))]
            for key, tag, row in entries:
                keys[rank].append(key)
                tags[rank].append(tag)
                use = row is not None and bool(taught[row])
                columns[key] = {
                    ROW_ID: -1 if row is None else row,
                    WEIGHT: float(plan.weights_N[row]) if use else 0.0,
                    MINI_BATCH: mini_batch.number,
                    ROWS: mini_batch.row_count,
                    TOKENS: mini_batch.token_count,
                    RECORDED: int(row in recorded),
                    TEACHER_PROMPT: plan.teacher_prompt_ids_N[row] if use else [eos_token_id],
                }
    order = [key for rank in keys for key in rank]
    fields = {
        name: torch.tensor(
            [columns[key][name] for key in order], dtype=torch.float32 if name == WEIGHT else torch.int64
        )
        for name in (ROW_ID, WEIGHT, MINI_BATCH, ROWS, TOKENS, RECORDED)
    }
    fields[TEACHER_PROMPT] = to_jagged([torch.tensor(columns[key][TEACHER_PROMPT]) for key in order])
    tq.kv_batch_put(keys=order, partition_id=rows.meta.partition_id, fields=TensorDict(fields, batch_size=len(order)))
    meta = KVBatchMeta(partition_id=rows.meta.partition_id, keys=order, tags=[tag for rank in tags for tag in rank])
    return meta, added


def _padding_rows(meta: KVBatchMeta, count: int, eos_token_id: int) -> list[tuple[str, dict]]:
    """verl's own synthetic rows, made from the first row."""
    if count == 0:
        return []
    first = KVBatchMeta(partition_id=meta.partition_id, keys=meta.keys[:1], tags=meta.tags[:1])
    padded = upsample_batch_to_divisible_size(first, count + 1, eos_token_id)
    return list(zip(padded.keys[1:], padded.tags[1:], strict=True))
