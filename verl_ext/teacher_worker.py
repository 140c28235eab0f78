"""An external teacher on workers of its own, for a teacher that does not fit beside the student (PACED: 70B to 8B).

Its hidden states, or its log-probabilities on its own top-k, then travel as fields of the batch; its head travels once.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray.base import RayClassWithInitArgs, RayWorkerGroup
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_ext import engine
from verl_ext.config import distill_config
from verl_ext.loss import WEIGHT
from verl_ext.packing import to_jagged
from verl_ext.passes import ROW_ID
from verl_ext.row_store import STORE, RowState
from verl_ext.teacher_states import PREFIX, STATE_DTYPES, state_names
from verl_ext.worker import TEACHER_PROMPT, DistillWorker

POOL = "teacher_pool"


class TeacherWorker(DistillWorker):
    """A worker that holds the teacher only."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Builds the teacher."""
        self.distill = distill_config(self.config.distill)
        self.ref_worker_cls = self._teacher_worker_class(self.distill)
        with engine.forward_only_placement("host" if self.distill.teacher.offload else "device"):
            ActorRolloutRefWorker.init_model(self)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def enter_stage(self, distill: dict[str, Any]) -> None:
        """Another block from the next step on."""
        self.distill = distill_config(distill)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def vocabulary(self) -> int:
        """Tokens of the teacher's head."""
        return self.ref.model_config.hf_config.get_text_config().vocab_size

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="ref"))
    def compute_states(self, data: TensorDict) -> TensorDict:
        """The teacher pass over the rows that have a context.

        Returns:
            the row's state as jagged fields [B, T, …]; one empty token where the row is not taught.
        """
        STORE.clear()
        chosen = torch.nonzero((data[WEIGHT] != 0) & (data[ROW_ID] >= 0)).flatten()
        self._run_teacher(data, chosen, list(data[TEACHER_PROMPT].unbind()))
        names = state_names(self.distill)
        states = [STORE[int(i)] if int(i) in STORE else RowState() for i in data[ROW_ID].tolist()]
        first = next((state for state in states if getattr(state, names[0]) is not None), None)
        fields = {}
        for name in names:
            # Every rank has read a row, if only a filler, and so knows the precision.
            dtype = STORE.teacher_head.dtype if name == "teacher_hidden" else STATE_DTYPES[name]
            empty = torch.zeros(1, *self._width(name, first), dtype=dtype)
            rows = [getattr(state, name) for state in states]
            fields[PREFIX + name] = to_jagged([empty if row is None else row.to("cpu", dtype) for row in rows])
        return tu.get_tensordict(fields)

    def _width(self, name: str, first: RowState | None) -> tuple[int, ...]:
        if first is not None:
            return tuple(getattr(first, name).shape[1:])
        text = self.ref.model_config.hf_config.get_text_config()
        widths = {"teacher_hidden": text.hidden_size, "support_ids": self.distill.divergence.topk}
        widths["teacher_log_probs"] = widths["support_ids"]
        return (widths[name],) if name in widths else ()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def head(self) -> torch.Tensor | None:
        """The head that reads the hidden states of the last pass, [V, E]; from rank 0 only."""
        return STORE.teacher_head.cpu() if self.rank == 0 and STORE.teacher_head is not None else None


def start_teacher(config: DictConfig, pool: Any, **settings: Any) -> RayWorkerGroup:
    """The workers of the teacher, on a resource pool of their own."""
    made = RayClassWithInitArgs(cls=ray.remote(TeacherWorker), config=config.actor_rollout_ref, role="ref")
    group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=made, **settings)
    group.init_model()
    return group
