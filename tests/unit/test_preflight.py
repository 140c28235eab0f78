"""Bad data, models and kernels are refused before anything starts, each by one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest

from recipe import preflight
from recipe.compose import compose_config
from recipe.preflight import check_attention, check_lengths, check_model, check_parquet
from verl_ext.config import ConfigError


def row(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "1+1"}],
        "data_source": "d",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0, "question_id": "a"},
    } | changes


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.parquet"
    pandas.DataFrame(list(rows)).to_parquet(path)
    return path


def test_a_good_file_passes(tmp_path):
    check_parquet(write(tmp_path, row(), row()), "data.train_files")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{k: v for k, v in row().items() if k != "reward_model"}], "no column 'reward_model'"),
        ([row(), row(prompt=[{"role": "assistant", "content": "x"}])], "row 1: the last message is of 'assistant'"),
        ([row(prompt=[{"role": "user", "content": " "}])], "row 0: prompt is"),
        ([row(reward_model={"style": "rule", "ground_truth": None})], "row 0: reward_model.ground_truth"),
        ([row(extra_info={"index": 0, "question_id": ""})], "row 0: extra_info.question_id"),
        ([row(extra_info={"index": None, "question_id": "a"})], "row 0: extra_info.index"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, expected):
    path = write(tmp_path, *rows)
    with pytest.raises(ConfigError, match=expected) as caught:
        check_parquet(path, "data.val_files")
    assert str(path) in str(caught.value) and "data.val_files" in str(caught.value)


def test_a_missing_a_torn_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        check_parquet(tmp_path / "none.parquet", "data.train_files")
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="not a readable parquet file"):
        check_parquet(torn, "data.train_files")
    empty = tmp_path / "empty.parquet"
    pandas.DataFrame([row()]).iloc[:0].to_parquet(empty)
    with pytest.raises(ConfigError, match="has no rows"):
        check_parquet(empty, "data.train_files")


def test_a_gpu_preset_refuses_without_flash_attention(monkeypatch):
    config = compose_config(["hardware=gpu", "model=qwen3_8b"])
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="flash-attn is not installed") as caught:
        check_attention(config)
    assert "FLASH_ATTN_WHEEL" in str(caught.value)
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    check_attention(config)


def test_a_folder_without_a_model_is_named(tmp_path):
    config = compose_config([f"actor_rollout_ref.model.path={tmp_path}"])
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        check_model(config)
    composed = compose_config(["model=qwen3_8b", "hardware=gpu"])
    assert check_model(composed) == 40960, "of a preset's model"
    composed.actor_rollout_ref.model.path = "some/model"
    assert check_model(composed) is None, "another hub name is left to the hub"


@pytest.mark.parametrize("override", ["data.train_batch_size=0", "actor_rollout_ref.rollout.n=0", "trainer.nnodes=-1"])
def test_counts_below_one_are_refused_by_name(override):
    with pytest.raises(ConfigError, match=rf"{override.split('=')[0]} is .* allowed: a whole number from 1"):
        compose_config([override])


def test_sequences_that_cannot_fit_the_model_are_refused_with_the_sum():
    config = compose_config(["distill.context.max_length=500"])
    positions = check_model(config)
    assert positions == 512
    with pytest.raises(ConfigError, match=r"distill\.context\.max_length \+ data\.max_response_length = 548"):
        check_lengths(config, positions)
    with pytest.raises(ConfigError, match=r"= 112; allowed: up to the model's 100 positions"):
        check_lengths(compose_config([]), 100)
    check_lengths(compose_config(["distill.context.max_length=500", "method=grpo"]), positions)
