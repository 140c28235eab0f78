"""A checkpoint of a few bytes a file, made by the code that makes real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from verl_ext.checkpoint_manifest import Manifest, seal_files
from verl_ext.checkpoint_saving import complete, partial_folder, rank_files, step_folder

WHOLE = [
    "actor/fsdp_config.json",
    "actor/huggingface/config.json",
    "actor/huggingface/tokenizer.json",
    "data.pt",
    "questions.json",
    "teacher/teacher.json",
    "trainer.json",
]
SHARDS = ["actor/model_{}.pt", "actor/optim_{}.pt", "actor/extra_state_{}.pt", "teacher/teacher_{}.safetensors"]


def checkpoint_names(ranks: int, teacher: bool = True) -> list[str]:
    """What verl and we write into a checkpoint."""
    shards = [form.format(f"world_size_{ranks}_rank_{rank}") for form in SHARDS for rank in range(ranks)]
    return [name for name in WHOLE + shards if teacher or not name.startswith("teacher/")]


def _make(checkpoints: Path, step: int, ranks: int = 1, teacher: bool = True) -> Manifest:
    # The time of a sync is the disk's.
    with patch("os.fsync"), partial_folder(checkpoints) as folder:
        saved = step_folder(folder, step)
        for name in checkpoint_names(ranks, teacher):
            path = saved / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # As long in every checkpoint, and different in each.
            path.write_bytes(f"{name} after {step:05d} steps".encode())
        parts = [seal_files(saved, rank_files(saved, rank)) for rank in range(ranks)]
        return complete(checkpoints, folder, step, parts)


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Manifest]:
    """Saves the checkpoint of a step."""
    return _make
