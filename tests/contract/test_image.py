"""What the images run by default, run here: on this environment in place of the image's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipe import doctor
from recipe.compose import ROOT

pytestmark = pytest.mark.contract

COMMANDS = [json.loads(line) for line in re.findall(r"^CMD (.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)]


def smoke(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    # The caller's path to a checkout has to be without effect.
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder), **variables}
    return subprocess.run(
        [ROOT / "scripts/image_smoke.sh", *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_cpu_images_command_passes_here(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/__init__.py").write_text("raise SystemExit('the wrong recipe')\n", encoding="utf-8")
    script, *overrides = COMMANDS[0]
    assert script == "scripts/image_smoke.sh" and "hardware=cpu" in overrides
    result = smoke(*overrides, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert re.match(r"torch \S+ · verl 0\.9\.1 · vllm \S+ · ray \S+$", lines[0])
    assert lines[-1] == "[image] the stack loads" and any(line.startswith("memory ") for line in lines)


def test_the_gpu_images_command_passes_the_offline_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    script, *overrides = COMMANDS[1]
    assert script == "scripts/image_smoke.sh" and "hardware=gpu" in overrides
    assert doctor.main(["--offline", *overrides]) == 0
    assert "not looked at with --offline" in capsys.readouterr().out


def test_help_needs_nothing_installed(tmp_path: Path) -> None:
    result = smoke("--help", folder=tmp_path, PATH="/usr/bin:/bin")
    assert result.returncode == 0 and "Usage: scripts/image_smoke.sh" in result.stdout
