"""Every shell script of the repository: executable, valid bash, and nothing that shellcheck has to say."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from recipe.compose import ROOT

FOLDERS = (".ci", "scripts", "docs", "recipe", "verl_ext", "data_prep", "benchmarks", "tests", "conf", "models")


def is_shell(path: Path) -> bool:
    """By its name, or by its first line where the name says nothing."""
    if path.suffix in (".sh", ".sbatch"):
        return True
    if path.suffix:
        return False
    with path.open("rb") as file:
        first = file.readline(80)
    return first.startswith(b"#!") and b"sh" in first.rpartition(b"/")[2]


SCRIPTS = sorted(
    path
    for top in (ROOT, *(ROOT / folder for folder in FOLDERS))
    for path in (top.iterdir() if top == ROOT else top.rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts and is_shell(path)
)


def test_the_scripts_are_found() -> None:
    found = {str(path.relative_to(ROOT)) for path in SCRIPTS}
    assert {".ci/run", "scripts/setup.sh", "scripts/slurm/train.sbatch", "scripts/slurm/node.sh"} <= found
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*") if path.is_file()} <= found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_executable_valid_bash(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("not run: needs shellcheck")
    result = subprocess.run(
        ["shellcheck", "--shell=bash", "--format=gcc", *SCRIPTS], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
