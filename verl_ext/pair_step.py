"""A training step's part for preference pairs: which pairs train, their scores, and the coefficients of the update.

Called by the trainer; the pure part is :mod:`verl_ext.pairs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_ext.batch_plan import BatchPlan
from verl_ext.config import DistillConfig
from verl_ext.pair_check import PairCheck
from verl_ext.pair_pass import COEFFICIENT, PREFIX, SCORES, SIDE
from verl_ext.pairs import NEITHER, PairPlan, PairScores, is_teacher_sample, plan_pairs, weigh_pairs
from verl_ext.passes import ROW_ID
from verl_ext.rollout_rows import RolloutRows


def mark_teacher_samples(rows: RolloutRows) -> None:
    """Notes which rows the student did not sample, before pass rates are taken."""
    rows.batch = replace(rows.batch, foreign=[is_teacher_sample(int(i)) for i in rows.batch.rollout_index])


class PairStep:
    """Made once a run; ``warn`` takes what a person should read."""

    def __init__(self, distill: DistillConfig, config: DictConfig, warn: Callable[[str], None]) -> None:
        self._settings, self._config, self._warn = distill.preference, config, warn
        self._threshold = distill.context.success_threshold
        self.check = PairCheck(distill, config, warn)

    def beta(self, step: int) -> float:
        """The factor of the margin at a trainer step, from 1."""
        return self._settings.beta_at(step, self._config.run.steps)

    def plan(self, rows: RolloutRows, plan: BatchPlan, step: int) -> PairPlan:
        """The pairs of the step; warns where none trains, which is then a step without an update."""
        pairs = plan_pairs(
            rows.batch,
            taught_N=plan.distill_N.tolist(),
            weights_N=plan.weights_N.tolist(),
            settings=self._settings,
            beta=self.beta(step),
            success_threshold=self._threshold,
            response_limit=self._config.actor_rollout_ref.rollout.response_length,
        )
        if not pairs.positive_P:
            self._warn(f"step {step} makes no update: no pair trains; left out: {pairs.left_out()}")
        return pairs

    def score(
        self,
        rows: RolloutRows,
        plan: BatchPlan,
        pairs: PairPlan,
        work: KVBatchMeta,
        run_pass: Callable[[], Any],
        step: int,
    ) -> dict[str, float]:
        """Has the rows in work scored and writes the coefficients that the update reads; returns metrics.

        Args:
            run_pass: calls the workers' ``score_pairs`` on ``work``.
        """
        ids = tq.kv_batch_get(keys=work.keys, partition_id=work.partition_id, select_fields=[ROW_ID])[ROW_ID].tolist()
        _put(work, SIDE, torch.tensor([pairs.sides_N[i] if i >= 0 else NEITHER for i in ids]))
        run_pass()
        fields = [PREFIX + name for name in SCORES]
        data = tq.kv_batch_get(keys=work.keys, partition_id=work.partition_id, select_fields=fields)
        scores = torch.full((len(SCORES), len(pairs.sides_N)), math.nan, dtype=torch.float64)
        real = [position for position, i in enumerate(ids) if i >= 0]
        for number, name in enumerate(fields):
            scores[number, [ids[position] for position in real]] = data[name][real].double()
        coefficients, differences, metrics = weigh_pairs(
            pairs,
            PairScores(*scores),
            plan.weights_N,
            rows.batch.response_lengths,
            beta=self.beta(step),
            log_prob=self._settings.log_prob,
        )
        _put(work, COEFFICIENT, torch.tensor([float(coefficients[i]) if i >= 0 else 0.0 for i in ids]))
        return metrics | self.check.look(differences, whole=pairs.whole)


def _put(work: KVBatchMeta, name: str, column: torch.Tensor) -> None:
    fields = TensorDict({name: column}, batch_size=len(work.keys))
    tq.kv_batch_put(keys=work.keys, partition_id=work.partition_id, fields=fields)
