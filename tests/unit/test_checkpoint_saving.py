"""A checkpoint gets its name when it is whole; old ones go, but never the best or the only one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.checkpoints import best_step, complete_steps, newest_complete, remove_old, steps_on_disk
from verl_ext.checkpoint_manifest import Manifest, checksum, read_manifest, seal_files, write_manifest
from verl_ext.checkpoint_saving import TRACKER, complete, partial_folder, point_tracker, rank_files, step_folder


def test_the_marker_lists_every_file_with_its_size_and_checksum(
    tmp_path: Path, make_checkpoint: Callable[..., Any]
) -> None:
    manifest = make_checkpoint(tmp_path, 20, 2)
    folder = tmp_path / "global_step_20"
    there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del there["complete.json"]
    assert manifest == read_manifest(folder) and (manifest.step, manifest.world_size) == (20, 2)
    assert dict(manifest.files) == {
        name: (len(data), xxhash.xxh3_128(data).hexdigest()) for name, data in there.items()
    }
    assert manifest.bytes == sum(map(len, there.values()))
    assert (tmp_path / TRACKER).read_text() == "20"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step_20", TRACKER]


def test_a_file_longer_than_a_block_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_ext.checkpoint_manifest.BLOCK_BYTES", 7)
    data = bytes(range(256)) * 3
    (tmp_path / "file").write_bytes(data)
    assert checksum(tmp_path / "file") == xxhash.xxh3_128(data).hexdigest()


def test_a_save_that_fails_leaves_nothing_and_the_older_one_whole(
    tmp_path: Path, make_checkpoint: Callable[..., Any]
) -> None:
    make_checkpoint(tmp_path, 10)
    with pytest.raises(OSError, match="disk is full"), partial_folder(tmp_path) as folder:
        (folder / "actor").write_bytes(b"half")
        raise OSError("disk is full")
    assert newest_complete(tmp_path).step == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step_10", TRACKER]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path, make_checkpoint: Callable[..., Any]) -> None:
    left = tmp_path / ".partial" / "global_step_10" / "actor"
    left.mkdir(parents=True)
    (left / "torn.pt").write_bytes(b"x")
    assert newest_complete(tmp_path) is None
    assert "actor/torn.pt" not in make_checkpoint(tmp_path, 10).files


def test_a_step_saved_again_replaces_the_folder(tmp_path: Path, make_checkpoint: Callable[..., Any]) -> None:
    make_checkpoint(tmp_path, 10, 2)
    (tmp_path / "global_step_10" / "data.pt").write_bytes(b"damaged")
    assert make_checkpoint(tmp_path, 10, 1).world_size == 1
    assert newest_complete(tmp_path).world_size == 1
    assert not list((tmp_path / "global_step_10").glob("actor/*world_size_2*"))


def test_a_rank_whose_files_the_driver_does_not_see_is_named(tmp_path: Path) -> None:
    with (
        partial_folder(tmp_path) as folder,
        pytest.raises(RuntimeError, match="rank 1 wrote nothing; do all nodes see"),
    ):
        saved = step_folder(folder, 5)
        saved.mkdir()
        (saved / "model_world_size_2_rank_0.pt").write_bytes(b"x")
        complete(tmp_path, folder, 5, [seal_files(saved, rank_files(saved, rank)) for rank in (0, 1)])
    assert steps_on_disk(tmp_path) == [] and not (tmp_path / TRACKER).exists()


def test_ranks_share_the_files_out_without_gap_or_overlap(tmp_path: Path, make_checkpoint: Callable[..., Any]) -> None:
    manifest = make_checkpoint(tmp_path, 3, 12)
    parts = [rank_files(tmp_path / "global_step_3", rank) for rank in range(12)]
    assert len(set().union(*parts)) == sum(map(len, parts))
    # The driver writes what lies at the top.
    assert set(manifest.files) - set().union(*parts) == {"data.pt", "questions.json", "trainer.json"}


def test_everything_is_on_the_disk_before_the_marker_and_the_marker_before_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{_number(file)}")))
    names = ["actor/model_world_size_1_rank_0.pt", "data.pt"]
    with partial_folder(tmp_path) as folder:
        saved = step_folder(folder, 5)
        (saved / "actor").mkdir(parents=True)
        for name in names:
            (saved / name).write_bytes(b"x")
        complete(tmp_path, folder, 5, [seal_files(saved, rank_files(saved, 0))])
    order = [path.removeprefix(f"{tmp_path}/") for path in synced]
    inside = ".partial/global_step_5"
    marker, tracker = order.index(f"{inside}/complete.json.tmp"), order.index(f"{TRACKER}.tmp")
    assert {f"{inside}/{name}" for name in names} | {inside, f"{inside}/actor"} <= set(order[:marker])
    assert marker < order.index(str(tmp_path)) < tracker, "the folder's new name comes between the two"


def _number(file: Any) -> int:
    return file if isinstance(file, int) else file.fileno()


def test_the_tracker_is_replaced_and_not_written_in_place(tmp_path: Path) -> None:
    point_tracker(tmp_path, 10)
    inode = (tmp_path / TRACKER).stat().st_ino
    with open(tmp_path / TRACKER) as before:
        point_tracker(tmp_path, 20)
        assert before.read() == "10" and (tmp_path / TRACKER).stat().st_ino != inode
    assert (tmp_path / TRACKER).read_text() == "20"


# ------------------------------------------------------------------------------------------------------------ retention


def fill(folder: Path, steps: list[int]) -> None:
    for step in steps:
        made = folder / f"global_step_{step}"
        made.mkdir(parents=True)
        (made / "data.pt").write_text(str(step))
        with patch("os.fsync"):
            write_manifest(made, Manifest(step, 1, seal_files(made, ["data.pt"])))


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.integers(1, 99), min_size=1, max_size=5, unique=True),
    keep=st.integers(1, 6),
    best=st.integers(0, 7),
)
def test_the_newest_and_the_best_stay_whatever_is_asked(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int, best: int
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    fill(folder, steps)
    chosen = sorted(steps)[best] if best < len(steps) else None
    removed = remove_old(folder, keep, lambda whole: chosen)
    left = complete_steps(folder)
    assert left == steps_on_disk(folder) and sorted(left + removed) == sorted(steps)
    assert set(left) == set(sorted(steps)[-keep:]) | ({chosen} - {None})


def test_an_incomplete_newest_does_not_push_out_the_only_whole_one(tmp_path: Path) -> None:
    fill(tmp_path, [10, 20, 30])
    (tmp_path / "global_step_30" / "data.pt").unlink()
    (tmp_path / "global_step_20" / "complete.json").write_text("{")
    assert remove_old(tmp_path, 1, lambda whole: None) == []
    assert newest_complete(tmp_path).step == 10
    assert steps_on_disk(tmp_path) == [10, 20, 30], "damaged ones are not ours to remove"


def test_minus_one_keeps_all(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2, 3])
    assert remove_old(tmp_path, -1, lambda whole: None) == [] and complete_steps(tmp_path) == [1, 2, 3]


def test_the_best_is_the_newest_of_the_highest_among_those_on_disk() -> None:
    values = {5: 0.9, 10: 0.5, 20: 0.7, 30: 0.7, 40: math.nan}
    records = [{"step": step, "val/mean@8": value} for step, value in values.items()] + [{"step": 50}]
    assert best_step(records, "val/mean@8", [10, 20, 30, 40, 50]) == 30
    assert best_step(records, "val/mean@8", [10, 50]) == 10
    assert best_step(records, "val/mean@8", [40, 50]) is None
    assert best_step(records, "val/mean@4", [10]) is None
