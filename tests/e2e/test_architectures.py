"""Tiny random models of the other families go through the same stack."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("olmo3", ["method=sc_sdpo"]),
        ("llama", ["method=sdpo_grpo", "teacher=live", "distill.divergence.inputs=hidden_states"]),
    ],
    ids=["olmo3 with sc_sdpo", "llama with a blend from hidden states and a live teacher"],
)
def test_other_families_train(family, overrides, runs, recorded, records, tmp_path, random_model):
    # Replayed rollouts: a random model is right by chance only, and a step without a success trains nothing.
    model = random_model(family, tmp_path / family)
    _, output = runs(
        family,
        *overrides,
        f"actor_rollout_ref.model.path={model}",
        "distill.teacher.on_negative_gap=ignore",
        steps=1,
    )
    record = records(output)[0]
    assert record["self_check/divergence"] < 1e-6
    assert record["distill/loss"] > 0 and record["actor/grad_norm"] > 0
    assert ("actor/pg_loss" in record) == ("method=sdpo_grpo" in overrides)
    assert ("fingerprint/teacher_0" in record) == ("teacher=live" not in overrides)
    assert json.loads((output / "summary.json").read_text())["steps"] == 1
