"""The tiny world: the warm start is deterministic, and the shipped checkpoint is fit for use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.tiny import contexts, sampling, task, warm_start

CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "tiny_world" / "plain"


def test_warm_start_is_deterministic(tmp_path):
    digests = []
    for name in ("one", "two"):
        torch.manual_seed(len(digests))
        settings = warm_start.WarmStart(steps=5, batch_size=16, batches_per_bucket=3)
        model, tokenizer = warm_start.train(settings, progress=False)
        warm_start.save(model, tokenizer, tmp_path / name, settings, {})
        files = sorted((tmp_path / name).iterdir())
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert digests[0] == digests[1] and "model.safetensors" in digests[0]


@pytest.fixture(scope="module")
def shipped():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two spinning threads are many times slower on a busy machine
    yield AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    torch.set_num_threads(threads)


def test_checkpoint_is_what_verl_and_vllm_expect(shipped):
    model, tokenizer = shipped
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == 459_840
    assert model.dtype == torch.float32 and model.config.vocab_size == 128 >= len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    manifest = json.loads((CHECKPOINT / "manifest.json").read_text())
    assert warm_start.WarmStart(**manifest["settings"]) == warm_start.WarmStart()


def test_checkpoint_accuracies(shipped):
    """Other random numbers and other questions than the manifest's: agreement within 3 points plus sampling noise."""
    values = sampling.measure(*shipped, questions=210, samples=1, seed=1)
    for name, (low, high) in sampling.ACCEPTED.items():
        assert low <= values[name] <= high, (name, values)
    assert values["format"] >= 0.99
    for name in ("trailing_newlines", "blank_lines", "reworded", "and_feedback"):
        assert values[f"right_demonstration_{name}"] >= 0.95, (name, values)
    assert abs(values["base_trailing_newline"] - values["base"]) <= 0.08
    assert values["feedback"] >= values["without_feedback"] + 0.05, values
    recorded = json.loads((CHECKPOINT / "manifest.json").read_text())["accuracies"]
    assert abs(recorded["base"] - values["base"]) <= 0.08


def test_sampler_does_not_depend_on_the_batch(shipped):
    model, tokenizer = shipped
    pool = task.make_pool(task.PoolSpec(24, (1, 3, 6), True, 5))
    turns = [contexts.question(problem) for problem in pool]
    together = sampling.sample(model, tokenizer, turns, temperature=0.0)
    apart = sampling.sample(model, tokenizer, turns, temperature=0.0, batch_size=5)
    assert together == apart
    first = tokenizer.apply_chat_template(
        [{"role": "user", "content": turns[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    generated = model.generate(first, max_new_tokens=48, do_sample=False)
    assert tokenizer.decode(generated[0, first.shape[1] :], skip_special_tokens=True) == together[0]
