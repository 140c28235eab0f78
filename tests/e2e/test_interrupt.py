"""Ctrl-C ends the run, its Ray processes and vLLM, and leaves the last checkpoint whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from recipe.compose import ROOT, compose_config
from recipe.output_folder import check_output_folder

pytestmark = pytest.mark.e2e


def wait_for(condition, seconds: float, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.2)


def test_ctrl_c_ends_everything_and_keeps_the_checkpoint(data, tmp_path: Path):
    output = tmp_path / "run"
    overrides = [
        f"run.output_dir={output}", "run.steps=500", "run.save_every=1", "run.val_before=false", "run.val_every=-1",
        "data.train_batch_size=4", f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet",
    ]  # fmt: skip
    # An address of a cluster that other tests share would be joined; this run must start and end its own.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "recipe.train", *overrides],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        # Tests that a script runs in the background ignore the signal, and so would the run.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        interrupted(process, output, overrides)
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            for left in (process, *family):
                with suppress(psutil.NoSuchProcess):
                    left.kill()


def interrupted(process: subprocess.Popen, output: Path, overrides: list[str]) -> None:
    tracker = output / "checkpoints" / "latest_checkpointed_iteration.txt"
    wait_for(tracker.exists, 240, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"left behind: {[p.name() for p in alive]}"
    step = check_output_folder(compose_config(overrides), output)
    assert step >= 1
