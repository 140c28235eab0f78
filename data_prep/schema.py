"""The one parquet schema of this project (verl's RL data format) and its writer.

| column | type | content |
|---|---|---|
| ``data_source`` | string | name of the data set; chooses the verifier and groups the validation metrics |
| ``prompt`` | list of {role, content} | chat messages; the last one is a user turn |
| ``ability`` | string | e.g. ``math``; only informative |
| ``reward_model`` | {style, ground_truth} | ``rule`` and whatever the verifier compares with, as a string |
| ``extra_info`` | struct | ``split``, ``index``, ``question_id`` always; further fields belong to the data set |

``question_id`` identifies a question across files, runs and samplings: see :func:`question_id`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
REQUIRED_EXTRA_INFO = ("split", "index", "question_id")
ROLES = ("system", "user", "assistant", "tool")


def question_id(data_source: str, prompt: Sequence[Mapping[str, str]]) -> str:
    """Stable identity of a question: 32 hex digits from the data source and the normalised prompt.

    Every run of white space counts as one space and white space at the ends does not count, so a prompt that was only
    re-wrapped keeps its id. Roles, the order of the messages and upper or lower case do count.
    """
    messages = [[str(message["role"]), " ".join(str(message["content"]).split())] for message in prompt]
    payload = json.dumps([data_source, messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(payload.encode("utf-8")).hexdigest()[:32]


def make_row(
    *,
    data_source: str,
    prompt: list[dict[str, str]],
    ground_truth: str,
    split: str,
    index: int,
    ability: str = "math",
    style: str = "rule",
    **extra_info: Any,
) -> dict[str, Any]:
    """One checked row; further keyword arguments go to ``extra_info``."""
    row = {
        "data_source": data_source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": style, "ground_truth": ground_truth},
        "extra_info": {
            "split": split,
            "index": index,
            "question_id": question_id(data_source, prompt),
            **extra_info,
        },
    }
    check_row(row)
    return row


def check_row(row: Mapping[str, Any], where: str = "row") -> None:
    """Raise ValueError, naming the key, what was found and what was expected, where a row breaks the schema."""
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise ValueError(f"{where}: column {missing[0]!r} is missing; expected {list(COLUMNS)}")
    _expect(isinstance(row["data_source"], str) and row["data_source"], where, "data_source", row, "a non-empty string")
    prompt = row["prompt"]
    _expect(isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt, where, "prompt", row, "messages")
    for message in prompt:
        well_formed = (
            isinstance(message, Mapping) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        )
        _expect(well_formed, where, "prompt", row, f"messages with a role of {ROLES} and a string as content")
    _expect(prompt[-1]["role"] == "user", where, "prompt", row, "a user turn as the last message")
    reward = row["reward_model"]
    _expect(isinstance(reward, Mapping) and "style" in reward, where, "reward_model", row, "{style, ground_truth}")
    _expect(isinstance(reward.get("ground_truth"), str), where, "reward_model", row, "a string as ground_truth")
    extra = row["extra_info"]
    _expect(isinstance(extra, Mapping), where, "extra_info", row, "a mapping")
    for key in REQUIRED_EXTRA_INFO:
        _expect(key in extra, where, "extra_info", row, f"the key {key!r}")
    right_id = question_id(row["data_source"], prompt)
    _expect(extra["question_id"] == right_id, where, "extra_info", row, f"question_id {right_id}")


def _expect(condition: Any, where: str, key: str, row: Mapping[str, Any], expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}: {key} is {row[key]!r:.300}; expected {expected}")


def write_parquet(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Check the rows and write them under a temporary name, then rename: a reader never sees half a file."""
    path = Path(path)
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    keys = sorted(rows[0]["extra_info"]) if "extra_info" in rows[0] else []
    for i, row in enumerate(rows):
        check_row(row, where=f"{path} row {i}")
        if sorted(row["extra_info"]) != keys:
            raise ValueError(f"{path} row {i}: extra_info has keys {sorted(row['extra_info'])}, row 0 has {keys}")
    table = pa.Table.from_pylist([dict(row) for row in rows])
    return write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def write_json(value: Any, path: str | os.PathLike[str]) -> Path:
    """Write indented JSON in the same way, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it; on an error nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
