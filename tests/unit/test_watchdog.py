"""A hung step ends in one message with the stacks of the driver and of what runs below it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe.compose import ROOT
from verl_ext.heartbeat import ROLLOUT, Heartbeat
from verl_ext.watchdog import StepHung, Watchdog

LIMIT = 0.15


def waits_for_ever() -> None:
    while True:
        time.sleep(0.02)


def test_a_hang_raises_in_the_main_thread_with_the_stacks_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl_ext.watchdog._family", lambda: [])
    heart = Heartbeat()
    heart.beat(ROLLOUT, 7)
    with pytest.raises(StepHung) as caught, Watchdog(heart, LIMIT, tmp_path, poll=0.02).watching():
        waits_for_ever()
    (file,) = tmp_path.glob("stacks-*.txt")
    for part in ("rollout of step 7", "0.15 s", "run.step_timeout", str(file), "the last checkpoint is whole"):
        assert part in str(caught.value)
    assert "waits_for_ever" in file.read_text()


def test_beats_keep_it_quiet_and_the_end_stops_it(tmp_path: Path) -> None:
    heart = Heartbeat()
    with Watchdog(heart, LIMIT, tmp_path, poll=0.02).watching():
        for step in range(20):
            heart.beat(ROLLOUT, step)
            time.sleep(0.02)
    time.sleep(2 * LIMIT)
    assert not list(tmp_path.iterdir())


DEAF = """
import sys, threading, time
from pathlib import Path
from verl_ext import watchdog
from verl_ext.heartbeat import Heartbeat
watchdog._family = lambda: []
lock = threading.Lock()
with watchdog.Watchdog(Heartbeat(), 0.1, Path(sys.argv[1]), poll=0.02, unwind=0.2).watching():
    while True:
        try:
            time.sleep(60)
        except watchdog.StepHung:
            pass
"""


def test_a_main_thread_that_does_not_leave_is_ended_with_1(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DEAF, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"did not wake up and was ended" in done.stderr and b"run.step_timeout" in done.stderr


def test_stacks_of_a_child_are_taken_where_the_tool_is(tmp_path: Path) -> None:
    from verl_ext.watchdog import dump_stacks

    if shutil.which("py-spy") is None:
        pytest.skip("not run: needs py-spy")
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\ndef a_worker_waits(): time.sleep(60)\nprint(1, flush=True)\na_worker_waits()",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        child.stdout.readline()
        dump_stacks(tmp_path / "stacks.txt", "why")
    finally:
        child.kill()
        child.wait()
    text = (tmp_path / "stacks.txt").read_text()
    assert text.startswith("why\n") and f"pid {child.pid}" in text
    assert "a_worker_waits" in text or "no stack" in text  # reading another process may be forbidden here


def test_without_the_tool_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_ext.watchdog import dump_stacks

    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    dump_stacks(tmp_path / "stacks.txt", "why")
    assert "py-spy is not installed" in (tmp_path / "stacks.txt").read_text()
