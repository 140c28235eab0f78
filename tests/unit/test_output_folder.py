"""Is an output folder free, resumable, or another run's? One message for each case, naming what to change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from recipe.output_folder import check_output_folder
from verl_ext.config import ConfigError


def config(**changes: object) -> DictConfig:
    made = OmegaConf.create(
        {
            "distill": {"method": "sdpo", "coefficient": 1.0, "teacher": {"kind": "ema"}},
            "actor_rollout_ref": {"model": {"path": "m"}, "rollout": {"n": 8}},
            "data": {"train_files": "a.parquet", "train_batch_size": 16},
            "run": {"seed": 0, "steps": 40, "start_over": False},
            "trainer": {"n_gpus_per_node": 1, "nnodes": 1},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value)
    return made


@pytest.fixture
def folder(tmp_path: Path, make_checkpoint: Callable[..., Any]) -> Callable[..., Path]:
    """A run's folder with a checkpoint at step 20."""

    def make(made: DictConfig | None = None, ranks: int = 1, with_teacher: bool = True) -> Path:
        output = tmp_path / "run"
        make_checkpoint(output / "checkpoints", 20, ranks, with_teacher)
        (output / "config.yaml").write_text(OmegaConf.to_yaml(made or config()))
        (output / "metrics.jsonl").write_text("{}\n")
        return output

    return make


def refusal(made: DictConfig, output: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_output_folder(made, output)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_new_folder_is_made_and_starts_at_zero(tmp_path: Path) -> None:
    assert check_output_folder(config(), tmp_path / "a" / "b") == 0
    assert list((tmp_path / "a" / "b").iterdir()) == [], "the write test leaves nothing behind"


def test_a_whole_checkpoint_of_the_same_run_is_resumed(folder: Callable[..., Path]) -> None:
    assert check_output_folder(config(), folder()) == 20


def test_a_run_without_a_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert "without a checkpoint" in refusal(config(), tmp_path)
    # Begun anew where that is asked for, and only by the same run.
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config()))
    assert check_output_folder(config(run__start_over=True), tmp_path) == 0
    assert "run.seed=0" in refusal(config(run__start_over=True, run__seed=1), tmp_path)


def test_a_run_stopped_before_its_first_step_starts_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert check_output_folder(config(), tmp_path) == 0


def test_a_run_whose_stages_depend_on_its_length_keeps_it(folder: Callable[..., Path]) -> None:
    made = config(distill__schedule={"switch": 0.5})
    assert "run.steps=40" in refusal(config(distill__schedule={"switch": 0.5}, run__steps=80), folder(made))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("distill__method", "grpo"),
        ("distill__teacher__kind", "frozen"),
        ("actor_rollout_ref__model__path", "other"),
        ("data__train_files", "b.parquet"),
        ("data__train_batch_size", 32),
        ("actor_rollout_ref__rollout__n", 4),
        ("run__seed", 1),
    ],
)
def test_another_run_is_refused_with_the_key_and_both_values(
    folder: Callable[..., Path], key: str, value: object
) -> None:
    message = refusal(config(**{key: value}), folder())
    before = OmegaConf.select(config(), key.replace("__", "."))
    assert f"{key.replace('__', '.')}={before!r}" in message and repr(value) in message


def test_another_world_size_is_refused_with_both_sizes_named(folder: Callable[..., Path]) -> None:
    message = refusal(config(trainer__n_gpus_per_node=2, trainer__nnodes=2), folder())
    assert "written by 1 ranks" in message and "this run has 4" in message


@pytest.mark.parametrize("text", ["", "7", "21", "none"])
def test_a_tracker_that_is_empty_or_wrong_decides_nothing(folder: Callable[..., Path], text: str) -> None:
    output = folder()
    (output / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(text)
    assert check_output_folder(config(), output) == 20


def test_a_tracker_whose_checkpoint_is_gone_is_no_new_run(folder: Callable[..., Path]) -> None:
    output = folder()
    shutil.rmtree(output / "checkpoints" / "global_step_20")
    assert "without a checkpoint" in refusal(config(), output)


def test_checkpoints_without_our_config_are_not_a_run_of_ours(folder: Callable[..., Path]) -> None:
    output = folder()
    (output / "config.yaml").unlink()
    assert "no config.yaml" in refusal(config(), output)


def test_the_only_checkpoint_is_refused_by_the_file_that_is_damaged(folder: Callable[..., Path]) -> None:
    output = folder()
    (output / "checkpoints" / "global_step_20" / "data.pt").unlink()
    message = refusal(config(), output)
    assert "global_step_20: data.pt is missing" in message and "another folder to start over" in message


def test_a_checkpoint_saved_without_what_the_run_needs_is_refused_by_its_name(folder: Callable[..., Path]) -> None:
    message = refusal(config(), folder(with_teacher=False))
    assert "does not hold teacher/teacher_world_size_1_rank_0.safetensors" in message


def test_another_way_to_resume_is_refused(folder: Callable[..., Path]) -> None:
    assert "trainer.resume_mode is 'disable'" in refusal(config(trainer__resume_mode="disable"), folder())


def test_a_method_without_an_average_needs_no_teacher_files(folder: Callable[..., Path]) -> None:
    made = config(distill__teacher__kind="frozen")
    assert check_output_folder(made, folder(made, with_teacher=False)) == 20


def test_a_finished_run_is_refused_and_more_steps_go_on(folder: Callable[..., Path]) -> None:
    output = folder()
    # Ended after the last checkpoint: what is left to do is the result.
    assert check_output_folder(config(run__steps=20), output) == 20
    (output / "summary.json").write_text("{}")
    assert "is finished" in refusal(config(run__steps=20), output)
    assert "is finished" in refusal(config(run__steps=19), output)
    assert check_output_folder(config(run__steps=21), output) == 20


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refusal(config(), tmp_path / "file" / "run")


def test_a_write_that_fails_is_reported_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "Permission denied" in refusal(config(), tmp_path)


def test_too_little_disk_space_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=0, free=100_000_000))
    message = refusal(config(), tmp_path)
    assert "0.1 GB free" in message and "at least 0.5 GB" in message
