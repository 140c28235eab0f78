"""How a checkpoint comes into being: in a folder of its own, files first, the marker last, then one rename.

A save that is cut off leaves ``.partial``, which nothing reads and the next save removes; every folder
``global_step_N`` was whole when it got its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from verl_ext.atomic import sync_folder, write_atomically
from verl_ext.checkpoint_manifest import Manifest, file_names, seal_files, write_manifest

TRACKER = "latest_checkpointed_iteration.txt"
"""verl's: the step it resumes from."""
PARTIAL = ".partial"
REPLACED = ".replaced"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` steps."""
    return checkpoints / f"global_step_{step}"


@contextmanager
def partial_folder(checkpoints: Path) -> Iterator[Path]:
    """An empty folder to save into; where the save fails it goes away, with the space it takes."""
    partial = checkpoints / PARTIAL
    for left in (partial, checkpoints / REPLACED):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rank_files(folder: Path, rank: int) -> list[str]:
    """The files of a checkpoint that one rank wrote; rank 0 also what no rank has a file of its own of."""
    names = file_names(folder)
    own = [name for name in names if f"_rank_{rank}." in name]
    return own + [name for name in names if rank == 0 and "/" in name and "_rank_" not in name]


def complete(checkpoints: Path, partial: Path, step: int, ranks: list[Mapping[str, tuple[int, str]]]) -> Manifest:
    """Gives the marker and its name to a checkpoint that was saved into ``partial``, and points the tracker at it.

    Args:
        ranks: what :func:`verl_ext.checkpoint_manifest.seal_files` returned for the files of each rank.

    Raises:
        RuntimeError: ranks did not write the same files.
    """
    saved, target = step_folder(partial, step), step_folder(checkpoints, step)
    kinds = [sorted(name.replace(f"_rank_{i}.", "_rank_*.") for name in part if f"_rank_{i}." in name)
             for i, part in enumerate(ranks)]  # fmt: skip
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise RuntimeError(
                f"the checkpoint of step {step} is not whole: rank 0 wrote {', '.join(kinds[0]) or 'nothing'}, rank "
                f"{rank} wrote {', '.join(kind) or 'nothing'}; do all nodes see {checkpoints}?"
            )
    files = {name: record for part in ranks for name, record in part.items()}
    files |= seal_files(saved, [name for name in file_names(saved) if name not in files])
    manifest = Manifest(step, len(ranks), files)
    write_manifest(saved, manifest)
    replaced = checkpoints / REPLACED
    if target.exists():
        target.rename(replaced)
    saved.rename(target)
    sync_folder(checkpoints)
    shutil.rmtree(replaced, ignore_errors=True)
    point_tracker(checkpoints, step)
    return manifest


def point_tracker(checkpoints: Path, step: int) -> None:
    """Makes verl resume from this step."""
    write_atomically(checkpoints / TRACKER, str(step))
    sync_folder(checkpoints)
