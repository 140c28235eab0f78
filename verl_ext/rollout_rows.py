"""The rows of a finished batch, read from TransferQueue once and put into an order of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from verl_ext.batch_plan import RowBatch

FIELDS = ["uid", "raw_prompt", "prompts", "responses", "response_mask", "rm_scores", "extra_fields"]


@dataclass
class RolloutRows:
    """Columns of N rows, in the order of ``meta``.

    Attributes:
        meta: keys and tags in canonical order: by question, then sampling, then rollout. Rollouts finish in any order;
            a canonical one makes mini-batches and sums repeatable.
        question_ids: stable identity of the question over the run.
        rewards: float64 [N].
        errors: the verifier failed on the row.
        verdicts: everything the verifier returned for the row.
        data: the tensors as read, in the same order.
    """

    meta: KVBatchMeta
    question_ids: list[str]
    rewards: torch.Tensor
    errors: list[bool]
    verdicts: list[dict[str, Any]]
    batch: RowBatch
    data: Any


def _extra(values: Any) -> list[dict]:
    return [dict(getattr(value, "data", value) or {}) for value in list(values)]


def read_verdicts(extra_fields: Any) -> list[dict[str, Any]]:
    """What the verifier returned for each row, from the column ``extra_fields``."""
    return [dict(fields.get("reward_extra_info") or {}) for fields in _extra(extra_fields)]


def _split_key(key: str) -> tuple[str, int, int]:
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)


def _fetch(keys: list[str], partition_id: str, fields: list[str]) -> Any:
    data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=fields)
    for name in fields:
        if name not in data:
            raise KeyError(f"the rollouts carry no field {name!r}; they have {sorted(data.keys())}")
    return data


def read_rows(meta: KVBatchMeta, tokenizer: Any) -> RolloutRows:
    """Reads and orders the rows of a sampled batch.

    Raises:
        ValueError: a row carries no ``extra_info.question_id``, or a rollout has several outputs; the row is named.
        KeyError: TransferQueue left out a field (it omits unknown ones silently).
    """
    infos = _extra(_fetch(meta.keys, meta.partition_id, ["extra_info"])["extra_info"])
    question_ids = []
    for key, info in zip(meta.keys, infos, strict=True):
        if not info.get("question_id"):
            raise ValueError(
                f"row {key} has no extra_info.question_id; write the data with data_prep or add the column"
            )
        question_ids.append(str(info["question_id"]))
    parts = [_split_key(key) for key in meta.keys]
    if any(output > 0 for _, _, output in parts):
        key = next(key for key, part in zip(meta.keys, parts, strict=True) if part[2] > 0)
        raise ValueError(f"rollout {key} has several outputs; distillation scores one response per rollout")

    order = sorted(range(len(meta.keys)), key=lambda i: (question_ids[i], parts[i][0], parts[i][1]))
    ordered = KVBatchMeta(
        partition_id=meta.partition_id,
        keys=[meta.keys[i] for i in order],
        tags=[meta.tags[i] for i in order],
        extra_info=dict(meta.extra_info),
    )
    data = _fetch(ordered.keys, meta.partition_id, FIELDS)
    extra = read_verdicts(data["extra_fields"])
    rewards = torch.stack([row.sum() for row in data["rm_scores"].unbind()]).to(torch.float64)
    errors = [str(info.get("status") or "ok") != "ok" for info in extra]
    responses = [row.tolist() for row in data["responses"].unbind()]
    prompts = [row.tolist() for row in data["prompts"].unbind()]
    batch = RowBatch(
        uids=[parts[i][0] for i in order],
        rollout_index=[parts[i][1] for i in order],
        rewards=rewards,
        errors=errors,
        responses=tokenizer.batch_decode(responses, skip_special_tokens=True),
        feedback=[info.get("feedback") or None for info in extra],
        raw_prompts=[list(getattr(value, "data", value)) for value in list(data["raw_prompt"])],
        prompt_lengths=[len(row) for row in prompts],
        response_lengths=[len(row) for row in responses],
        question_ids=[question_ids[i] for i in order],
        prompt_ids=prompts,
        extra_infos=[infos[i] for i in order],
    )
    return RolloutRows(ordered, [question_ids[i] for i in order], rewards, errors, extra, batch, data)
