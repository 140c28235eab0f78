"""SD-Zero's chain on the real stack: collect, fine-tune, distil, evaluate; stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from recipe import chain, localise, train
from recipe.compose import ROOT, compose_config
from verl_ext.config import ConfigError
from verl_ext.revision import PHRASES

pytestmark = pytest.mark.e2e

MODEL = ROOT / "models" / "tiny_world" / "revision"
SETTINGS = [
    *("method=sd_zero", "model=tiny_revision", "data=tiny_world_long", "hardware=cpu", "run.quiet=true"),
    *("run.steps=2", "run.val_samples=2", "run.val_every=-1", "data.train_batch_size=4", "sft.steps=3"),
    *(
        "actor_rollout_ref.rollout.n=4",
        "distill.samples.per_step=16",
        "distill.samples.every=1",
        "chain.evaluate=[distil]",
    ),
]


@pytest.fixture(scope="module")
def whole(data: Path, cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, Any]:
    folder = tmp_path_factory.mktemp("sd_zero")
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet"]
    config = compose_config([*SETTINGS, *files, f"run.output_dir={folder}"])
    return train.run(config), folder, config


def test_the_chain_ends_with_every_stage_and_counts_its_samples(whole: tuple[dict, Path, Any]) -> None:
    summary, folder, _ = whole
    assert list(summary["stages"]) == ["collect", "sft", "distil", "evaluate"]
    collected = summary["stages"]["collect"]
    assert summary["samples"] == collected["attempts"] + collected["revisions"] + 2 * 4 * 4
    assert collected["traces_right"] > 0 and collected["traces_wrong"] > 0
    (model,) = summary["stages"]["evaluate"].values()
    assert summary["after"] == model["val/mean@2"] and 0 < model["reviser/retention"] <= 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["distil"] and Path(summary["report"]).exists()
    (counts,) = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    shares = [right / judged for right, judged in zip(counts["right"], counts["judged"], strict=True)]
    assert counts["step"] == 0 and sum(shares) / len(shares) == pytest.approx(summary["after"], abs=1e-12)


def test_a_training_row_is_prompt_attempt_phrase_and_revision(whole: tuple[dict, Path, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = pq.read_table(whole[1] / "collect" / "sft.parquet").to_pylist()
    assert {row["kind"] for row in rows} == {"generation", "revision"}
    traces = {
        trace["question_id"]: trace for trace in pq.read_table(whole[1] / "collect" / "traces.parquet").to_pylist()
    }
    for row in rows:
        trace = traces[row["question_id"]]
        text = tokenizer.decode(row["input_ids"])
        middle = f"\n\n{PHRASES['qwen'].of(trace['right'])}\n\n"
        assert middle in text and text.endswith(tokenizer.eos_token)
        trained = tokenizer.decode([t for t, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m])
        assert (middle in trained) == (row["kind"] == "generation") and "Work left to right" not in trained


def test_the_teacher_read_the_student_s_own_attempt(whole: tuple[dict, Path, Any]) -> None:
    rows = localise.read_completions([whole[1] / "distil"])
    told = [row for row in rows if row["teacher_context"]]
    assert told and all(row["teacher_context"].startswith(row["response"]) for row in told)
    for row in told:
        assert PHRASES["qwen"].of(row["reward"] > 0.5) in row["teacher_context"]
    assert any("divergence" in row for row in told)


def test_a_stage_that_is_done_is_skipped_and_one_that_is_missing_is_run(whole: tuple[dict, Path, Any]) -> None:
    summary, folder, config = whole
    record = json.loads((folder / chain.RECORD).read_text())
    del record["evaluate"]
    (folder / chain.RECORD).write_text(json.dumps(record))
    again = train.run(config)
    assert again["stages"] == summary["stages"], "every sample was in its store"
    with pytest.raises(ConfigError, match="holds the stage sft with other settings: sft.lr"):
        train.run(chain._changed(config, sft__lr=1e-3))
