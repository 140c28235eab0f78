"""verl's actor-rollout-reference worker with a teacher in the reference policy's place.

One step calls, in the same row order: ``compute_log_prob`` (student pass; leaves the support), ``compute_teacher``,
``update_actor``, ``update_teacher``. What is as wide as the support stays in this process (:mod:`verl_ext.row_store`).
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.py_functional import append_to_dict
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_ext import engine, teacher
from verl_ext.config import DistillConfig, distill_config
from verl_ext.loss import WEIGHT, Loss
from verl_ext.packing import lengths, to_jagged
from verl_ext.passes import ROW_ID, Discrepancy, ForwardPass, StudentSupport, TeacherSupport
from verl_ext.row_store import STORE

MINI_BATCH = "mini_batch"
"""Field: int64 [B], the mini-batch the row was assigned to."""
TEACHER_PROMPT = "teacher_prompt"
"""Field: jagged int64, token ids of the teacher's prompt; a single token where the row has no context."""


class DistillTrainingWorker(TrainingWorker):
    """verl's training worker with mini-batches of their own sizes, and passes with a loss function of their own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.updated = False

    @contextmanager
    def _calling(self, function: Any):
        before, self.loss_fn = self.loss_fn, function
        try:
            yield
        finally:
            self.loss_fn = before

    def forward(self, data: TensorDict, forward_pass: ForwardPass) -> TensorDict:
        """A pass without gradient in which ``forward_pass`` reads the logits."""
        tu.assign_non_tensor(data, compute_loss=True, distillation_use_topk=True)
        with self._calling(forward_pass):
            return self.infer_batch(data)

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """verl's loop over mini-batches, where compaction gave each its own number of rows.

        Rows carry their mini-batch; verl's own loop runs where they do not.
        """
        if MINI_BATCH not in data:
            output = super().train_mini_batch(data)
            self.updated = _any_finite(tu.get(output, "metrics")) if output is not None else True
            return output
        for key in ("mini_batch_size", "num_mini_batch", "epochs", "seed", "dataloader_kwargs"):
            tu.pop(data, key=key, default=None)
        indices = data[MINI_BATCH].unique().tolist()
        metrics: dict[str, Any] = {}
        self.updated = False
        with self.engine.train_mode():
            for index in indices:
                mini_batch = tu.index_select_tensor_dict(data, torch.nonzero(data[MINI_BATCH] == index).flatten())
                tu.assign_non_tensor(
                    mini_batch,
                    global_token_num=NonTensorData(self._global_lengths(mini_batch)),
                    update_lr_scheduler=index == indices[-1],
                    disable_auto_offload=True,
                )
                output = self.train_batch(mini_batch)
                if output is not None:
                    part = tu.get(output, "metrics")
                    self.updated = self.updated or _any_finite(part)
                    append_to_dict(metrics, {key: _over_ranks(value) for key, value in part.items()})
        if not self.engine.is_mp_src_rank_with_outputs():
            return None
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics}).cpu()

    def _global_lengths(self, data: TensorDict) -> list[int]:
        group = self.engine.get_data_parallel_group()
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, lengths(data["input_ids"]).tolist(), group)
        return [length for part in gathered for length in part]


def _over_ranks(value: Any) -> Any:
    """One mini-batch's metric over the ranks, as verl's own loop folds it."""
    from verl.utils.metric import Metric

    if not isinstance(value, list):
        return value
    return Metric.aggregate_dp(value) if isinstance(value[0], Metric) else [x for part in value for x in part]


def _any_finite(metrics: dict[str, Any]) -> bool:
    norms = metrics.get("grad_norm", [])
    return any(math.isfinite(norm) for norm in (norms if isinstance(norms, list) else [norms]))


class DistillWorker(ActorRolloutRefWorker):
    """Student, teacher and rollout in one process."""

    actor_worker_cls = DistillTrainingWorker
    ref_worker_cls = DistillTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Builds teacher, student and rollout; the trainer put our block into `actor_rollout_ref.distill`."""
        self.distill: DistillConfig = distill_config(self.config.distill)
        placement = None
        if self.distill.enabled:
            placement = "host" if self.distill.teacher.offload else "device"
        with engine.forward_only_placement(placement):
            super().init_model()
        if self.distill.enabled and self.ref is not None:
            teacher.check_same_parameters(self._teacher_shards(), self._student_shards())
        self.actor.set_loss_fn(Loss(self.distill, self.loss_fn.keywords["config"]))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def describe(self) -> dict[str, str]:
        """What this worker is made of: proof that the driver's plugin, engine and loss arrived."""
        return {
            "engine": type(self.actor.engine).__name__,
            "loss": type(self.actor.loss_fn).__name__,
            "teacher": type(self.ref.engine).__name__ if self.ref is not None else "none",
        }

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        """Student pass: verl's log-probabilities, and the support of rows that will be distilled."""
        if ROW_ID not in data:
            return super().compute_log_prob(data)
        STORE.clear()
        # The advantage needs the sampled token only.
        topk = self.distill.divergence.topk if self.distill.divergence_loss else 1
        output = self.actor.forward(data, StudentSupport(topk))
        return output.cpu() if output is not None else None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_teacher(self, data: TensorDict) -> TensorDict:
        """Teacher pass over the rows that have a context, packed by its own token budget.

        Returns:
            ``teacher_gap`` [B]: mean over the response of log pi_T(y_t) - log pi_S(y_t); NaN for rows without context.
            Where the advantage carries the distillation also ``teacher_log_ratio``, jagged: that difference per token.
        """
        chosen = torch.nonzero((data[WEIGHT] != 0) & (data[ROW_ID] >= 0)).flatten()
        self._run_teacher(self._teacher_batch(data, chosen))
        gaps = torch.full((len(data),), float("nan"))
        ratios = [torch.zeros(len(row)) for row in data["responses"].unbind()]
        for index in chosen.tolist():
            state = STORE[int(data[ROW_ID][index])]
            ratios[index] = (state.teacher_token_log_probs - state.student_log_probs).cpu()
            gap = ratios[index][data["response_mask"][index].bool().cpu()]
            gaps[index] = gap.mean().item() if gap.numel() else float("nan")
        output = {"teacher_gap": gaps}
        if not self.distill.divergence_loss:
            output["teacher_log_ratio"] = to_jagged(ratios)
        return tu.get_tensordict(output)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_discrepancy(self, data: TensorDict) -> TensorDict:
        """Self-check: teacher against student on the student's own prompts, through both engines.

        Returns:
            ``mean`` and ``largest`` [B]: divergence in nats over this rank's rows, repeated for every row.
        """
        STORE.clear()
        self.actor.forward(_copy(data), StudentSupport(self.distill.divergence.topk))
        rows = torch.arange(len(data))
        self._run_teacher(self._teacher_batch(data, rows, prompts=list(data["prompts"].unbind())))
        check = Discrepancy(self.distill.divergence)
        self.actor.forward(_copy(data), check)
        STORE.clear()
        ones = torch.ones(len(data))
        return tu.get_tensordict({"mean": ones * (check.total / max(check.tokens, 1)), "largest": ones * check.largest})

    def _run_teacher(self, batch: TensorDict) -> None:
        worker = self.ref if self.ref is not None else self.actor
        worker.forward(batch, TeacherSupport())

    def _teacher_batch(
        self, data: TensorDict, chosen: torch.Tensor, prompts: list[torch.Tensor] | None = None
    ) -> TensorDict:
        """Teacher prompt + response of the chosen rows, with as many rows on every rank.

        A rank with fewer rows repeats a short one (row id -1: computed, stored nowhere), because every rank must run
        the same number of FSDP forwards.
        """
        prompts = prompts if prompts is not None else list(data[TEACHER_PROMPT].unbind())
        responses = list(data["responses"].unbind())
        rows = [(prompts[i], responses[i], int(data[ROW_ID][i])) for i in chosen.tolist()]
        count = torch.tensor(len(rows), device=prompts[0].device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        filler = (responses[0][:1], responses[0][:1], -1)
        rows += [filler] * (max(int(count), 1) - len(rows))
        inputs = [torch.cat([prompt, response]) for prompt, response, _ in rows]
        batch = tu.get_tensordict(
            {
                "input_ids": to_jagged(inputs),
                "position_ids": to_jagged([torch.arange(len(row), device=row.device) for row in inputs]),
                "prompts": to_jagged([prompt for prompt, _, _ in rows]),
                "responses": to_jagged([response for _, response, _ in rows]),
                "loss_mask": to_jagged([torch.ones_like(response) for _, response, _ in rows]),
                ROW_ID: torch.tensor([row_id for _, _, row_id in rows], device=prompts[0].device),
            }
        )
        # verl renames the key while it builds a reference model; a live teacher has none.
        ref = self.config.ref
        limit = ref.get("ppo_max_token_len_per_gpu") or ref.get("log_prob_max_token_len_per_gpu") or 0
        budget = max(int(limit), max(len(row) for row in inputs))
        tu.assign_non_tensor(
            batch,
            temperature=tu.get(data, "temperature"),
            use_dynamic_bsz=True,
            max_token_len_per_gpu=budget,
            distillation_only=True,
        )
        return batch

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def skip_update(self) -> float:
        """A step in which no row trains: only the schedule advances, once per trainer step as in verl."""
        self.actor.updated = False
        return self.actor.engine.lr_scheduler_step()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def update_teacher(self, rate: float) -> dict[str, float]:
        """Moves the teacher once per trainer step, after the update, unless no optimiser step was finite.

        Returns:
            ``moved`` (0 or 1) and ``distance``, this rank's squared norm of teacher minus student.
        """
        shards, student = self._teacher_shards(), self._student_shards()
        if self.actor.updated:
            teacher.move_towards(shards, student, rate)
        return {"moved": float(self.actor.updated), "squared_distance": teacher.squared_distance(shards, student)}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_teacher(self, folder: str) -> None:
        """Writes this rank's fp32 shards."""
        teacher.save(self._teacher_shards(), Path(folder), self.rank, self.world_size)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_teacher(self, folder: str) -> None:
        """Reads this rank's fp32 shards."""
        teacher.load(self._teacher_shards(), Path(folder), self.rank, self.world_size)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def digests(self) -> dict[str, str]:
        """SHA-256 of this rank's student and teacher shards: bit-for-bit comparison of two runs."""
        from verl_ext.digest import digest

        parts = {"student": digest(self._student_shards())}
        if self.ref is not None:
            parts["teacher"] = digest(self._teacher_shards())
        return parts

    def _student_shards(self) -> dict[str, torch.Tensor]:
        return teacher.local_shards(self.actor.engine.module)

    def _teacher_shards(self) -> dict[str, torch.Tensor]:
        return teacher.local_shards(self.ref.engine.module)


def _copy(data: TensorDict) -> TensorDict:
    """A pass writes its settings into the batch; the next one must not see them."""
    return data.clone(recurse=False)
