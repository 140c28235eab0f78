"""The method on the real stack: verl's trainer, Ray, TransferQueue, FSDP2 over gloo, vLLM's CPU build."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM

from recipe.checkpoints import the_complete
from recipe.export import export
from verl_ext.digest import digest

pytestmark = pytest.mark.e2e

ROUNDING = 2e-5  # fp32 sums in another order


def fingerprints(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{key: value for key, value in record.items() if key.startswith("fingerprint/")} for record in records]


def first_step(records: list[dict[str, Any]]) -> tuple[float, float]:
    return records[0]["distill/loss"], records[0]["actor/grad_norm"]


def test_a_run_leaves_what_its_user_expects(recorded, records):
    summary, output = recorded
    assert set(summary) == {
        "method",
        "steps",
        "metric",
        "before",
        "after",
        "seconds_to_first_step",
        "seconds_per_step",
        "report",
    }
    assert summary["method"] == "sdpo" and summary["steps"] == 4 and 0 < summary["before"] < 1
    assert Path(summary["report"]).stat().st_size > 10_000
    assert yaml.safe_load((output / "config.yaml").read_text())["distill"]["method"] == "sdpo"
    completions = [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]
    assert any("Correctly solve the original question." in (row["teacher_context"] or "") for row in completions)
    told = [row for row in completions if "divergence" in row]
    assert told and all(len(row["divergence"]) == len(row["tokens"]) for row in told)
    assert all("".join(row["tokens"]).startswith(row["response"]) and sum(row["divergence"]) > 0 for row in told)
    assert list(output.glob("tensorboard/*tfevents*"))
    changed = {one["key"]: one for one in json.loads((output / "changes.json").read_text())["changes"]}
    assert changed["run.steps"]["run"] == 4 and changed["run.steps"]["set"]
    for record in records(output):
        assert 0 < record["distill/loss"] < 0.7 and record["actor/grad_norm"] > 0
        assert 0 < record["rows/train_share"] <= 1 and sum(record["pass_rate/histogram"]) == 6
        assert record["student/nll"] > 0
        # verl's warm-up starts at a learning rate of 0: after the first step the two are still equal.
        assert record["teacher/moved"] == 1 and (record["teacher/distance"] > 0) == (record["step"] > 1)


def test_right_answers_by_question_give_the_validation_s_mean(recorded, data):
    output = recorded[1]
    (counts,) = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    before = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    asked = [row["extra_info"]["question_id"] for row in pq.read_table(data / "test.parquet").to_pylist()]
    assert counts["step"] == before["step"] == 0 and counts["samples"] == 2
    assert counts["items"] == sorted(asked) and set(counts["sources"]) == {"tiny_world"}
    assert counts["judged"] == [2] * 12
    assert sum(counts["right"]) / 24 == pytest.approx(before["val/mean@2"], abs=1e-12)


def test_teacher_and_student_agree_before_the_first_step(recorded, records):
    assert records(recorded[1])[0]["self_check/divergence"] < 1e-6


def test_kernel_exponents_of_zero_are_sdpo_bit_for_bit(runs, recorded, records):
    _, output = runs("zero", "method=sc_sdpo", "distill.weighting.alpha=0", "distill.weighting.beta=0", steps=3)
    mine, reference = records(output), records(recorded[1])[:3]
    assert [r["distill/loss"] for r in mine] == [r["distill/loss"] for r in reference]
    assert [r["weight/mean"] for r in mine] == [1.0] * 3
    assert fingerprints(mine) == fingerprints(reference)


def test_four_steps_equal_two_and_a_resume_teacher_included(runs, recorded, records):
    output = runs.folder / "resumed"
    shutil.copytree(recorded[1], output)
    damaged = output / "checkpoints" / "global_step_4" / "actor" / "optim_world_size_1_rank_0.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    runs("resumed", "method=sdpo", "run.save_every=2", "run.val_samples=2", steps=4)
    log = (output / "run.log").read_text()
    assert f"global_step_4: actor/{damaged.name} has changed" in log and "resuming after step 2 of 4" in log
    mine, reference = records(output), records(recorded[1])
    for step in (2, 4):
        assert the_complete(output / "checkpoints", step).world_size == 1, "the damaged one was saved again"
    assert [r["step"] for r in mine] == [1, 2, 3, 4]
    assert fingerprints(mine) == fingerprints(reference)
    assert len({r["fingerprint/teacher_0"] for r in mine[1:]}) == 3, "the teacher moves every step"


def test_a_checkpoint_is_exported_as_the_weights_the_trainer_had(runs, recorded, records):
    for step in (2, 4):
        for of in ("student", "teacher"):
            folder = runs.folder / f"exported_{of}_{step}"
            export(recorded[1], folder, step=step, teacher=of == "teacher")
            model = AutoModelForCausalLM.from_pretrained(folder)
            record = next(record for record in records(recorded[1]) if record["step"] == step)
            assert digest(dict(model.named_parameters())) == record[f"fingerprint/{of}_0"]


def test_two_packed_ranks_in_micro_batches_of_one_row_give_the_same_loss_and_gradient(runs, recorded, records):
    _, output = runs(
        "two_ranks",
        "method=sdpo",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.model.use_remove_padding=true",
        "actor_rollout_ref.actor.use_dynamic_bsz=false",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "distill.compaction.enable=false",
        steps=1,
    )
    assert first_step(records(output)) == pytest.approx(first_step(records(recorded[1])), rel=ROUNDING)


def test_grpo_has_no_teacher_and_no_distillation(runs, recorded, records):
    _, output = runs("grpo", "method=grpo", steps=2)
    for record in records(output):
        assert "distill/loss" not in record and "fingerprint/teacher_0" not in record
        assert record["actor/ppo_kl"] == 0 and record["actor/grad_norm"] > 0
        assert 0 <= record["rows/train_share"] <= 1


def test_the_token_advantage_form_runs_through_the_policy_loss_with_a_synced_teacher(runs, recorded, records):
    _, output = runs("token", "method=sdpo_token", "teacher=synced", "distill.teacher.sync_every=2", steps=2)
    record, second = records(output)
    assert record["distill/advantage_absolute"] > 0 and record["actor/grad_norm"] > 0 and "distill/loss" not in record
    # Before the first update, on the same rollouts: the gap that the recorded run read in its update.
    reference = records(recorded[1])[0]
    assert record["teacher/gap"] == pytest.approx(reference["teacher/gap"], rel=1e-4, abs=1e-6)
    assert (record["teacher/moved"], second["teacher/moved"]) == (0.0, 1.0)
    assert second["teacher/distance"] == 0, "measured after the copy"
