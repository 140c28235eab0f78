"""Fine-tuning on the real stack: verl's SFT trainer as Ray actors, interrupted and resumed, on one rank and on two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.compose import ROOT
from recipe.sft import MANIFEST, compose, run
from verl_ext.config import ConfigError
from verl_ext.sft_rows import write_sft_rows

pytestmark = pytest.mark.e2e

MODEL = ROOT / "models" / "tiny_world" / "plain"
STEPS, ROWS, BATCH = 6, 32, 13
"""Two epochs, of 13, 13 and 6 rows."""


@pytest.fixture(scope="module")
def rows(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of the tiny world with their solutions."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    table = pandas.read_parquet(data / "train.parquet")
    made = []
    for prompt, extra in zip(table["prompt"][:ROWS], table["extra_info"][:ROWS], strict=True):
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(extra["solution"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        mask = [0] * len(asked) + [1] * len(answer)
        made.append(
            {"input_ids": asked + answer, "loss_mask": mask, "kind": "solution", "question_id": extra["question_id"]}
        )
    path = tmp_path_factory.mktemp("sft") / "sft.parquet"
    assert write_sft_rows(path, made) == ROWS
    return path


def tune(rows: Path, out: Path, *overrides: str) -> dict[str, Any]:
    asked = [f"sft.files=[{rows}]", f"sft.out={out}", "sft.lr=1e-3", f"sft.steps={STEPS}", f"sft.batch_size={BATCH}"]
    return run(compose([*asked, "sft.save_every=3", "run.quiet=true", *overrides]))


def steps(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(cluster: None, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    free = ray.available_resources()
    summary = tune(rows, out)
    now = ray.available_resources()
    assert {name: now[name] for name in ("CPU", "GPU")} == {name: free[name] for name in ("CPU", "GPU")}
    return summary, out


def test_the_loss_falls_and_the_model_folder_is_whole(whole: tuple[dict[str, Any], Path]) -> None:
    summary, out = whole
    records = steps(out)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["epoch"] for record in records] == [1, 1, 1, 2, 2, 2]
    assert [record["rows"] for record in records] == 2 * [13, 13, 6]
    # Both epochs read the same rows: their token-weighted losses can be compared.
    losses = [sum(r["loss"] * r["tokens"] for r in part) / summary["tokens"] * 2 for part in (records[:3], records[3:])]
    assert losses[0] > losses[1] > 0
    assert records[0]["lr"] == 1e-3 > records[-1]["lr"] > 0, "no warm-up in so few steps, then the cosine"
    assert summary["steps"] == STEPS and summary["loss_last"] == records[-1]["loss"] and not summary["skipped"]

    assert not (out / "model.partial").exists()
    model = AutoModelForCausalLM.from_pretrained(summary["model"])
    start = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.dtype == start.dtype == torch.float32, "what was trained in fp32 is not rounded by whoever loads it"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (summary["model"], MODEL)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(changed)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    whole: tuple[dict[str, Any], Path], rows: Path, tmp_path: Path
) -> None:
    """The folder as a run leaves it that was killed while it wrote the checkpoint of step 6."""
    summary, out = whole
    killed = tmp_path / "killed"
    shutil.copytree(out, killed)
    shutil.rmtree(killed / "model")
    manifest = json.loads((killed / MANIFEST).read_text())
    (killed / MANIFEST).write_text(json.dumps({**manifest, "finished": False}))
    (killed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    (killed / "checkpoints" / "global_step_6" / "model_world_size_1_rank_0.pt").write_bytes(b"torn")

    resumed = tune(rows, killed)
    assert resumed["resumed_after"] == 3 and resumed["steps"] == STEPS
    for mine, theirs in zip(steps(killed), steps(out), strict=True):
        assert {**mine, "time/step": 0} == {**theirs, "time/step": 0}
    weights = [load_file(Path(folder["model"]) / "model.safetensors") for folder in (summary, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_run_is_skipped_and_other_settings_are_refused(
    whole: tuple[dict[str, Any], Path], rows: Path
) -> None:
    summary, out = whole
    before = (out / "metrics.jsonl").read_bytes()
    assert tune(rows, out, "sft.max_tokens_per_gpu=40000") == {**summary, "skipped": True}
    with pytest.raises(ConfigError, match="holds a run with sft.lr=0.001, this one has 0.0005"):
        tune(rows, out, "sft.lr=5e-4")
    with pytest.raises(ConfigError, match="run.seed=0, this one has 1"):
        tune(rows, out, "run.seed=1")
    assert (out / "metrics.jsonl").read_bytes() == before


def test_two_ranks_with_small_micro_batches_take_the_same_steps(
    whole: tuple[dict[str, Any], Path], rows: Path, tmp_path: Path
) -> None:
    """Batches of 13 rows are filled up with one that trains nothing."""
    asked = ["trainer.n_gpus_per_node=2", "sft.save_every=-1", "sft.max_length=64", "sft.max_tokens_per_gpu=64"]
    tune(rows, tmp_path, *asked)
    for mine, theirs in zip(steps(tmp_path), steps(whole[1]), strict=True):
        assert all(mine[key] == theirs[key] for key in ("rows", "tokens", "lr"))
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert not (tmp_path / "checkpoints").exists()
