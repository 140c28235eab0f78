"""What a run changed against its presets: the user's words, and what follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.compose import compose_config
from recipe.preset_changes import ABSENT, chooses_preset, key_of, leaves, preset_changes
from recipe.report_changes import changes_view
from recipe.run_files import RunFileError, RunFiles
from recipe.train import write_changes
from verl_ext.config import ConfigError

WORDS = ["method=sdpo", "model=tiny", "run.steps=7", "data.train_batch_size=8", "+trainer.note=x"]


@pytest.fixture(scope="module")
def found() -> dict:
    return preset_changes(compose_config(WORDS))


def test_a_run_is_compared_with_the_presets_it_chose(found: dict) -> None:
    assert found["presets"] == ["method=sdpo", "model=tiny"]
    changes = {one["key"]: (one["preset"], one["run"], one["set"]) for one in found["changes"]}
    assert changes["run.steps"] == (40, 7, True)
    assert changes["trainer.note"] == (ABSENT, "x", True)
    assert changes["data.train_batch_size"][1:] == (8, True)
    # verl's own keys refer to ours: they follow, and nobody set them.
    assert changes["trainer.total_training_steps"] == (40, 7, False)
    assert "run.overrides" not in changes and not any(key.startswith("distill.") for key in changes)


def test_the_page_tells_what_was_set_from_what_follows(found: dict, tmp_path: Path) -> None:
    files = RunFiles(tmp_path, tensorboard=False)
    shown = changes_view(files.write_changes(found))
    assert shown.presets == found["presets"] and ("run.steps", "40", "7") in shown.own
    assert ("trainer.total_training_steps", "40", "7") in shown.following and not shown.error
    odd = {"key": "a", "preset": None, "run": True, "set": True}
    assert changes_view(files.write_changes({"presets": [], "changes": [odd]})).own == [("a", "null", "true")]
    assert changes_view(files.write_changes({"error": "gone"})).error == "gone"
    assert "written when a run ends" in changes_view(tmp_path / "nowhere.json").error
    with pytest.raises(RunFileError, match='changes.json: expected "presets" and "changes"'):
        changes_view(files.write_changes({"changes": 3}))


def test_words_are_told_apart() -> None:
    assert chooses_preset("data=tiny_world") and chooses_preset("data@_global_=x") and chooses_preset("method=sdpo")
    assert not chooses_preset("data.train_batch_size=8") and not chooses_preset("run.steps=2")
    assert key_of("~trainer.logger") == "trainer.logger" and key_of("+a.b=c=d") == "a.b"


def test_values_without_a_value_are_told_as_they_are_written() -> None:
    config = OmegaConf.create({"a": {"b": "???", "c": "${a.b}", "d": "${a.e}", "e": [1, 2]}, "f": {}})
    assert leaves(config) == {"a.b": "???", "a.c": "${a.b}", "a.d": [1, 2], "a.e": [1, 2], "f": {}}


def test_a_preset_that_is_gone_is_named(tmp_path: Path) -> None:
    config = OmegaConf.create({"run": {"overrides": ["method=gone"]}})
    with pytest.raises(ConfigError, match="method=gone does not exist"):
        preset_changes(config)
    # A run that has ended is not lost for it.
    with RunFiles(tmp_path, tensorboard=False) as files:
        write_changes(files, config)
    assert "method=gone does not exist" in changes_view(tmp_path / "changes.json").error
