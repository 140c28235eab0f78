"""Tiny random models of the other families go through the same stack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipe.compose import ROOT

pytestmark = pytest.mark.e2e

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def random_model(family: str, folder: Path) -> Path:
    """A model with the tiny world's tokenizer and random weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Olmo3Config, Olmo3ForCausalLM

    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    else:
        model = Olmo3ForCausalLM(Olmo3Config(**SHAPE, sliding_window=64, tie_word_embeddings=False))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "models" / "tiny_world" / "plain").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("olmo3", ["method=sc_sdpo"]), ("llama", ["method=sdpo_grpo", "teacher=live"])],
    ids=["olmo3 with sc_sdpo", "llama with a blend and a live teacher"],
)
def test_other_families_train(family, overrides, runs, recorded, records, tmp_path):
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
