"""The pass that scores both sides of PBSD's pairs: log-probabilities of student and teacher, and their divergence.

It runs on the student after the teacher pass, so that one forward gives, along the same tokens, what the margin and its
self-check need: KL(teacher || student) along the teacher's samples, KL(student || teacher) along the student's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tensordict import TensorDict

from verl_ext.config import DistillConfig
from verl_ext.pairs import NEGATIVE, POSITIVE
from verl_ext.passes import ROW_ID, ForwardPass, Source, responses
from verl_ext.student_values import student_values

SIDE = "pair_side"
"""Field: int64 [B], POSITIVE, NEGATIVE, or NEITHER."""
COEFFICIENT = "pair_coefficient"
"""Field: float32 [B], the factor of a row's log-probability in the loss."""
SCORES = ("student", "teacher", "divergence", "sampler_gap")
"""What is found of a row; see :class:`verl_ext.pairs.PairScores`."""
PREFIX = "pair_score_"
"""... as fields: float64 [B]."""


class PairPass(ForwardPass):
    """Leaves in ``found`` the scores of every row that has a side, by row id."""

    def __init__(self, config: DistillConfig) -> None:
        self._config = config
        self.reads_hidden_states = config.student_inputs == "hidden_states"
        self.found: dict[int, dict[str, float]] = {}

    def collect(self, source: Source, data: TensorDict) -> None:
        where = responses(data, len(source))
        for side, kind in ((POSITIVE, "forward_kl"), (NEGATIVE, "reverse_kl")):
            config = self._config
            if not config.one_token:
                config = replace(config, divergence=replace(config.divergence, kind=kind, clip=None))
            values = student_values(source, data, (data[SIDE] == side) & (data[ROW_ID] >= 0), config)
            student, teacher, divergence = (
                where.completed(values[name][where.positions])
                for name in ("student_log_probs", "teacher_log_probs", "divergence")
            )
            own = teacher if side == POSITIVE else student
            # Of a text drawn beforehand nobody noted the sampler's log-probabilities.
            noted = side == NEGATIVE or config.sequences.positive == "teacher"
            sampler = data["rollout_log_probs"].unbind() if noted and "rollout_log_probs" in data else None
            for i, (row_id, row_side) in enumerate(zip(data[ROW_ID].tolist(), data[SIDE].tolist(), strict=True)):
                if row_side != side or row_id < 0:
                    continue
                gap = torch.tensor(torch.nan)
                if sampler is not None:
                    gap = (own[i] - sampler[i].to(own[i].device)).abs().double().mean()
                self.found[row_id] = {
                    "student": float(student[i].double().sum()),
                    "teacher": float(teacher[i].double().sum()),
                    "divergence": torch.nan if config.one_token else float(divergence[i].double().sum()),
                    "sampler_gap": float(gap),
                }

    def columns(self, row_ids: list[int]) -> dict[str, torch.Tensor]:
        """The fields of rows in that order: float64 [B], NaN for rows that were not scored."""
        return {
            PREFIX + name: torch.tensor(
                [self.found.get(row_id, {}).get(name, torch.nan) for row_id in row_ids], dtype=torch.float64
            )
            for name in SCORES
        }
