"""PBSD on the real stack: both sides drawn by the same servers, the live self-check, ranks, texts drawn beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

STEPS = 2
PBSD = ["method=pbsd", "actor_rollout_ref.rollout.n=8", "data.train_batch_size=6", "distill.samples.every=1"]


def own_rollouts(runs: Any) -> str:
    """Not those that the other files record and replay."""
    return f"skip.rollout_tq.dump_dir={runs.folder}/pbsd_rollouts"


@pytest.fixture(scope="module")
def live(runs: Any) -> Path:
    """The present weights with the context are the teacher; what it draws is replayed below."""
    return runs("pbsd", *PBSD, own_rollouts(runs), "distill.samples.per_step=8", steps=STEPS)[1]


def test_both_sides_are_drawn_from_what_scores_them(live: Path, records: Any) -> None:
    steps = records(live)
    assert len(steps) == STEPS
    for record in steps:
        assert record["preference/pairs"] == 6 * 4
        assert 0 < record["preference/pairs_trained"] <= 24 and record["preference/pairs_lost"] == 0
        # The servers' log-probabilities against those of the passes, a token: rounding.
        assert record["preference/sampler_gap_positive"] < 1e-4
        assert record["preference/sampler_gap_negative"] < 1e-4
        assert record["preference/margin"] < 0 and record["distill/loss"] > 0.693
        assert record["preference/margin_expected"] == pytest.approx(-0.1 * record["preference/jeffreys"])
        assert record["preference/pass_rate_positive"] > record["preference/pass_rate_negative"]
        assert record["actor/grad_norm"] > 0 and "loss" not in record
    assert steps[0]["fingerprint/student_0"] != steps[1]["fingerprint/student_0"]
    rows = [json.loads(line) for line in (live / "completions.jsonl").read_text().splitlines()]
    assert {row["sampled_by"] for row in rows} == {"teacher", "student"}
    assert all((row["sampled_by"] == "teacher") == (row["rollout"] % 2 == 0) for row in rows)


def test_two_ranks_take_the_same_step(live: Path, runs: Any, records: Any) -> None:
    ranks = ["trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.agent.num_workers=1"]
    one, two = records(live), records(runs("pbsd_ranks", *PBSD, own_rollouts(runs), *ranks, steps=STEPS)[1])
    for key in ("distill/loss", "preference/margin", "preference/jeffreys", "actor/grad_norm"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-4), key


def test_a_frozen_teacher_s_texts_are_replayed_beside_fresh_student_samples(runs: Any, records: Any) -> None:
    given = ["sequences=pairs_replayed", "distill.sequences.reference_key=solution", "teacher=frozen"]
    output = runs("pbsd_replayed", *PBSD, *given, steps=1, replay=False)[1]
    (record,) = records(output)
    assert record["preference/pass_rate_positive"] == 1 and record["preference/pairs_trained"] > 0
    assert "preference/sampler_gap_positive" not in record and record["preference/sampler_gap_negative"] < 1e-4


def test_the_frozen_teacher_of_an_adapter_is_sampled_and_scored_without_it(runs: Any, records: Any) -> None:
    lora = ["adapter=lora", "teacher=frozen", "actor_rollout_ref.model.lora_rank=8"]
    fast = ["actor_rollout_ref.actor.optim.lr=1e-2", "actor_rollout_ref.actor.optim.lr_warmup_steps=0"]
    steps = records(runs("pbsd_lora", *PBSD, *lora, *fast, steps=2, replay=False)[1])
    for record in steps:
        assert record["preference/sampler_gap_positive"] < 1e-4
        assert record["preference/sampler_gap_negative"] < 1e-4
    assert steps[0]["fingerprint/base_0"] == steps[1]["fingerprint/base_0"]
    assert steps[0]["fingerprint/adapter_0"] != steps[1]["fingerprint/adapter_0"]
