"""The sign of life: what it says, where it goes, and what of a broken file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from verl_ext.heartbeat import FILE, ROLLOUT, SAVE, UPDATE, VARIABLE, Heartbeat, beat, beating, current, read_beat


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_step_and_checkpoint_stay_until_others_come(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / FILE)
    heart.beat(ROLLOUT, 3, saved=2)
    first = read_beat(tmp_path / FILE)
    heart.beat(UPDATE)
    heart.beat(SAVE, saved=3)
    last = read_beat(tmp_path / FILE)
    assert (first.step, first.phase, first.saved, first.pid) == (3, ROLLOUT, 2, os.getpid())
    assert (last.step, last.phase, last.saved) == (3, SAVE, 3)
    assert last == heart.last and last.monotonic >= first.monotonic
    assert last.place == "save of step 3"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_inner_run_has_its_own_and_the_outer_one_comes_back(tmp_path: Path) -> None:
    for name in ("outer", "inner"):
        (tmp_path / name).mkdir()
    with beating(tmp_path / "outer") as outer:
        beat("stage collect")
        with beating(tmp_path / "inner"):
            beat(UPDATE, 1)
        assert current() is outer
    beat(UPDATE, 9)  # in memory only
    assert read_beat(tmp_path / "outer" / FILE).phase == "stage collect"
    assert read_beat(tmp_path / "inner" / FILE).step == 1


def test_a_supervisor_names_one_file_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one.json"))
    with beating(tmp_path / "nowhere"), beating(tmp_path / "elsewhere"):
        beat(UPDATE, 4)
    assert read_beat(tmp_path / "one.json").step == 4


def test_no_file_is_no_beat_and_another_file_is_named(tmp_path: Path) -> None:
    assert read_beat(tmp_path / FILE) is None
    for text in ("", "[]", json.dumps({"step": 1})):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ValueError, match=f"{FILE} is not a heartbeat"):
            read_beat(tmp_path / FILE)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        Heartbeat(tmp_path / "missing" / FILE).beat(UPDATE)
