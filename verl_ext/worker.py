"""verl's actor-rollout-reference worker with a teacher in the reference policy's place.

One step calls, with the rows on the same ranks: ``compute_log_prob`` (student pass, only where something needs it),
``compute_teacher``, ``update_actor``, ``update_teacher``. What is as wide as the support or the hidden states stays in
this process (:mod:`verl_ext.row_store`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.py_functional import append_to_dict
from verl.workers.config import HFModelConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_ext import compat, engine, teacher
from verl_ext.adapter import ADAPTER_OFF, is_adapter_off, uses_adapter
from verl_ext.checkpoint_manifest import seal_files
from verl_ext.checkpoint_saving import rank_files
from verl_ext.config import DistillConfig, distill_config
from verl_ext.gradient_sketch import GradientSketch
from verl_ext.loss import WEIGHT, Loss
from verl_ext.packing import lengths, to_jagged
from verl_ext.pair_pass import PairPass
from verl_ext.passes import ROW_ID, ForwardPass, StudentPass, TeacherPass, rollout_temperature, settle_mixed_teacher
from verl_ext.row_store import STORE
from verl_ext.student_values import Discrepancy
from verl_ext.teacher_states import take_states

MINI_BATCH = "mini_batch"
"""Field: int64 [B], the mini-batch the row was assigned to."""
TEACHER_PROMPT = "teacher_prompt"
"""Field: jagged int64, token ids of the teacher's prompt; a single token where the row has no context."""


class DistillTrainingWorker(TrainingWorker):
    """verl's training worker with mini-batches of their own sizes, and passes with a loss function of their own."""

    def __init__(self, config: Any, model_path: str | None = None) -> None:
        if model_path is not None:
            config = dataclasses.replace(config, model_config=replace_model(config.model_config, model_path))
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
            with self._watching_steps():
                return super().train_mini_batch(data)
        for key in ("mini_batch_size", "num_mini_batch", "epochs", "seed", "dataloader_kwargs"):
            tu.pop(data, key=key, default=None)
        indices = data[MINI_BATCH].unique().tolist()
        metrics: dict[str, Any] = {}
        with self._watching_steps(), self.engine.train_mode():
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
                    append_to_dict(metrics, {key: _over_ranks(value) for key, value in part.items()})
        if not self.engine.is_mp_src_rank_with_outputs():
            return None
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics}).cpu()

    @contextmanager
    def _watching_steps(self):
        """Notes whether an optimiser step was finite: from the engine, because not every rank is given metrics."""
        before, self.updated = self.engine.finite_steps, False
        yield
        self.updated = self.engine.finite_steps > before

    def _global_lengths(self, data: TensorDict) -> list[int]:
        group = self.engine.get_data_parallel_group()
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, lengths(data["input_ids"]).tolist(), group)
        return [length for part in gathered for length in part]


def replace_model(model_config: Any, path: str) -> Any:
    """verl's model settings for another checkpoint."""
    kept = {
        name: getattr(model_config, name)
        for name in ("override_config", "use_remove_padding", "trust_remote_code", "use_shm", "external_lib")
    }
    return HFModelConfig(path=path, **kept)


def _over_ranks(value: Any) -> Any:
    """One mini-batch's metric over the ranks, as verl's own loop folds it."""
    from verl.utils.metric import Metric

    if not isinstance(value, list):
        return value
    return Metric.aggregate_dp(value) if isinstance(value[0], Metric) else [x for part in value for x in part]


class DistillWorker(ActorRolloutRefWorker):
    """Student, teacher and rollout in one process."""

    actor_worker_cls = DistillTrainingWorker
    ref_worker_cls = DistillTrainingWorker
    _teacher_head: torch.Tensor | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Builds teacher, student and rollout; the trainer put our block into `actor_rollout_ref.distill`."""
        self.distill: DistillConfig = distill_config(self.config.distill)
        placement = None
        if self.distill.enabled:
            placement = "host" if self.distill.teacher.offload else "device"
        self.ref_worker_cls = self._teacher_worker_class(self.distill)
        if uses_adapter(self.config.model):
            # verl leaves torch at its fixed default seed: every run would start with the same A.
            torch.manual_seed(self.config.actor.fsdp_config.seed)
        with engine.forward_only_placement(placement):
            super().init_model()
        # Without one, as for a teacher's own workers, vLLM need not be imported, which takes seconds.
        if self.rollout is not None:
            compat.send_weights_on_own_socket(self.rollout)
            compat.watch_server_while_sending(self.rollout)
        if self.distill.enabled:
            self._check_models()
        self.actor.set_loss_fn(Loss(self.distill, self.loss_fn.keywords["config"]))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_teacher_head(self, head: torch.Tensor) -> None:
        """The head of a teacher that has workers of its own, [V, E]; it stands still."""
        self._teacher_head = head.to(get_device_id())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def enter_stage(self, distill: dict[str, Any]) -> None:
        """Another block from the next step on; the teacher, its weights and its place stay."""
        self.distill = distill_config(distill)
        self.actor.set_loss_fn(Loss(self.distill, self.loss_fn.keywords["config"]))

    @staticmethod
    def _teacher_worker_class(distill: DistillConfig) -> Callable[..., DistillTrainingWorker]:
        path = distill.teacher.path if distill.enabled else None
        return partial(DistillTrainingWorker, model_path=path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def describe(self) -> dict[str, str]:
        """What this worker is made of: proof that the driver's plugin, engine and loss arrived."""
        return {
            "engine": type(self.actor.engine).__name__,
            "loss": type(self.actor.loss_fn).__name__,
            "teacher": type(self.ref.engine).__name__ if self.ref is not None else self._copyless_teacher,
        }

    @property
    def _adapter_off(self) -> bool:
        return is_adapter_off(self.distill, self.config.model)

    @property
    def _copyless_teacher(self) -> str:
        return ADAPTER_OFF if self._adapter_off else "none"

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        """Student pass: verl's log-probabilities, and the support of rows that will be distilled."""
        # verl's reference policy under LoRA is this same call with the adapter off: no student pass.
        reference = tu.get_non_tensor_data(data=data, key="no_lora_adapter", default=False)
        if reference or ROW_ID not in data or not self.distill.student_pass:
            return super().compute_log_prob(data)
        STORE.clear()
        log_probs_too = not tu.get_non_tensor_data(data=data, key="distillation_only", default=False)
        return self._forwarded(self.actor.forward(data, self._student_pass(log_probs_too)))

    def _student_pass(self, log_probs_too: bool = False) -> StudentPass:
        """The student pass, in the place where the update reads; verl's own log-probabilities need the logits."""
        hidden = self.distill.student_inputs == "hidden_states" and not log_probs_too
        return StudentPass(self.distill.divergence.topk if self.distill.support_pass else None, hidden_states=hidden)

    @staticmethod
    def _forwarded(output: TensorDict | None) -> TensorDict | None:
        return output.cpu() if output is not None else None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_teacher(self, data: TensorDict) -> TensorDict:
        """Teacher pass over the rows that have a context, packed by its own token budget.

        Returns:
            ``taught``: bool [B], the rows it was run on. Where the advantage carries the distillation also
            ``teacher_log_ratio``, jagged: log pi_T(y_t) - log pi_S(y_t).
        """
        if not self.distill.student_pass:
            STORE.clear()
        taught = (data[WEIGHT] != 0) & (data[ROW_ID] >= 0)
        chosen = torch.nonzero(taught).flatten()
        self._run_teacher(data, chosen, list(data[TEACHER_PROMPT].unbind()))
        output = {"taught": taught}
        if self.distill.carrier == "advantage":
            ratios = [torch.zeros(len(row)) for row in data["responses"].unbind()]
            for index in chosen.tolist():
                state = STORE[int(data[ROW_ID][index])]
                ratios[index] = (state.teacher_token_log_probs - state.student_log_probs).cpu()
            output["teacher_log_ratio"] = to_jagged(ratios)
        return tu.get_tensordict(output)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def score_pairs(self, data: TensorDict) -> TensorDict:
        """The student on both sides of the pairs, after the teacher pass.

        Returns:
            the fields of :meth:`verl_ext.pair_pass.PairPass.columns`.
        """
        scoring = PairPass(self.distill)
        self.actor.forward(_copy(data), scoring)
        STORE.clear()
        return tu.get_tensordict(scoring.columns(data[ROW_ID].tolist()))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_discrepancy(self, data: TensorDict) -> TensorDict:
        """Self-check: teacher against student on the student's own prompts, through both engines.

        Returns:
            ``mean`` and ``largest`` [B]: divergence in nats over this rank's rows, repeated for every row.
        """
        STORE.clear()
        if self.distill.student_pass:
            self.actor.forward(_copy(data), self._student_pass())
        self._run_teacher(data, torch.arange(len(data)), list(data["prompts"].unbind()))
        check = Discrepancy(self.distill)
        self.actor.forward(_copy(data), check)
        STORE.clear()
        ones = torch.ones(len(data))
        return tu.get_tensordict({"mean": ones * (check.total / max(check.tokens, 1)), "largest": ones * check.largest})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: TensorDict) -> TensorDict:
        """verl's update; what the passes left for it is forgotten afterwards, before the rollout needs the memory."""
        if not self.distill.teacher.beside:
            take_states(data, self._teacher_head)
        output = self.actor.train_mini_batch(data=data)
        STORE.clear()
        return self._forwarded(output)

    def _run_teacher(self, data: TensorDict, chosen: torch.Tensor, prompts: list[torch.Tensor]) -> None:
        """The teacher on the chosen rows: one pass, or one for each part of a mixed teacher."""
        settings, divergence = self.distill.teacher, self.distill.divergence
        support = "none"
        if not self.distill.one_token:
            support = {"student_topk": "given"}.get(divergence.support, divergence.support)
        parts = [(self.actor if settings.kind == "live" or self._adapter_off else self.ref, 1.0)]
        if settings.kind == "trust_region":
            parts = [(self.ref, 1.0 - settings.update_rate), (self.actor, settings.update_rate)]
        keep = self.distill.teacher_states if len(parts) == 1 else "hidden_states"
        for worker, share in parts:
            forward_pass = TeacherPass(
                keep,
                support=support,
                topk=divergence.topk,
                share=share,
                on_host=settings.offload,
                from_logits=divergence.inputs == "logits",
            )
            batch = self._teacher_batch(data, chosen, prompts)
            tu.assign_non_tensor(batch, no_lora_adapter=self._adapter_off)
            worker.forward(batch, forward_pass)
            forward_pass.leave_head()
        if keep != self.distill.teacher_states:
            rows = {int(data[ROW_ID][i]): data["responses"][i] for i in chosen.tolist()}
            settle_mixed_teacher(
                support=support, topk=divergence.topk, temperature=rollout_temperature(data), tokens=rows
            )

    def _teacher_batch(self, data: TensorDict, chosen: torch.Tensor, prompts: list[torch.Tensor]) -> TensorDict:
        """Teacher prompt + response of the chosen rows, with as many rows on every rank.

        A rank with fewer rows repeats a short one (row id -1: computed, stored nowhere), because every rank must run
        the same number of FSDP forwards.
        """
        responses = list(data["responses"].unbind())
        rows = [(prompts[i], responses[i], int(data[ROW_ID][i])) for i in chosen.tolist()]
        longest = max((len(prompt) + len(response) for prompt, response, _ in rows), default=2)
        # verl compares the longest row of all ranks with each rank's budget: they must agree on both.
        agreed = torch.tensor([len(rows), longest], device=prompts[0].device)
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        most, longest = agreed.tolist()
        filler = (responses[0][:1], responses[0][:1], -1)
        rows += [filler] * (max(most, 1) - len(rows))
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
        budget = max(int(limit), longest)
        tu.assign_non_tensor(
            batch,
            temperature=tu.get(data, "temperature"),
            use_dynamic_bsz=True,
            max_token_len_per_gpu=budget,
            distillation_only=True,
        )
        return batch

    def _check_models(self) -> None:
        """Raises ValueError where the teacher's weights or vocabulary do not fit the student's."""
        vocabulary = self.actor.model_config.hf_config.get_text_config().vocab_size
        on_support = not self.distill.one_token and self.distill.divergence.support != "full"
        if on_support and self.distill.divergence.topk > vocabulary:
            raise ValueError(
                f"distill.divergence.topk={self.distill.divergence.topk} is more than the model's {vocabulary} tokens"
            )
        if self.ref is None:
            return
        if self.distill.teacher.kind == "external":
            other = self.ref.model_config.hf_config.get_text_config().vocab_size
            if other != vocabulary:
                raise ValueError(f"the teacher's vocabulary has {other} tokens, the student's {vocabulary}")
            return
        teacher.check_same_parameters(self._teacher_shards(), self._student_shards(), moves=self.distill.teacher.moves)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def skip_update(self) -> float:
        """A step in which no row trains: only the schedule advances, once per trainer step as in verl."""
        self.actor.updated = False
        return self.actor.engine.lr_scheduler_step()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def update_teacher(self, rate: float) -> dict[str, float]:
        """Moves the teacher after the update, unless no optimiser step was finite; rate 0 only measures.

        Returns:
            ``moved`` (0 or 1) and ``distance``, this rank's squared norm of teacher minus student.
        """
        shards, student = self._teacher_shards(), self._student_shards()
        moved = self.actor.updated and rate > 0
        if moved:
            teacher.move_towards(shards, student, rate)
        return {"moved": float(moved), "squared_distance": teacher.squared_distance(shards, student)}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_teacher(self, folder: str) -> None:
        """Writes this rank's fp32 shards."""
        teacher.save(self._teacher_shards(), Path(folder), self.rank, self.world_size)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_teacher(self, folder: str) -> None:
        """Reads this rank's fp32 shards."""
        teacher.load(self._teacher_shards(), Path(folder), self.rank, self.world_size)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def seal_checkpoint(self, folder: str) -> dict[str, tuple[int, str]]:
        """Size and checksum of what this rank has written into a checkpoint; it is on the disk afterwards."""
        return seal_files(Path(folder), rank_files(Path(folder), self.rank))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def measure_gradients(self, dimensions: int, seed: int) -> None:
        """From now on an optimiser step projects the gradient and leaves the weights alone."""
        self.actor.engine.sketch = GradientSketch(dimensions, seed)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_gradients(self) -> list[torch.Tensor]:
        """The projections since the last call, one float64 [dimensions] per optimiser step; equal on every rank."""
        sketch = self.actor.engine.sketch
        vectors, sketch.vectors = sketch.vectors, []
        return vectors

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def digests(self) -> dict[str, str]:
        """SHA-256 of this rank's student and teacher shards: bit-for-bit comparison of two runs."""
        from verl_ext.digest import digest

        parts = {"student": digest(self._student_shards())}
        if self.ref is not None:
            parts["teacher"] = digest(self._teacher_shards())
        if uses_adapter(self.config.model):
            shards = self._student_shards()
            parts["adapter"] = digest({name: shard for name, shard in shards.items() if "lora_" in name})
            parts["base"] = digest({name: shard for name, shard in shards.items() if "lora_" not in name})
        return parts

    def _student_shards(self) -> dict[str, torch.Tensor]:
        return teacher.local_shards(self.actor.engine.module)

    def _teacher_shards(self) -> dict[str, torch.Tensor]:
        return teacher.local_shards(self.ref.engine.module)


def _copy(data: TensorDict) -> TensorDict:
    """A pass writes its settings into the batch; the next one must not see them."""
    return data.clone(recurse=False)
