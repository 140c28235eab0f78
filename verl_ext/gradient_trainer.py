"""Per-question gradients of the distillation loss, on the real workers: a trainer whose weights stay as they are.

Every question is a mini-batch of its own, so the update's loop makes one gradient per question, which is projected
(:mod:`verl_ext.gradient_sketch`) and not used. Teacher, context, divergence and sequences are those of the method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta

from verl_ext.batch_plan import BatchPlan
from verl_ext.gradient_files import finished, write_gradients
from verl_ext.question_stream import QuestionStream
from verl_ext.rollout_rows import RolloutRows
from verl_ext.step_sink import StepSink
from verl_ext.trainer import DistillTrainer
from verl_ext.worker import MINI_BATCH


class GradientTrainer(DistillTrainer):
    """Writes ``gradients_NNNN.npz`` with ``question_ids``, ``rates`` [P] and ``gradients`` float32 [P, D] every step.

    Args:
        folder: of the files; questions that are in one of them are not asked again.
        wanted: ids of the questions.
        dimensions: of the projection.
    """

    def __init__(
        self, config: DictConfig, sink: StepSink, *, seed: int, folder: Path, wanted: list[str], dimensions: int
    ) -> None:
        super().__init__(config, sink, seed=seed)
        self._out, self._dimensions = folder, dimensions
        self._wanted = list(wanted)
        self._done = set(finished(folder))

    def on_train_begin(self) -> None:
        super().on_train_begin()
        self.actor_rollout_wg.measure_gradients(self._dimensions, self.seed)

    def on_step_begin(self) -> None:
        before = self.questions.stream
        super().on_step_begin()
        if self.global_steps == 1 or self.questions.stream is not before:
            self.questions.stream = QuestionStream(self._left(), shuffle=False)

    def _left(self) -> list[int]:
        """Places of the wanted questions that have no gradient yet and that the method would train on."""
        kept = set(self.questions.stream.kept) if self.questions.stream is not None else None
        places = {name: i for i, name in enumerate(self.questions.ids)}
        left = [places[name] for name in self._wanted if name not in self._done and name in places]
        return [i for i in left if kept is None or i in kept]

    def _read_update(
        self, rows: RolloutRows, plan: BatchPlan, work: KVBatchMeta, output: dict[str, Any], metrics: dict
    ) -> None:
        data = tq.kv_batch_get(keys=work.keys, partition_id=work.partition_id, select_fields=[MINI_BATCH])
        numbers = data[MINI_BATCH].unique().tolist()
        vectors = self.actor_rollout_wg.take_gradients()[0]
        if len(vectors) != len(numbers):
            raise RuntimeError(f"{len(vectors)} gradients came back for {len(numbers)} questions")
        super()._read_update(rows, plan, work, output, metrics)
        found = {}
        for number, vector in zip(numbers, vectors, strict=True):
            name, rate = self._question(rows, plan, number)
            if name is not None and name not in self._done and bool(vector.isfinite().all()):
                found[name] = (rate, vector.numpy().astype(np.float32))
        write_gradients(self._out, found)
        self._done.update(found)
        metrics["gradients/questions"] = float(len(self._done))

    def _question(self, rows: RolloutRows, plan: BatchPlan, number: int) -> tuple[str | None, float]:
        """The question of a mini-batch; None where a group lost rollouts, so that the mini-batch mixes questions."""
        size = self.config.actor_rollout_ref.rollout.n
        part = range(number * size, min((number + 1) * size, len(rows.question_ids)))
        names = {rows.question_ids[i] for i in part}
        if len(names) != 1:
            self.sink.warning(f"a group lost rollouts: no gradient of {', '.join(sorted(names))}")
            return None, 0.0
        return names.pop(), float(plan.rates_P[plan.question_index_N[part[0]]])
