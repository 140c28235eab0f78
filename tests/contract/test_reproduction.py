"""The reproduction table: every row is whole, and every command of it, run by bash as it stands there, composes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from recipe.compose import ROOT, choices, compose_config

pytestmark = pytest.mark.contract

PAGE = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
SETTINGS = re.search(r"```bash\n(.*?)```", PAGE, re.S).group(1)
HEAD = ["setting", "command", "hardware and time", "published", "trust", "measured here"]
ROWS = [
    cells
    for line in PAGE.splitlines()
    if line.startswith("| ") and (cells := [cell.strip() for cell in line[1:-1].split("|")]) != HEAD
]
COMMANDS = list(dict.fromkeys(row[1].strip("`") for row in ROWS if row[1] != "the same"))
SETS = re.findall(r"`(sciknoweval_\w+|tooluse)`", PAGE.split("Each row stands for five runs")[1].split("Metric")[0])


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each command hands to Python, with an executable in its place that writes its arguments down.

    `D` goes round the data sets, so that each is used.
    """
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "python"
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@"\nprintf "\\n"\n', encoding="utf-8")
    program.chmod(0o755)
    lines = [f"D={SETS[number % len(SETS)]}\n{command}" for number, command in enumerate(COMMANDS)]
    done = subprocess.run(
        ["bash", "-euc", SETTINGS + "\n".join(lines)],
        env={"PATH": f"{folder}:/usr/bin:/bin"}, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    calls = [call.split("\0")[:-1] for call in done.stdout.splitlines()]
    return dict(zip(COMMANDS, calls, strict=True))


@pytest.fixture(scope="module")
def configs(arguments: dict[str, list[str]]) -> dict[str, DictConfig]:
    return {command: compose_config(call[2:]) for command, call in arguments.items()}


@pytest.fixture(scope="module")
def resolved(configs: dict[str, DictConfig]) -> dict[str, dict[str, Any]]:
    """The same as plain values; an interpolation that leads nowhere is an error."""
    return {command: OmegaConf.to_container(config, resolve=True) for command, config in configs.items()}


def test_every_row_is_whole_and_says_how_far_its_number_is_to_be_trusted() -> None:
    assert len(ROWS) > 35 and PAGE.count("| " + " | ".join(HEAD) + " |") == 4
    for row in ROWS:
        assert len(row) == len(HEAD), row
        assert row[4] in ("paper", "code", "third party", "not known"), row
        # A number needs a source, and a source a number.
        assert (row[3] == "not known") == (row[4] == "not known") == (re.search(r"\d", row[3]) is None), row
        assert row[2], row
        assert row[1] == "the same" or re.fullmatch(r"`[^`]+`", row[1]), row


def test_a_time_that_nobody_published_is_called_an_estimate() -> None:
    for row in ROWS:
        for part in row[2].split(";"):
            has_time = re.search(r"\d+ (h|s|min)\b", part)
            assert not has_time or "(code)" in part or "(third party)" in part or "estimate" in part, row


def test_every_command_is_training_on_gpus_with_settings_that_compose(
    arguments: dict[str, list[str]], resolved: dict[str, dict[str, Any]]
) -> None:
    assert len(COMMANDS) > 30 and len(SETS) == len(set(SETS)) == 5
    for command, call in arguments.items():
        assert call[:2] == ["-m", "recipe.train"], command
        assert resolved[command]["trainer"]["device"] == "cuda", command
        assert resolved[command]["actor_rollout_ref"]["model"]["path"].count("/") == 1, command


def test_no_two_commands_are_the_same_run(resolved: dict[str, dict[str, Any]]) -> None:
    parts = ("distill", "chain", "data", "actor_rollout_ref", "algorithm")
    runs = [str([config[part] for part in parts]) for config in resolved.values()]
    assert len(set(runs)) == len(COMMANDS)


def test_the_table_uses_every_run_script_model_and_published_method(arguments: dict[str, list[str]]) -> None:
    scripts = {path.name for path in (ROOT / "scripts").glob("run_*.sh")}
    assert scripts == {Path(name).name for name in re.findall(r"scripts/run_\w+\.sh", " ".join(COMMANDS))}
    used = {argument for call in arguments.values() for argument in call}
    # No paper's models: the tiny world's, and the one of scripts/gpu_smoke.sh.
    without = {"tiny", "tiny_revision", "qwen3_0_6b"}
    assert {name for name in choices("model") if f"model={name}" not in used} == without
    # Variants and our own methods have no published row.
    without = {"dr_grpo", "kernel_grpo", "paced_two_stage_reversed", "sd_zero_code"}
    without |= {"sdpo_faithful", "sdpo_grpo", "sdpo_token"}
    assert {name for name in choices("method") if f"method={name}" not in used} == without


def test_the_evaluations_are_those_that_the_page_states(configs: dict[str, DictConfig]) -> None:
    for command, config in configs.items():
        sampling = config.actor_rollout_ref.rollout.val_kwargs
        if "$SDPO" in command:
            assert (sampling.n, sampling.temperature, sampling.top_p) == (16, 0.6, 0.95), command
            assert (config.run.steps, config.run.val_every) == (150, 5)
        elif "$PACED" in command or "$ZERO" in command:
            assert sampling.n == 8
        elif "opsd" in command:
            assert sampling.n == (16 if "opsd_v1" in command else 12)
