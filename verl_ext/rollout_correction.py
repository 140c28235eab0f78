"""verl's truncated rollout-to-train ratio, on the rows that are forwarded."""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.workers.utils.padding import response_to_nested


def correct_rollouts(work: KVBatchMeta, correction: Any) -> dict[str, float]:
    """Writes ``rollout_is_weights`` and the response mask it leaves to the rows of ``work``; returns verl's metrics.

    Args:
        correction: the block ``algorithm.rollout_correction``.
    """
    data = tq.kv_batch_get(
        keys=work.keys,
        partition_id=work.partition_id,
        select_fields=["old_log_probs", "rollout_log_probs", "response_mask"],
    )
    mask = data["response_mask"]
    padded = DataProto(batch=data.to_padded_tensor())
    batch, metrics = compute_rollout_correction_and_add_to_batch(padded, correction)
    fields = {"response_mask": response_to_nested(batch.batch["response_mask"], mask)}
    if "rollout_is_weights" in batch.batch:
        fields["rollout_is_weights"] = response_to_nested(batch.batch["rollout_is_weights"], mask)
    tq.kv_batch_put(
        keys=work.keys, partition_id=work.partition_id, fields=TensorDict(fields, batch_size=len(work.keys))
    )
    return metrics
