"""The checkpoints of a run: which are complete, which one to take, which to remove.

Everything is read from the folder each time, so a resumed run keeps and removes what an uninterrupted one would.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from verl_ext.checkpoint_manifest import MARKER, CheckpointError, Manifest, check_files, read_manifest
from verl_ext.config import ConfigError

VERIFY = ("full", "size")


def steps_on_disk(checkpoints: Path) -> list[int]:
    """Steps of all checkpoint folders, complete or not, ascending."""
    if not checkpoints.is_dir():
        return []
    found = (re.fullmatch(r"global_step_(\d+)", path.name) for path in checkpoints.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def newest_complete(
    checkpoints: Path, *, full: bool = True, note: Callable[[str], None] = lambda _: None
) -> Manifest | None:
    """The manifest of the newest checkpoint that is whole; None where the folder holds no checkpoint at all.

    Args:
        full: read every byte; otherwise only names and sizes are compared.
        note: told of every checkpoint that is passed over, and why.

    Raises:
        ConfigError: there are checkpoints and none is whole; each is named with what is wrong with it.
    """
    found, passed = steps_on_disk(checkpoints), []
    for step in reversed(found):
        folder = checkpoints / f"global_step_{step}"
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest, full=full)
        except CheckpointError as error:
            passed.append(f"{folder.name}: {error}")
            continue
        for text in passed:
            note(f"a checkpoint is passed over: {text}")
        return manifest
    if found:
        raise ConfigError(
            f"no checkpoint in {checkpoints} is complete ({'; '.join(passed)}); restore the named files, or choose "
            "another folder to start over"
        )
    return None


def the_complete(checkpoints: Path, step: int) -> Manifest:
    """The manifest of one checkpoint, every byte of which was read.

    Raises:
        ConfigError: it does not exist or is not whole; names the file.
    """
    folder = checkpoints / f"global_step_{step}"
    if not folder.is_dir():
        there = ", ".join(map(str, steps_on_disk(checkpoints))) or "none"
        raise ConfigError(f"{folder} does not exist; steps with a checkpoint: {there}")
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint {folder} is not complete: {error}") from error
    return manifest


def best_step(records: Iterable[Mapping[str, Any]], metric: str, among: Iterable[int]) -> int | None:
    """Of the steps ``among``, the one with the highest ``metric`` in its own record (the newest of equal ones).

    None where no such step was validated.
    """
    wanted = set(among)
    values = {
        record["step"]: float(record[metric])
        for record in records
        if record["step"] in wanted and record.get(metric) is not None
    }
    values = {step: value for step, value in values.items() if math.isfinite(value)}
    return max(values, key=lambda step: (values[step], step), default=None)


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints whose files have the names and sizes they should have, ascending."""
    whole = []
    for step in steps_on_disk(checkpoints):
        folder = checkpoints / f"global_step_{step}"
        try:
            check_files(folder, read_manifest(folder), full=False)
        except CheckpointError:
            continue
        whole.append(step)
    return whole


def remove_old(checkpoints: Path, keep: int, best: Callable[[list[int]], int | None]) -> list[int]:
    """Removes complete checkpoints but the newest ``keep`` and the best one; returns the steps of those removed.

    Incomplete ones stay where they are: they do not count, and may be all that is left of something.

    Args:
        keep: at least 1, or -1 to keep all.
        best: chooses among the complete steps.
    """
    if keep == -1:
        return []
    whole = complete_steps(checkpoints)
    kept = {*whole[-keep:], best(whole)}
    removed = [step for step in whole if step not in kept]
    for step in removed:
        folder = checkpoints / f"global_step_{step}"
        # First, so that a removal that is cut off leaves nothing that passes for complete.
        (folder / MARKER).unlink()
        shutil.rmtree(folder)
    return removed
