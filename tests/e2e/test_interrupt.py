"""Ends of a run that nobody planned: vLLM killed, preempted, Ctrl-C. Everything ends; the last checkpoint is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from recipe.attempts import ATTEMPTS, read_attempts
from recipe.compose import ROOT, compose_config
from recipe.output_folder import check_output_folder
from verl_ext.compat import alive_nodes
from verl_ext.preemption import REQUEUE_EXIT
from verl_ext.ray_nodes import NodeWatch

pytestmark = pytest.mark.e2e

TRAIN = [sys.executable, "-m", "recipe.train"]
SUPERVISED = [sys.executable, "-m", "recipe.supervise", "--restarts", "1", "--", *TRAIN]


def wait_for(condition: Callable[[], object], seconds: float, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.2)


def family_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def ended(process: subprocess.Popen, number: int) -> int:
    """Sends the signal; returns the exit code when everything below the process has ended."""
    family = family_of(process)
    assert family
    process.send_signal(number)
    code = process.wait(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"left behind: {[p.name() for p in alive]}"
    return code


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen]]:
    """Starts a command; what is left of it after the test is killed. Its messages go to messages.txt."""
    # An address of a cluster that other tests share would be joined; this run must start and end its own.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    begun: list[subprocess.Popen] = []

    def start(command: list[str]) -> subprocess.Popen:
        with open(tmp_path / "messages.txt", "ab") as messages:
            begun.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=messages,
                    stderr=messages,
                    start_new_session=True,
                    # Tests that a script runs in the background ignore the signal, and so would the run.
                    preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
                )
            )
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            for left in (psutil.Process(process.pid), *family_of(process)):
                with suppress(psutil.NoSuchProcess):
                    left.kill()


def test_a_killed_engine_a_preemption_and_ctrl_c(
    begin: Callable[[list[str]], subprocess.Popen], data: Path, tmp_path: Path
) -> None:
    output, messages = tmp_path / "run", tmp_path / "messages.txt"
    overrides = [
        f"run.output_dir={output}", "run.steps=500", "run.save_every=2", "run.val_before=false", "run.val_every=-1",
        "data.train_batch_size=4", f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet",
    ]  # fmt: skip

    def steps() -> list[int]:
        path = output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    # vLLM's engine dies, in whatever phase of a step: the run fails at once, and the supervisor starts it again.
    process = begin([*SUPERVISED, *overrides])
    tracker = output / "checkpoints" / "latest_checkpointed_iteration.txt"
    wait_for(tracker.exists, 600, process)
    (engine,) = [child for child in family_of(process) if "EngineCore" in child.name() + " ".join(child.cmdline())]
    before = int(tracker.read_text())
    engine.kill()
    wait_for((output / ATTEMPTS).exists, 300, process)
    (killed,) = read_attempts(output / ATTEMPTS)
    assert killed.outcome == "failed" and killed.saved >= before and killed.progress
    kept = int(tracker.read_text())
    wait_for(lambda: max(steps(), default=0) > kept, 600, process)

    # Preempted in a step: that step is saved, and no step is lost or done twice.
    assert ended(process, signal.SIGUSR1) == REQUEUE_EXIT
    assert [attempt.outcome for attempt in read_attempts(output / ATTEMPTS)] == [killed.outcome, "preempted"]
    assert steps() == list(range(1, int(tracker.read_text()) + 1))
    assert f"checkpoint of step {steps()[-1]}" in messages.read_text()

    # Ctrl-C while the run starts again.
    process = begin([*TRAIN, *overrides])
    wait_for(lambda: f"resuming after step {steps()[-1]}" in messages.read_text(), 120, process)
    wait_for(lambda: any("raylet" in child.name() for child in family_of(process)), 120, process)
    assert ended(process, signal.SIGINT) == 130
    assert check_output_folder(compose_config(overrides), output) == steps()[-1]


def test_the_nodes_of_a_real_cluster_are_seen(cluster: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    (node,) = alive_nodes(address)()
    assert node.split()[0] == ray.nodes()[0]["NodeManagerAddress"]
    watch = NodeWatch.of(address)
    try:
        deadline = time.monotonic() + 60
        while not watch.alive:
            assert watch.lost() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert watch.alive == {node} and watch.lost() is None
    finally:
        watch.end()
