"""Loggers beside the run's own files: what reaches them, what does not, and what happens when one is lost."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from recipe.run_files import RunFiles
from recipe.train import _Sink
from verl_ext.config import ConfigError
from verl_ext.logger_names import extra_loggers
from verl_ext.loggers import LONGEST_PAUSE, LOST, Logger, Loggers
from verl_ext.redaction import HIDDEN, redacted, redacted_text


class Flaky:
    """The edge: a client whose connection is down while ``down`` is set."""

    def __init__(self) -> None:
        self.down = False
        self.taken: list[tuple[int, dict[str, Any]]] = []
        self.tries: list[int] = []
        self.finished: int | None = None

    def log(self, data: dict[str, Any], step: int) -> None:
        self.tries.append(step)
        if self.down:
            raise ConnectionError("no route to https://ann:hunter2@tracker.example")
        self.taken.append((step, data))

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code
        if self.down:
            raise TimeoutError


def test_a_logger_that_is_lost_is_warned_about_once_counted_and_tried_again() -> None:
    client, warnings = Flaky(), []
    loggers = Loggers([Logger("wandb", client, warnings.append)])
    for step in range(1, 201):
        client.down = 11 <= step <= 150
        loggers.log(step, {"step": step, "loss": 0.5})
    # The distance doubles up to its limit; the next try is at step 201.
    assert client.tries[10:] == [11, 13, 17, 25, 41, 73, 137] and LONGEST_PAUSE == 64
    assert [step for step, _ in client.taken] == list(range(1, 11)), "nothing is tried between"
    loggers.log(201, {"loss": 0.5})
    loggers.log(202, {"loss": 0.5})
    assert [step for step, _ in client.taken[10:]] == [201, 202]
    assert loggers.counts() == {LOST: 190}
    (warning,) = warnings
    assert "logger wandb does not work any more (ConnectionError: no route to" in warning and "hunter2" not in warning
    loggers.finish(0)
    assert client.finished == 0 and "lacks 190 records" in warnings[1]


def test_one_that_cannot_even_be_ended_does_not_keep_the_others_from_it() -> None:
    broken, well, warnings = Flaky(), Flaky(), []
    broken.down = True
    Loggers([Logger("mlflow", broken, warnings.append), Logger("wandb", well, warnings.append)]).finish(1)
    assert broken.finished == well.finished == 1
    assert warnings == ["logger mlflow could not be ended properly: TimeoutError"]


def test_the_record_of_metrics_jsonl_reaches_the_loggers_as_numbers(tmp_path: Path) -> None:
    class Screen:
        def step_line(self, record: dict[str, Any]) -> None: ...

    client = Flaky()
    sink = _Sink(OmegaConf.create(), RunFiles(tmp_path, tensorboard=False), Screen(), 0.0, 0)
    sink.loggers = Loggers([Logger("wandb", client, pytest.fail)])
    values = {
        "critic/score/mean": 0.5,
        "timing_s/step": 2.0,
        "actor/grad_norm": float("nan"),
        "digest": "ab",
        "pass_rate/successes_0": 3,
    }
    sink.metrics(1, values)
    ((step, found),) = client.taken
    assert step == 1 and found == {"reward/mean": 0.5, "time/step": 2.0, LOST: 0}
    client.down, sink.loggers = True, Loggers([Logger("wandb", client, lambda text: None)])
    for step in (2, 3):
        sink.metrics(step, values)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record[LOST] for record in records] == [0, 0, 1]
    without = RunFiles(tmp_path / "plain", tensorboard=False)
    _Sink(OmegaConf.create(), without, Screen(), 0.0, 0).metrics(1, values)
    assert LOST not in without.read_metrics()[0]


# --------------------------------------------------------------------------------------------------------- at the start


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without accounts, in which the package trackio can be found."""
    module = types.ModuleType("trackio")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "VERL_RL_INSIGHT_ENABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("installed")
def test_what_every_run_has_is_no_further_logger() -> None:
    assert extra_loggers([]) == extra_loggers(None) == extra_loggers("console") == []
    assert extra_loggers(["console", "tensorboard", "file", "trackio", "file"]) == ["file", "trackio"]
    assert extra_loggers("file") == ["file"] and extra_loggers(OmegaConf.create(["file"])) == ["file"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", r"names 'wandbb'; allowed: wandb, trackio, .* \(and console, tensorboard"),
        ("tracking", "names 'tracking'; allowed"),
        ("swanlab", "names 'swanlab', whose package swanlab is not installed"),
        ("wandb", "there is no account: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"),
    ],
)
def test_a_logger_that_cannot_work_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        extra_loggers(["file", name])


@pytest.mark.usefixtures("installed")
def test_accounts_of_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789abcdef\n")
    (tmp_path / "netrc").chmod(0o600)
    assert extra_loggers("wandb") == ["wandb"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    with pytest.raises(ConfigError, match="there is no account"):
        extra_loggers("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert extra_loggers("wandb") == ["wandb"]


# ------------------------------------------------------------------------------------------------------------- secrets


def test_secrets_are_hidden_by_name_by_form_and_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER_API_KEY", "0123456789")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    config = {
        "trainer": {"wandb_proxy": "http://ann:hunter2@proxy:3128", "logger": ["wandb"]},
        "env": {"HF_TOKEN": "x", "WANDB_API_KEY": "y", "db.password": "z", "api_key": "", "AWS_SECRET_ACCESS_KEY": "w"},
        "headers": ["Bearer 0123456789", "hf_" + "a" * 30],
        "max_token": 7,
        "eos_token": "<end>",
        "max_token_len_per_gpu": "16384",
        "loss_agg_mode": "token-mean",
        "path": "abc/def",
    }
    found = redacted(config)
    assert found == {
        "trainer": {"wandb_proxy": f"http://{HIDDEN}@proxy:3128", "logger": ["wandb"]},
        "env": dict.fromkeys(config["env"], HIDDEN) | {"api_key": ""},
        "headers": [f"Bearer {HIDDEN}", HIDDEN],
        **{key: config[key] for key in ("max_token", "eos_token", "max_token_len_per_gpu", "loss_agg_mode", "path")},
    }
    assert config["env"]["HF_TOKEN"] == "x", "a copy"
    assert redacted_text("see http://a:b@c and http://c/d:e") == f"see http://{HIDDEN}@c and http://c/d:e"


def test_the_kept_configuration_has_no_secrets(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, tensorboard=False)
    files.write_config({"verifier": {"options": {"url": "https://ann:hunter2@sandbox/run"}}, "run": {"steps": 3}})
    text = files.config_path.read_text()
    assert "hunter2" not in text and "sandbox/run" in text and "steps: 3" in text
