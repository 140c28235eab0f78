"""A damaged checkpoint is named and passed over for an older one, or refused where there is none; never loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipe.checkpoints import complete_steps, newest_complete, the_complete
from verl_ext.checkpoint_manifest import file_names
from verl_ext.checkpoint_saving import TRACKER
from verl_ext.config import ConfigError

RANKS = 2
MARKER = "complete.json"
NAMES = [
    MARKER,
    "actor/fsdp_config.json",
    "actor/huggingface/config.json",
    "actor/huggingface/tokenizer.json",
    *(f"actor/{part}_world_size_2_rank_{rank}.pt" for part in ("model", "optim", "extra_state") for rank in (0, 1)),
    "data.pt",
    "questions.json",
    "teacher/teacher.json",
    *(f"teacher/teacher_world_size_2_rank_{rank}.safetensors" for rank in (0, 1)),
    "trainer.json",
]


def flip(path: Path, position: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def swap(path: Path) -> None:
    """The same file of the other checkpoint: as long, and whole in itself."""
    other = path.parents[len(path.parts) - path.parts.index("global_step_20") - 2].parent / "global_step_10"
    shutil.copy(other / path.relative_to(other.with_name("global_step_20")), path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "missing"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes instead of"),
    "first bit": (lambda path: flip(path, 0, 7), "has changed"),
    "middle bit": (lambda path: flip(path, path.stat().st_size // 2), "has changed"),
    "last bit": (lambda path: flip(path, -2, 0), "has changed"),
    "of another step": (swap, "has changed"),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    for step in (10, 20):
        make_checkpoint(folder, step, RANKS)
    assert set(file_names(folder / "global_step_20")) | {MARKER} == set(NAMES)
    return folder


@pytest.fixture
def checkpoints(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def passed_over(checkpoints: Path, full: bool = True) -> str:
    """Takes a checkpoint: the older one, with one note."""
    notes: list[str] = []
    manifest = newest_complete(checkpoints, full=full, note=notes.append)
    assert manifest is not None and manifest.step == 10 and len(notes) == 1
    assert "global_step_20" in notes[0]
    return notes[0]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_named_and_its_checkpoint_never_loaded(checkpoints: Path, name: str, damage: str) -> None:
    change, says = DAMAGES[damage]
    change(checkpoints / "global_step_20" / name)
    note = passed_over(checkpoints)
    assert name in note and (name == MARKER or says in note)
    with pytest.raises(ConfigError, match="is not complete") as one:
        the_complete(checkpoints, 20)
    shutil.rmtree(checkpoints / "global_step_10")
    with pytest.raises(ConfigError, match="no checkpoint in .* is complete") as all_of_them:
        newest_complete(checkpoints)
    assert name in str(one.value) and name in str(all_of_them.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer"])
@pytest.mark.parametrize("name", ["data.pt", "actor/optim_world_size_2_rank_1.pt", MARKER])
def test_names_and_sizes_alone_find_what_changes_them(checkpoints: Path, name: str, damage: str) -> None:
    DAMAGES[damage][0](checkpoints / "global_step_20" / name)
    assert name in passed_over(checkpoints, full=False)
    assert complete_steps(checkpoints) == [10]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_bit_is_found(pristine: Path, data: st.DataObject) -> None:
    path = pristine / "global_step_20" / data.draw(st.sampled_from(NAMES))
    before = path.read_bytes()
    try:
        flip(path, data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7)))
        assert newest_complete(pristine).step == 10
    finally:
        path.write_bytes(before)
    assert newest_complete(pristine).step == 20


@pytest.mark.parametrize(
    "name",
    ["actor/model_world_size_4_rank_3.pt", "critic/model_world_size_2_rank_0.pt", "extra.json", "complete.json.tmp"],
)
def test_a_file_that_was_put_there_later_is_named(checkpoints: Path, name: str) -> None:
    path = checkpoints / "global_step_20" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    assert f"{name} was not written with it" in passed_over(checkpoints)


@pytest.mark.parametrize("name", ["actor/huggingface/model.safetensors", ".nfs0001", "actor/.DS_Store"])
def test_a_model_made_in_the_folder_and_hidden_files_do_no_harm(checkpoints: Path, name: str) -> None:
    (checkpoints / "global_step_20" / name).write_bytes(b"x")
    assert newest_complete(checkpoints).step == 20


def test_a_renamed_checkpoint_is_not_taken_for_another_step(checkpoints: Path) -> None:
    (checkpoints / "global_step_20").rename(checkpoints / "global_step_30")
    notes: list[str] = []
    assert newest_complete(checkpoints, note=notes.append).step == 10
    assert "global_step_30: complete.json is that of step 20" in notes[0]


def test_a_marker_that_points_outside_is_damaged(tmp_path: Path) -> None:
    from verl_ext.checkpoint_manifest import CheckpointError, Manifest, checksum, read_manifest, write_manifest

    folder = tmp_path / "global_step_1"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    write_manifest(folder, Manifest(1, 1, {"../secret": (1, checksum(tmp_path / "secret"))}))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        read_manifest(folder)


def test_the_tracker_and_unrelated_folders_are_not_checkpoints(checkpoints: Path) -> None:
    (checkpoints / TRACKER).write_text("999")
    (checkpoints / "global_step_30.bak").mkdir()
    (checkpoints / ".partial" / "global_step_40").mkdir(parents=True)
    assert newest_complete(checkpoints).step == 20
    assert newest_complete(checkpoints / "nothing") is None
