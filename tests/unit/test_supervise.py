"""The supervisor over small real drivers: hung, killed, refused, preempted, with children that outlive them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from recipe.attempts import ATTEMPTS
from recipe.compose import ROOT
from recipe.driver_process import MARK, DriverProcess
from recipe.supervise import Settings, Supervisor, folder_of, main

# A driver: what it does at its n-th start is the n-th of its words; the last one is repeated.
DRIVER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1].split("=", 1)[1])
starts = folder / "starts.jsonl"
with open(starts, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
words = [word for word in sys.argv[2:] if "=" not in word]
word = words[min(len(starts.read_text().splitlines()), len(words)) - 1]
def beat(phase, step, saved):
    path = Path(os.environ["PASSRATE_HEARTBEAT"])
    beat = dict(step=step, phase=phase, monotonic=time.monotonic(), wall=time.time(), pid=os.getpid(), saved=saved)
    path.with_suffix(".new").write_text(json.dumps(beat))
    path.with_suffix(".new").replace(path)
beat("start", 0, 0)
if word == "progress":
    time.sleep(0.15)
    beat("save", 2, 2)
    time.sleep(0.15)
    sys.exit(1)
if word == "signal":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    (folder / "ready").touch()
    time.sleep(60)
if word in ("hang", "deaf"):
    if word == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    beat("update", 3, 0)
    subprocess.Popen(["sleep", "61"], start_new_session=True)
    time.sleep(60)
if word == "orphans":
    subprocess.Popen(["sleep", "62"], start_new_session=True)
    sys.exit(0)
if word == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(word))
"""


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", DRIVER, f"run.output_dir={folder}", *words]


def supervisor(folder: Path, *words: str, **changes: object) -> Supervisor:
    settings = {"poll": 0.02, "pause": 0.0, "to_end": 0.3, "to_leave": 0.05, "limits": {"start": 30.0, "update": 0.2}}
    return Supervisor(command(folder, *words), Settings(folder, **{**settings, **changes}))


def starts(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def outcomes(folder: Path) -> list[str]:
    return [json.loads(line)["outcome"] for line in (folder / ATTEMPTS).read_text().splitlines()]


def sleepers(seconds: int) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", str(seconds)]]


def test_a_failure_is_started_again_and_a_success_ends_it(tmp_path: Path) -> None:
    assert supervisor(tmp_path, "1", "killed", "0").run() == 0
    assert outcomes(tmp_path) == ["failed", "failed", "done"]
    # Nothing was saved before the first end: the later ones may begin anew.
    assert ["run.start_over=true" in words for words in starts(tmp_path)] == [False, True, True]


@pytest.mark.parametrize(("word", "code"), (("2", 2), ("75", 75), ("130", 130)))
def test_a_refusal_a_preemption_and_ctrl_c_are_not_started_again(tmp_path: Path, word: str, code: int) -> None:
    assert supervisor(tmp_path, word, restarts=5).run() == code
    assert len(starts(tmp_path)) == 1


def test_without_a_new_checkpoint_it_gives_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervisor(tmp_path, "1", "progress", "1", restarts=9, most_failures=2).run() == 1
    progress = [json.loads(line)["progress"] for line in (tmp_path / ATTEMPTS).read_text().splitlines()]
    assert progress == [False, True, False, False]
    assert "2 attempts in a row made no new checkpoint" in capsys.readouterr().err
    # The count is in the run's folder: a requeue does not begin it anew.
    assert supervisor(tmp_path, "1", restarts=9, most_failures=3).run() == 1
    assert len(starts(tmp_path)) == 5


@pytest.mark.parametrize("word", ("hang", "deaf"))
def test_a_hung_driver_is_ended_with_what_it_started(
    tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert supervisor(tmp_path, word, restarts=0).run() == 75
    line = json.loads((tmp_path / ATTEMPTS).read_text())
    assert line["outcome"] == "hung" and line["step"] == 3 and line["saved"] == 0
    assert line["code"] == (-signal.SIGTERM if word == "hang" else -signal.SIGKILL)
    assert not sleepers(61)
    told = capsys.readouterr().err
    assert "update of step 3 has not ended" in told and "ended what the driver left behind: sleep" in told


def test_children_that_outlive_a_finished_driver_are_ended(tmp_path: Path) -> None:
    assert supervisor(tmp_path, "orphans").run() == 0
    assert not sleepers(62)


def when(condition: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_signals_are_passed_on_and_75_comes_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    thread = when((tmp_path / "ready").exists, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert supervisor(tmp_path, "signal", "0", restarts=5).run() == 75
    thread.join()
    assert outcomes(tmp_path) == ["preempted"]
    assert signal.getsignal(signal.SIGUSR1) == before


class Watch:
    """Loses a node when it is told to, or never."""

    def __init__(self, when: Callable[[], bool]) -> None:
        self.when, self.ended = when, False

    def lost(self) -> str | None:
        return "1 of 2 nodes lost: 10.0.0.2 abc" if self.when() else None

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bool]], Watch]:
    def make(when: Callable[[], bool]) -> Watch:
        watch = Watch(when)
        monkeypatch.setattr("verl_ext.ray_nodes.NodeWatch.of", lambda address: watch)
        return watch

    return make


def test_a_lost_node_ends_the_driver_and_asks_for_a_requeue(tmp_path: Path, watching: Callable[..., Watch]) -> None:
    watch = watching((tmp_path / "ready").exists)
    assert supervisor(tmp_path, "signal", restarts=5, address="10.0.0.1:6379").run() == 75
    assert outcomes(tmp_path) == ["lost"] and watch.ended


def test_a_driver_without_a_node_is_not_waited_for_as_long_as_one_that_can_save(
    tmp_path: Path, watching: Callable[..., Watch]
) -> None:
    watching((tmp_path / "ready").exists)
    changes = {"limits": {}, "to_end": 3600.0, "to_end_lost": 0.1}
    told = supervisor(tmp_path, "deaf", restarts=0, address="10.0.0.1:6379", **changes)
    thread = when((tmp_path / "starts.jsonl").exists, (tmp_path / "ready").touch)
    assert told.run() == 75
    thread.join()
    line = json.loads((tmp_path / ATTEMPTS).read_text())
    assert (line["outcome"], line["code"]) == ("lost", -signal.SIGKILL)


def test_a_driver_that_fails_before_ray_tells_of_the_lost_node_is_not_started_in_the_rest_of_the_cluster(
    tmp_path: Path, watching: Callable[..., Watch]
) -> None:
    looks: list[None] = []

    def running() -> bool:
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it has ended
                if str(tmp_path) in " ".join(child.cmdline()):
                    return True
        return False

    def told() -> bool:
        """At the fourth look after the driver's end."""
        if (tmp_path / "starts.jsonl").exists() and not running():
            looks.append(None)
        return len(looks) > 3

    watching(told)
    assert supervisor(tmp_path, "1", restarts=5, address="10.0.0.1:6379").run() == 75
    line = json.loads((tmp_path / ATTEMPTS).read_text())
    assert line["outcome"] == "lost" and line["code"] == 1 and "1 of 2 nodes lost" in line["reason"]
    assert len(starts(tmp_path)) == 1


def test_a_failure_with_all_nodes_there_is_started_again(tmp_path: Path, watching: Callable[..., Watch]) -> None:
    watching(lambda: False)
    assert supervisor(tmp_path, "1", "0", address="10.0.0.1:6379", to_notice=0.1).run() == 0
    assert outcomes(tmp_path) == ["failed", "done"]


def test_a_driver_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "recipe.supervise", "--", *command(tmp_path, "signal")],
        cwd=ROOT, env=os.environ | {"RAY_ADDRESS": ""}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        (driver,) = psutil.Process(process.pid).children()
    finally:
        process.kill()
        process.wait()
    psutil.wait_procs([driver], timeout=20)
    assert not driver.is_running()


def test_a_process_without_the_mark_is_left_alone(tmp_path: Path) -> None:
    driver = DriverProcess([sys.executable, "-c", "pass"], os.environ)
    other = subprocess.Popen(["sleep", "63"], env=os.environ | {MARK: "another"})
    try:
        while driver.poll() is None:
            time.sleep(0.01)
        assert driver.sweep(seconds=0.1) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("words", "folder"),
    (
        (["python", "-m", "recipe.train", "run.output_dir=a", "run.output_dir=b"], "b"),
        (["python", "-m", "recipe.sft", "sft.out='c d'"], "c d"),
        (["python", "-m", "recipe.train", "method=grpo"], None),
    ),
)
def test_the_folder_is_the_last_that_the_command_names(words: list[str], folder: str | None) -> None:
    assert folder_of(words) == (None if folder is None else Path(folder))


@pytest.mark.parametrize(
    ("arguments", "told"),
    (
        ([], "no command"),
        (["--", "python", "x.py"], "run.output_dir="),
        (["--limit", "walk=3", "--", "x"], "'walk' is no phase"),
        (["--limit", "update=0", "--", "x"], "expected update=SECONDS"),
        (["--restarts", "-1", "--", "x"], "restarts"),
    ),
)
def test_bad_commands_are_refused_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2 and told in capsys.readouterr().err


def test_a_command_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--folder", str(tmp_path), "--", "no-such-program-here"]) == 2
    assert "no-such-program-here" in capsys.readouterr().err
