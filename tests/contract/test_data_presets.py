"""Every data preset names a verifier that exists and takes its options, and data that one of our commands makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.compose import ROOT, choices, compose_config
from recipe.preflight import _how_to_make, preflight
from verl_ext.config import ConfigError
from verl_ext.question_data import file_list
from verl_ext.verifier_config import check_function, verifier_config

pytestmark = pytest.mark.contract

EVALUATION = ("aime24", "aime25", "hmmt", "math500", "mmlu")


@pytest.mark.parametrize("name", choices("data"))
def test_the_verifier_exists_and_takes_its_options(name: str) -> None:
    config = compose_config([f"data={name}"])
    settings = verifier_config(config.verifier)
    assert settings.function is not None
    check_function(settings)
    assert config.reward.custom_reward_function.reward_kwargs.verifier.function == settings.function


@pytest.mark.parametrize("name", choices("data"))
def test_the_files_have_the_folder_of_the_command_that_makes_them(name: str) -> None:
    data = compose_config([f"data={name}"]).data
    files = [Path(file) for key in ("train_files", "val_files") for file in file_list(data[key])]
    assert files and (bool(file_list(data.train_files)) != (name in EVALUATION))
    text = (ROOT / "conf" / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    for file in files:
        folder = file.relative_to(ROOT / "data").parts[0]
        assert (
            f"data_prep.{folder}" in text or f"data/{folder}" in text or "data_prep.$name" in text or (folder in text)
        ), f"the preset does not say how to make {file}"
        base = folder.split("_paced")[0].split("_opsd")[0]
        assert importlib.util.find_spec(f"data_prep.{base}") or base.startswith("tiny_world_"), base


def test_a_missing_file_is_refused_with_the_command_that_makes_it() -> None:
    hint = _how_to_make(ROOT / "data" / "sciknoweval" / "physics" / "train.parquet")
    assert hint.startswith("python -m data_prep.sciknoweval --out data/sciknoweval ")
    assert "--flavour tool_call" in _how_to_make(ROOT / "data" / "tiny_world_tools" / "train.parquet")
    assert "python -m data_prep" in _how_to_make(Path("elsewhere/train.parquet"))


def test_an_evaluation_set_cannot_be_trained_on() -> None:
    model = f"actor_rollout_ref.model.path={ROOT / 'models' / 'tiny_world' / 'plain'}"
    lengths = ["data.max_prompt_length=64", "data.max_response_length=48", "distill.context.max_length=256"]
    with pytest.raises(ConfigError, match="data.train_files names no file"):
        preflight(compose_config(["data=aime24", model, *lengths]))


def test_options_of_a_verifier_are_overridden_and_checked_like_other_keys() -> None:
    config = compose_config(["data=tooluse", "verifier.options.match=merged"])
    assert OmegaConf.to_container(config.verifier.options) == {"match": "merged"}
    with pytest.raises(ConfigError, match="no_option"):
        compose_config(["data=tooluse", "verifier.options.no_option=1"])
    with pytest.raises(ConfigError, match="options.no_option is not an option of .*match"):
        check_function(verifier_config(compose_config(["data=tooluse", "+verifier.options.no_option=1"]).verifier))
