"""What a campaign of kills finds in the files of two runs, and which kills it plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_campaign import TITLES, compare, plan


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(step: int, weights: str | None = None) -> dict[str, Any]:
    fingerprint = {"fingerprint/student_0": weights or f"s{step}", "fingerprint/teacher_0": f"t{step}"}
    return {"step": step, "loss": step / 2, **fingerprint}


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    return write(tmp_path / "alone", [row(step) for step in (1, 2, 3)])


def test_two_equal_runs_agree(alone: Path, tmp_path: Path) -> None:
    found = compare(alone, write(tmp_path / "killed", [row(step) for step in (1, 2, 3)]), 3)
    assert found["fingerprints_compared"] == 6 and found["losses_equal"]
    assert not any(found[key] for key in ("steps_lost", "steps_doubled", "steps_with_other_weights", "rows_recovered"))


def test_lost_doubled_and_different_steps_are_named(alone: Path, tmp_path: Path) -> None:
    killed = write(tmp_path / "killed", [row(1), row(3), row(3, weights="other")])
    found = compare(alone, killed, 3)
    assert (found["steps_lost"], found["steps_doubled"]) == ([2], [3])
    assert found["steps_with_other_weights"] == [2, 3] and not found["losses_equal"]


def test_a_recovered_row_has_no_fingerprint_but_the_last_must(alone: Path, tmp_path: Path) -> None:
    bare = [{"step": step, "loss": step / 2} for step in (2, 3)]
    found = compare(alone, write(tmp_path / "killed", [row(1), bare[0], row(3)]), 3)
    assert found["rows_recovered"] == [2] and not found["steps_with_other_weights"]
    found = compare(alone, write(tmp_path / "other", [row(1), row(2), bare[1]]), 3)
    assert found["steps_with_other_weights"] == [3]


def test_the_plan_depends_on_the_seed_and_takes_every_target() -> None:
    assert plan(6, 1) == plan(9, 1)[:6] != plan(6, 2)
    assert [kill.target for kill in plan(6, 1)] == [*TITLES, *TITLES]
