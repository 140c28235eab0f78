"""Questions of parquet files as requests for the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from verl_ext.config_values import ConfigError
from verl_ext.sampling import SampleRequest


def file_list(value: Any) -> list[str]:
    """The files of a key such as ``data.train_files``: one, a list of them, or none."""
    if value is None:
        return []
    return [str(value)] if isinstance(value, str | Path) else [str(item) for item in value]


def read_questions(
    files: Sequence[str], key: str, *, prompt_key: str = "prompt", limit: int | None = None
) -> tuple[list[SampleRequest], int]:
    """The first ``limit`` questions of the files, and how many repeats were left out.

    A question that stands in the data twice with the same answer is sampled once. ``key`` is the key that names the
    files, for messages.

    Raises:
        ConfigError: a file or a row cannot be used; names the file, the row and the key.
    """
    found: dict[str, SampleRequest] = {}
    repeats = 0
    for name in files:
        for number, row in enumerate(_rows(Path(name), key)):
            request = _request(row, f"{name} row {number}", prompt_key)
            first = found.setdefault(request.question_id, request)
            if first is not request:
                if first.ground_truth != request.ground_truth:
                    raise ConfigError(
                        f"{name} row {number}: question {request.question_id} was there before with the answer "
                        f"{first.ground_truth!r}, here it is {request.ground_truth!r}"
                    )
                repeats += 1
            if limit is not None and len(found) == limit:
                return list(found.values()), repeats
    if not found:
        raise ConfigError(f"{key} {list(files)} holds no question")
    return list(found.values()), repeats


def _rows(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise ConfigError(f"{key}: {path} does not exist; make it with `python -m data_prep.NAME`") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as parquet: {error}") from error


def _request(row: Mapping[str, Any], where: str, prompt_key: str) -> SampleRequest:
    for name in (prompt_key, "data_source", "reward_model", "extra_info"):
        if row.get(name) is None:
            raise ConfigError(f"{where}: {name!r} is missing; it has {sorted(row)}")
    extra = row["extra_info"]
    if not extra.get("question_id"):
        raise ConfigError(f"{where}: extra_info.question_id is missing; write the data with data_prep or add it")
    return SampleRequest(
        question_id=str(extra["question_id"]),
        messages=row[prompt_key],
        data_source=row["data_source"],
        ground_truth=row["reward_model"].get("ground_truth"),
        extra_info=extra,
    )
