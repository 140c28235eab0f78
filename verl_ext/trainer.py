"""verl's synchronous trainer with the way of a batch that distillation needs (DESIGN, section 3).

Steps 1 to 4 are the pure functions of :mod:`verl_ext.batch_plan` and :mod:`verl_ext.compaction`; this class reads their
columns from TransferQueue, writes their results back as fields of the batch, and calls the workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.workers.utils.padding import response_to_nested

from verl_ext import trainer_state
from verl_ext.adapter import ADAPTER_OFF, has_own_weights, is_adapter_off, switching_servers
from verl_ext.advantage import self_teacher_token_advantage
from verl_ext.answer_keys import answer_keys
from verl_ext.batch_plan import BatchPlan, plan_batch
from verl_ext.checkpoint_manifest import STATE_FILE
from verl_ext.checkpoint_saving import complete, partial_folder, step_folder
from verl_ext.compat import saving_into
from verl_ext.config import distill_config
from verl_ext.loss import WEIGHT
from verl_ext.non_finite import NonFiniteWatch
from verl_ext.old_log_probs import OldLogProbs, old_log_probs
from verl_ext.outcome_advantage import FIELDS as ADVANTAGE_FIELDS
from verl_ext.outcome_advantage import outcome_advantages
from verl_ext.pair_step import PairStep, mark_teacher_samples
from verl_ext.pairs import PairPlan
from verl_ext.passes import ROW_ID
from verl_ext.question_trainer import QuestionTrainer
from verl_ext.rollout_correction import correct_rollouts
from verl_ext.rollout_rows import RolloutRows, read_rows, read_verdicts
from verl_ext.row_metrics import row_metrics, take_row_statistics, take_token_divergences
from verl_ext.row_records import sampled_completions, sampled_rows, skipped_rows
from verl_ext.stages import stage_after
from verl_ext.step_sink import StepSink, Tee
from verl_ext.teacher_checks import GapAlarm, check_equality
from verl_ext.teacher_worker import POOL, start_teacher
from verl_ext.validation import group_answers, metrics_of
from verl_ext.validation_items import item_counts
from verl_ext.verifier_config import verifier_config
from verl_ext.verifier_watch import VerifierWatch
from verl_ext.whole_groups import check_whole
from verl_ext.work import Work, lay_out, read_advantages, real_rows, rows_per_rank_multiple
from verl_ext.worker import MINI_BATCH, DistillWorker


class DistillTrainer(QuestionTrainer):
    """One trainer for every method: what it does is decided by the ``distill`` block."""

    def __init__(self, config: DictConfig, sink: StepSink, *, seed: int = 0) -> None:
        self.seed = seed
        with open_dict(config):
            config.actor_rollout_ref.distill = config.distill
        super().__init__(config, sink)
        self._gap_alarm = GapAlarm(self.distill)
        self._non_finite = NonFiniteWatch(self.distill.non_finite_limit, sink)
        self._pairs = PairStep(self.distill, config, sink.warning) if self.distill.pairs else None
        self._verifier = VerifierWatch(verifier_config(config.verifier).max_error_rate, sink.warning)
        self._answer_keys = answer_keys(config)
        self._self_check: dict[str, float] = {}
        self._teacher_head_sent = False
        self._resumed = False
        self._trained = False
        self._warned_of_lost_groups = False
        self._validation_seconds: float | None = None

    # ---------------------------------------------------------------------------------------------------- building

    @property
    def logger(self) -> Any:
        return self._logger

    @logger.setter
    def logger(self, tracker: Any) -> None:
        # ``fit`` builds its tracker itself; this is where ours joins it.
        self._logger = Tee(tracker, self.sink, names=list(self.config.trainer.logger))

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        # verl's 2 s would be most of a tiny step, and its YAML has no key for it.
        buffer.poll_interval = self.distill.poll_interval
        return buffer

    @property
    def teacher_has_own_weights(self) -> bool:
        """Whether a second copy of the model stands in the reference policy's place."""
        return has_own_weights(self.distill, self.config.actor_rollout_ref.model)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        worker = ray.remote(DistillWorker)
        role = Role.ActorRollout if Role.ActorRollout in self.role_worker_mapping else Role.ActorRolloutRef
        pool = self.mapping.pop(role)
        self.role_worker_mapping.pop(role)
        if self.teacher_has_own_weights:
            role = Role.ActorRolloutRef
        self.role_worker_mapping[role] = worker
        self.mapping[role] = pool
        teacher = self.distill.teacher
        if self.distill.enabled and not teacher.beside:
            self.resource_pool_manager.resource_pool_spec[POOL] = [teacher.workers] * teacher.nodes

    def _setup(self) -> None:
        with switching_servers(self.config):
            super()._setup()
        if POOL in self.resource_pool_manager.resource_pool_dict:
            pool = self.resource_pool_manager.resource_pool_dict[POOL]
            self.teacher_wg = start_teacher(self.config, pool, device_name=self.config.trainer.device)

    def on_init_end(self) -> None:
        for rank, parts in enumerate(self.actor_rollout_wg.describe()):
            expected = {"engine": "DistillEngine", "loss": "Loss"}
            expected["teacher"] = "DistillEngine" if self.teacher_has_own_weights else parts["teacher"]
            if is_adapter_off(self.distill, self.config.actor_rollout_ref.model):
                expected["teacher"] = ADAPTER_OFF
            if parts != expected:
                raise RuntimeError(f"worker {rank} runs {parts}, expected {expected}: our plugin did not reach it")
        super().on_init_end()

    # ------------------------------------------------------------------------------------------------------ a step

    @property
    def _old_log_probs(self) -> OldLogProbs:
        return old_log_probs(self.config, self.distill)

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        if not self.distill.enabled:
            return super()._step_once(metrics, timing_raw, sample_batch_size)
        with marked_timer("gen", timing_raw, color="red"):
            self.on_sample_begin()
            batch, sampling_metrics = self.replay_buffer.sample(
                global_steps=self.global_steps, partition_id="train", batch_size=sample_batch_size
            )
            metrics.update(sampling_metrics)
            self.on_sample_end()
        with marked_timer("plan", timing_raw):
            rows = read_rows(batch, self.tokenizer)
            plan = self._plan(rows, metrics)
            pairs = self._pairs.plan(rows, plan, self.global_steps) if self._pairs else None
            if pairs is not None:
                metrics.update(pairs.metrics)
                plan = replace(plan, distill_N=pairs.keep_N)
            rows.meta = self._compute_advantage(rows.meta, metrics)
            work = lay_out(
                rows,
                plan,
                self.distill,
                self.config,
                ranks=self._dp_size(),
                eos_token_id=self.tokenizer.eos_token_id,
                recorded=self._rows_to_record(rows),
            )
            metrics.update(work.metrics)
        divergences: dict[int, tuple[float, ...]] = {}
        if work.meta is None:
            self._skip(metrics)
        else:
            divergences = self._train(rows, plan, work, metrics, timing_raw, pairs)
        self._log_completions(rows, plan, divergences)
        return KVBatchMeta(
            partition_id=rows.meta.partition_id,
            keys=rows.meta.keys + [key for key, _ in work.padding],
            tags=rows.meta.tags + [tag for _, tag in work.padding],
        )

    def _plan(self, rows: RolloutRows, metrics: dict) -> BatchPlan:
        """Steps 1 to 3: pass rates, weights, teacher contexts."""
        started = time.perf_counter()
        rollout = self.config.actor_rollout_ref.rollout
        if self._pairs:
            mark_teacher_samples(rows)
        plan = plan_batch(
            rows.batch,
            weighting=self.distill.weighting,
            context=self.distill.context,
            tokenizer=self.tokenizer,
            template_kwargs=dict(self.config.data.get("apply_chat_template_kwargs") or {}),
            max_total=self.distill.context.max_length + rollout.response_length,
            seed=self.seed,
            step=self.global_steps,
            enabled=self.distill.enabled,
            weigher=self.questions.weigher,
        )
        metrics.update(plan.metrics | self.questions.metrics())
        metrics["time/driver_plan_ms"] = 1000 * (time.perf_counter() - started)
        self._count_groups(rows, metrics)
        return plan

    def _count_groups(self, rows: RolloutRows, metrics: dict) -> None:
        """Groups that lost rollouts were left out by :class:`verl_ext.whole_groups.WholeGroupBuffer`; counts them."""
        check_whole(rows.batch.uids, self.config.actor_rollout_ref.rollout.n)
        lengths = rows.batch.response_lengths
        limit = self.config.actor_rollout_ref.rollout.response_length
        metrics["response/truncated"] = sum(length >= limit for length in lengths) / max(1, len(lengths))
        groups, counts = len(set(rows.batch.uids)), self.lost_groups
        metrics["rollout/groups"] = groups
        metrics["rollout/groups_short"], metrics["rollout/groups_lost"] = counts["short"], counts["lost"]
        out = sum(counts.values())
        if out and not self._warned_of_lost_groups:
            self._warned_of_lost_groups = True
            self.sink.warning(
                f"{out} of {groups + out} groups lost rollouts at step {self.global_steps} and are left out "
                "(rollout/groups_short and groups_lost count them; Ray's worker logs say why)"
            )
        metrics.update(
            self._verifier.look(
                f"step {self.global_steps}",
                rows.verdicts,
                lambda i: f"question {rows.question_ids[i]}, response {rows.batch.responses[i][:80]!r}",
            )
        )

    def _dp_size(self) -> int:
        group = self.actor_rollout_wg
        if "actor" not in group._dispatch_info:
            group._dispatch_info["actor"] = group._query_dispatch_info("actor")
        return max(group._dispatch_info["actor"]) + 1

    def _train(
        self,
        rows: RolloutRows,
        plan: BatchPlan,
        layout: Work,
        metrics: dict,
        timing_raw: dict,
        pairs: PairPlan | None = None,
    ) -> dict[int, tuple[float, ...]]:
        """Steps 6 to 9 on the rows to forward; returns the token divergences of the rows to record."""
        work = layout.meta
        settings = {"temperature": self.config.actor_rollout_ref.rollout.temperature}
        if not self._trained and not self._resumed:
            self._check_teacher_equals_student(layout, settings)
        self._trained = True
        work.extra_info = dict(settings)
        with marked_timer("student_pass", timing_raw):
            self._student_pass(work, metrics)
        with marked_timer("teacher_pass", timing_raw):
            self._teacher_pass(work, settings)
            metrics.update(self._self_check)
            self._self_check = {}
            if self.distill.carrier == "advantage":
                metrics.update(self._row_metrics(rows, plan, self._teacher_advantage(work, metrics)))
        if self._pairs and pairs is not None:
            with marked_timer("student_pass", timing_raw):
                scoring = partial(self._call, self.actor_rollout_wg.score_pairs, work, settings)
                metrics.update(self._pairs.score(rows, plan, pairs, work, scoring, self.global_steps))
        if self.use_reference_policy:
            with marked_timer("ref", timing_raw):
                self._compute_ref_log_prob(self._meta(work, settings), metrics)
        with marked_timer("update_actor", timing_raw):
            output = self._call(self.actor_rollout_wg.update_actor, work, self._update_settings(settings))
            divergences = self._read_update(rows, plan, work, dict(output["metrics"]), metrics)
        with marked_timer("teacher_update", timing_raw):
            self._update_teacher(metrics)
        return divergences

    def _read_update(
        self, rows: RolloutRows, plan: BatchPlan, work: KVBatchMeta, output: dict[str, Any], metrics: dict
    ) -> dict[int, tuple[float, ...]]:
        """Metrics of the update, the statistics of its rows, and the steps it skipped; returns token divergences."""
        divergences = take_token_divergences(output)
        statistics = take_row_statistics(output)
        grad_norms = output["grad_norm"] if isinstance(output["grad_norm"], list) else [output["grad_norm"]]
        values = rename_dict(output, "actor/")
        values["perf/mfu/actor"] = values.pop("actor/mfu")
        metrics.update(reduce_metrics(values))
        if self._pairs:
            metrics.pop("actor/loss")  # of no meaning; the preference loss is distill/loss
        if self.distill.divergence_loss:
            metrics["distill/loss"] = metrics.pop("actor/distill/loss")
            metrics.update(self._row_metrics(rows, plan, statistics))
        warning = self._gap_alarm.look(metrics, self.global_steps)
        if warning:
            self.sink.warning(warning)
        suspects = {int(i) for i, d in zip(statistics.get("id", []), statistics.get("divergence", []), strict=True)
                    if not math.isfinite(d)}  # fmt: skip
        metrics.update(
            self._non_finite.look(
                self.global_steps, grad_norms, lambda index: self._rows_of_mini_batch(rows, plan, work, index, suspects)
            )
        )
        return divergences

    def _row_metrics(self, rows: RolloutRows, plan: BatchPlan, statistics: dict[str, np.ndarray]) -> dict[str, float]:
        return row_metrics(
            statistics,
            right_N=(rows.rewards >= self.distill.context.success_threshold).tolist(),
            pass_rates_N=plan.rates_P[plan.question_index_N].tolist(),
            on_support=not self.distill.one_token and self.distill.divergence.support != "full",
        )

    def _rows_of_mini_batch(
        self, rows: RolloutRows, plan: BatchPlan, work: KVBatchMeta, index: int, suspects: set[int]
    ) -> list[dict[str, Any]]:
        data = tq.kv_batch_get(keys=work.keys, partition_id=work.partition_id, select_fields=[MINI_BATCH, ROW_ID])
        number = data[MINI_BATCH].unique().tolist()[index]
        ids = data[ROW_ID][data[MINI_BATCH] == number].tolist()
        return skipped_rows(rows, plan, [i for i in ids if i >= 0], suspects)

    def _teacher_pass(self, work: KVBatchMeta, settings: dict) -> None:
        if self.teacher_wg is None:
            self._call(self.actor_rollout_wg.compute_teacher, work, settings)
            return
        self._call(self.teacher_wg.compute_states, work, settings)
        if self.distill.teacher_states == "hidden_states" and not self._teacher_head_sent:
            self.actor_rollout_wg.set_teacher_head(next(head for head in self.teacher_wg.head() if head is not None))
            self._teacher_head_sent = True

    def _meta(self, work: KVBatchMeta, extra_info: dict) -> KVBatchMeta:
        """A meta of its own per call: verl's calls write into it, and a stale one hides newer fields."""
        return KVBatchMeta(
            partition_id=work.partition_id, keys=list(work.keys), tags=work.tags, extra_info=dict(extra_info)
        )

    def _call(self, method: Any, work: KVBatchMeta, extra_info: dict) -> Any:
        output = method(self._meta(work, extra_info))
        return output.get() if hasattr(output, "get") and not isinstance(output, TensorDict | dict) else output

    def _student_pass(self, work: KVBatchMeta, metrics: dict) -> None:
        if self._old_log_probs.own_pass:
            self._compute_old_log_prob(self._meta(work, work.extra_info), metrics)
            correction = self.config.algorithm.get("rollout_correction", None) or {}
            if correction.get("rollout_is") or correction.get("rollout_rs"):
                metrics.update(correct_rollouts(work, correction))
        elif self.distill.student_pass:
            self._call(
                self.actor_rollout_wg.compute_log_prob,
                work,
                {"temperature": work.extra_info["temperature"], "calculate_entropy": False, "distillation_only": True},
            )

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self.distill.enabled and not self._old_log_probs.own_pass:
            return batch
        return super()._compute_old_log_prob(batch, metrics)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Before any log-probability exists; verl's own where it needs more than rewards."""
        by_verl = not self.distill.enabled and self._old_log_probs.own_pass
        if by_verl:
            batch = super()._compute_advantage(batch, metrics)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=ADVANTAGE_FIELDS)
        broken = [str(verdict.get("status") or "ok") != "ok" for verdict in read_verdicts(data["extra_fields"])]
        if by_verl and (not any(broken) or self.config.algorithm.use_kl_in_reward):
            return batch
        rollouts = self.config.actor_rollout_ref.rollout.n
        fields = outcome_advantages(data, batch.keys, broken, self.config.algorithm, rollouts)
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        return batch

    def _teacher_advantage(self, work: KVBatchMeta, metrics: dict) -> dict[str, np.ndarray]:
        """Replaces the advantages of the rows in work by (1 - lambda) A + lambda w_q (log pi_T - log pi_S).

        Returns:
            the teacher's gap on the distilled rows, as :func:`verl_ext.row_metrics.row_metrics` takes it.
        """
        data = tq.kv_batch_get(
            keys=work.keys,
            partition_id=work.partition_id,
            select_fields=["teacher_log_ratio", "response_mask", "advantages", WEIGHT, ROW_ID],
        )
        mask, share = data["response_mask"], self.distill.coefficient
        batch = data.to_padded_tensor()
        ratio = batch["teacher_log_ratio"]
        teacher = self_teacher_token_advantage(
            ratio, torch.zeros_like(ratio), batch["response_mask"], batch[WEIGHT], clip=self.distill.advantage_clip
        )
        blended = share * teacher + (1 - share) * batch["advantages"] if share < 1 else teacher
        metrics["distill/advantage_absolute"] = float((blended.abs() * batch["response_mask"]).sum()) / max(
            1.0, float(batch["response_mask"].sum())
        )
        fields = {"advantages": response_to_nested(blended, mask)}
        tq.kv_batch_put(
            keys=work.keys, partition_id=work.partition_id, fields=TensorDict(fields, batch_size=len(work.keys))
        )
        taught = (batch[WEIGHT] != 0) & (batch[ROW_ID] >= 0)
        gaps = (ratio * batch["response_mask"]).sum(1) / batch["response_mask"].sum(1).clamp(min=1)
        return {"id": batch[ROW_ID][taught].numpy(), "gap": gaps[taught].double().numpy()}

    def _update_settings(self, settings: dict) -> dict:
        actor = self.config.actor_rollout_ref.actor
        entropy = actor.calculate_entropy or actor.entropy_coeff != 0.0
        blend = self.distill.policy_gradient or actor.use_kl_loss or entropy
        return {
            **settings,
            "rollout_threshold": self._old_log_probs.rollout_threshold,
            # Asking for the entropy keeps flash-attention's cross entropy from overwriting logits we still read.
            "calculate_entropy": entropy or (blend and torch.cuda.is_available()),
            "distillation_use_topk": self.distill.divergence_loss and self.distill.student_inputs == "logits",
            "distillation_only": self.distill.divergence_loss and not blend,
            "global_batch_size": actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n,
        }

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        # Only reached without distillation: verl's own update, and the statistics of its groups for the same plots.
        real = real_rows(batch)
        rows = read_rows(real, self.tokenizer)
        plan = self._plan(rows, metrics)
        self._log_completions(rows, plan)
        metrics["rows/train_share"] = float(np.mean([bool((row != 0).any()) for row in read_advantages(real)]))
        meta = super()._update_actor(batch, metrics)
        metrics.update(
            self._non_finite.look(
                self.global_steps,
                [metrics["actor/grad_norm"]],
                lambda index: skipped_rows(rows, plan, list(range(len(real.keys))), set()),
            )
        )
        return meta

    def on_step_end(self) -> None:
        super().on_step_end()
        if self.distill.fingerprints:
            self._pending_sync_metrics = {
                f"fingerprint/{name}_{rank}": value
                for rank, parts in enumerate(self.actor_rollout_wg.digests())
                for name, value in parts.items()
            }

    def _skip(self, metrics: dict) -> None:
        """No row of the batch has a signal: no optimiser step, the teacher stays, the schedule goes on."""
        self.actor_rollout_wg.skip_update()
        metrics["distill/steps_skipped"] = 1

    def _update_teacher(self, metrics: dict) -> None:
        """Step 9; teachers that stand still are measured against the student."""
        settings = self.distill.teacher
        if not self.teacher_has_own_weights or settings.kind == "external":
            return
        parts = self.actor_rollout_wg.update_teacher(settings.rate_after(self.global_steps))
        if settings.moves:
            metrics["teacher/moved"] = parts[0]["moved"]
        metrics["teacher/distance"] = math.sqrt(sum(part["squared_distance"] for part in parts))

    # ------------------------------------------------------------------------------------------------- self-checks

    def _check_teacher_equals_student(self, layout: Work, settings: dict) -> None:
        """Before the first update both have the same weights, unless the teacher is another model."""
        if self.distill.teacher.kind == "external":
            return
        few = layout.part(8, rows_per_rank_multiple(self.config))
        self._call(self.actor_rollout_wg.compute_discrepancy, few, settings)
        self._self_check = check_equality(few, self.distill.teacher.self_check_tolerance)

    # -------------------------------------------------------------------------------------------------- validation

    def on_validate_begin(self) -> None:
        super().on_validate_begin()
        # How long the last one took is the best estimate of this one, which comes back as a whole.
        self.sink.working(f"validating on {len(self.val_dataset)} questions", self._validation_seconds)
        self._validation_started = time.perf_counter()

    def on_validate_end(self) -> None:
        super().on_validate_end()
        self._validation_seconds = time.perf_counter() - self._validation_started
        self.sink.validated(self._validation_seconds)

    def _val_metrics_update(
        self,
        data_sources: list,
        sample_uids: list,
        reward_extra_infos_dict: dict[str, list],
        sample_turns: list,
        expected_acc_counts: dict | None = None,
    ) -> dict[str, float]:
        statuses, reasons = (reward_extra_infos_dict.get(key) or [] for key in ("status", "error"))
        verdicts = [{"status": status, "error": reason} for status, reason in zip_longest(statuses, reasons)]
        counts = self._verifier.look("validation", verdicts, lambda i: f"data source {data_sources[i]}")
        questions = group_answers(data_sources, sample_uids, reward_extra_infos_dict, expected_acc_counts)
        if expected_acc_counts:
            # verl fills it in the order in which the loader gave the questions out.
            items = item_counts(questions, list(expected_acc_counts), self.val_dataloader.names)
            self.sink.validation_items(self.global_steps, items)
        return metrics_of(questions, self._answer_keys) | {"val/verifier_timeouts": counts["verifier/timeouts"]}

    # ------------------------------------------------------------------------------------------------- checkpoints

    @property
    def _teacher_is_saved(self) -> bool:
        return self.teacher_has_own_weights and self.distill.teacher.moves

    def _save_checkpoint(self) -> None:
        checkpoints = Path(self.config.trainer.default_local_dir).absolute()
        with self.saving(), partial_folder(checkpoints) as folder, saving_into(self, str(folder)) as callback:
            saved = self._checkpoint
            if self._teacher_is_saved:
                self.actor_rollout_wg.save_teacher(str(saved / "teacher"))
            self.questions.save(saved)
            trainer_state.save(saved, self._state())
            super()._save_checkpoint()
            ranks = self.actor_rollout_wg.seal_checkpoint(str(saved))
            manifest = complete(checkpoints, folder, self.global_steps, ranks)
        # Now that it has its name and its marker; verl would call it before.
        callback.on_save(
            trainer=self, global_step=self.global_steps, checkpoint_dir=str(self._checkpoint), async_save=False
        )
        self.sink.saved(self.global_steps, manifest.bytes)

    @property
    def _checkpoint(self) -> Path:
        return step_folder(Path(self.config.trainer.default_local_dir).absolute(), self.global_steps)

    def _state(self) -> dict[str, Any]:
        """Of this object, what a resumed run needs; the stage follows from the steps and is only compared."""
        return {
            "steps": self.global_steps,
            "stage": self._stage,
            "non_finite_in_a_row": self._non_finite.in_a_row,
            "gap_measured": self._gap_alarm.measured,
            "pair_check": self._pairs.check.state_dict() if self._pairs else None,
        }

    @property
    def _stage(self) -> int:
        """Of the last step done, from 1."""
        first = distill_config(self.config.distill)
        return 1 + (stage_after(first, self.global_steps - 1, self.config.run.steps) != first)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._resumed = self.global_steps > 0
        self.questions.resume(self.global_steps)
        self._forgetting.resume(self.global_steps)
        if not self._resumed:
            return
        if self._teacher_is_saved:
            self.actor_rollout_wg.load_teacher(str(self._checkpoint / "teacher"))
        self.questions.load(self._checkpoint, self.global_steps)
        state = trainer_state.load(self._checkpoint)
        if (state["steps"], state["stage"]) != (self.global_steps, self._stage):
            raise ValueError(
                f"{self._checkpoint / STATE_FILE} was written after step {state['steps']} in stage "
                f"{state['stage']}, expected step {self.global_steps} in stage {self._stage}"
            )
        self._non_finite.in_a_row = state["non_finite_in_a_row"]
        self._gap_alarm.measured = state["gap_measured"]
        if self._pairs:
            self._pairs.check.load_state_dict(state["pair_check"])

    # ----------------------------------------------------------------------------------------------------- samples

    def _rows_to_record(self, rows: RolloutRows) -> list[int]:
        settings = self.distill.samples
        if settings.per_step == 0 or (self.global_steps - 1) % settings.every:
            return []
        return sampled_rows(len(rows.meta.keys), settings.per_step)

    def _log_completions(
        self, rows: RolloutRows, plan: BatchPlan, divergences: Mapping[int, Sequence[float]] | None = None
    ) -> None:
        chosen = self._rows_to_record(rows)
        if chosen:
            self.sink.completions(
                sampled_completions(rows, plan, self.global_steps, chosen, divergences or {}, self.tokenizer)
            )
