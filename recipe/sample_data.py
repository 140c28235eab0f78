"""Questions of a run's data files as requests for the sampler."""

from __future__ import annotations

from omegaconf import DictConfig

from verl_ext import question_data
from verl_ext.sampling import SampleRequest


def read_questions(config: DictConfig, split: str, limit: int | None = None) -> tuple[list[SampleRequest], int]:
    """Of ``data.train_files`` or ``data.val_files``; see :func:`verl_ext.question_data.read_questions`."""
    key = "train_files" if split == "train" else "val_files"
    files = question_data.file_list(config.data[key])
    return question_data.read_questions(
        files, f"data.{key}", prompt_key=config.data.get("prompt_key", "prompt"), limit=limit
    )
