"""verl's Tracking and real clients behind ``trainer.logger``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from verl.utils.tracking import Tracking

from verl_ext.config import ConfigError
from verl_ext.logger_names import ALWAYS_ON, PACKAGES
from verl_ext.loggers import running_loggers


def config(*loggers: str) -> DictConfig:
    trainer = {"logger": list(loggers), "project_name": "distill", "experiment_name": "sdpo"}
    return OmegaConf.create({"trainer": trainer, "run": {"steps": 3}, "env": {"HF_TOKEN": "hunter2"}})


def test_the_names_are_those_that_verl_knows() -> None:
    assert {*ALWAYS_ON, *PACKAGES} == set(Tracking.supported_backend)


def test_verls_file_logger_gets_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    with running_loggers(config("console", "file", "tensorboard"), pytest.fail) as loggers:
        for step in (1, 2):
            loggers.log(step, {"step": step, "loss": 0.5 / step, "digest": "ab", "pass_rate/histogram": [1, 2]})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"step": 1, "data": {"loss": 0.5}}, {"step": 2, "data": {"loss": 0.25}}]
    assert not (tmp_path / "tensorboard_log").exists()


def test_wandb_offline_gets_the_metrics_and_the_configuration_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with running_loggers(config("wandb"), pytest.fail) as loggers:
        loggers.log(1, {"step": 1, "reward/mean": 0.25})
        assert wandb.run.project == "distill" and wandb.run.name == "sdpo"
        assert wandb.run.config["run"] == {"steps": 3} and "hunter2" not in str(dict(wandb.run.config))
    assert wandb.run is None, "ended"
    wandb.teardown()  # as at the end of the process: its service writes what it still holds
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"reward/mean" in kept.read_bytes() and b"hunter2" not in kept.read_bytes()


def test_a_logger_that_cannot_start_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "no folder" / "records.jsonl"))
    with (
        pytest.raises(ConfigError, match=r"trainer\.logger: file cannot start \(FileNotFoundError"),
        running_loggers(config("file"), pytest.fail),
    ):
        pytest.fail("started")
