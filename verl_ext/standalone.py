"""Student and teacher of one rank without Ray and without a rollout: for benchmarks and for tests on several ranks.

The same workers, engines and settings as in a run. The caller starts the processes and sets the environment that
``torch.distributed`` reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_ext import engine
from verl_ext.adapter import has_own_weights
from verl_ext.config import distill_config
from verl_ext.loss import ROWS, TOKENS, WEIGHT
from verl_ext.packing import to_jagged
from verl_ext.passes import ROW_ID
from verl_ext.worker import MINI_BATCH, TEACHER_PROMPT, DistillTrainingWorker, DistillWorker


class _TeacherOnly(ActorRolloutRefWorker):
    ref_worker_cls = DistillTrainingWorker


class StandaloneWorker(DistillWorker):
    """:class:`DistillWorker` whose student and teacher are built one after the other."""

    def __init__(self, config: DictConfig) -> None:
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
        with open_dict(config):
            config.actor_rollout_ref.distill = config.distill
        super().__init__(config.actor_rollout_ref, role="actor")

    def init_model(self) -> None:
        distill = distill_config(self.config.distill)
        if has_own_weights(distill, self.config.model):
            placement = "host" if distill.teacher.offload else "device"
            other = _TeacherOnly(self.config, role="ref")
            other.ref_worker_cls = self._teacher_worker_class(distill)
            with engine.forward_only_placement(placement):
                other.init_model()
            self.ref = other.ref
        super().init_model()


def make_batch(
    prompts: list[list[int]],
    responses: list[list[int]],
    teacher_prompts: list[list[int]],
    weights: list[float],
    *,
    row_ids: list[int] | None = None,
    mini_batches: list[int] | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    **columns: Any,
) -> TensorDict:
    """One rank's rows of a step, as the trainer sends them.

    Args:
        weights: 0 where the row is not distilled.
        rows, tokens: denominators of the whole mini-batch over all ranks; this rank's own where not given.
        columns: further jagged columns of the responses, as lists of lists.
    """
    count = len(prompts)
    both = [torch.tensor(p + r) for p, r in zip(prompts, responses, strict=True)]
    ones = [torch.ones(len(r), dtype=torch.int64) for r in responses]
    batch = {
        "input_ids": to_jagged(both),
        "position_ids": to_jagged([torch.arange(len(row)) for row in both]),
        "prompts": to_jagged([torch.tensor(p) for p in prompts]),
        "responses": to_jagged([torch.tensor(r) for r in responses]),
        "response_mask": to_jagged(ones),
        "loss_mask": to_jagged(ones),
        TEACHER_PROMPT: to_jagged([torch.tensor(p) for p in teacher_prompts]),
        WEIGHT: torch.tensor(weights, dtype=torch.float32),
        ROW_ID: torch.tensor(row_ids if row_ids is not None else list(range(count))),
        MINI_BATCH: torch.tensor(mini_batches if mini_batches is not None else [0] * count),
        ROWS: torch.full((count,), rows if rows is not None else count),
        TOKENS: torch.full((count,), tokens if tokens is not None else sum(len(r) for r in responses)),
    }
    for name, values in columns.items():
        batch[name] = to_jagged([torch.tensor(row) for row in values])
    return tu.get_tensordict(batch)
