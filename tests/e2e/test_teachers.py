"""Teacher kinds, supports and multipliers on the real stack, and steps that are not finite."""

from __future__ import annotations

import json
import math

import pytest

from verl_ext.non_finite import NonFiniteSteps

pytestmark = pytest.mark.e2e


def test_the_full_vocabulary_on_two_packed_ranks_with_a_trust_region_teacher(runs, recorded, records):
    _, output = runs(
        "full",
        "method=sdpo",
        "divergence=jsd_full",
        "teacher=trust_region",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.model.use_remove_padding=true",
        steps=2,
    )
    first, second = records(output)
    reference = records(recorded[1])[0]
    assert first["self_check/divergence"] < 1e-6
    # The first step changes no weights, so all teachers that began as the student are equal there. The student's top
    # 100 of 128 tokens leave hardly anything out, and never give more than the whole vocabulary.
    assert first["distill/loss"] == pytest.approx(reference["distill/loss"], rel=1e-3)
    assert first["distill/loss"] >= reference["distill/loss"] * (1 - 1e-5)
    assert "teacher/topk_mass" not in first and first["teacher/entropy"] > 0
    assert "teacher/moved" not in second and second["teacher/distance"] > 0
    assert first["fingerprint/teacher_0"] == second["fingerprint/teacher_0"]


def test_an_external_teacher_of_another_width_with_several_updates_a_step(
    runs, recorded, records, tmp_path, random_model
):
    _, output = runs(
        "external",
        "method=sdpo_faithful",
        "divergence=mixed_teacher_topk",
        "teacher=external",
        f"distill.teacher.path={random_model('qwen3', tmp_path / 'teacher')}",
        "distill.divergence.ratio_clip=2.0",
        "distill.teacher.on_negative_gap=ignore",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        steps=1,
    )
    record = records(output)[0]
    assert "self_check/divergence" not in record
    assert record["distill/loss"] > 0.1, "a random teacher is far away"
    assert record["actor/grad_norm"] > 0 and 0 < record["teacher/topk_mass"] < 1
    assert record["teacher/entropy"] > math.log(32)


def test_steps_that_are_not_finite_are_skipped_written_out_and_end_the_run(runs, recorded, tmp_path):
    output = runs.folder / "diverged"
    with pytest.raises(NonFiniteSteps, match=r"in 2 optimiser steps in a row.*rows with a non-finite loss") as caught:
        runs(
            "diverged",
            "method=sdpo",
            "actor_rollout_ref.actor.optim.lr=1e30",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
            "distill.non_finite_limit=1",
            steps=4,
        )
    rows = [json.loads(line) for line in (output / "non_finite.jsonl").read_text().splitlines()]
    first, last = sorted({row["step"] for row in rows})
    assert last == first + 1 and f"up to step {last}" in str(caught.value)
    assert all(row["question_id"] and row["response_ids"] for row in rows) and any(row["suspect"] for row in rows)
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    skipped = {step["step"]: step["update/skipped_non_finite"] for step in steps if step["step"] > 0}
    assert skipped == {step: float(step == first) for step in range(1, last)}
