"""Prepared token sequences for supervised fine-tuning: the parquet format, and the data set that verl's trainer reads.

One row is one sequence, whole: nothing is tokenised, templated or cut here. Whoever writes the rows decides which of
its tokens are trained on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from verl_ext.config_values import ConfigError
from verl_ext.question_data import file_list

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("kind", pa.string()),
        ("question_id", pa.string()),
    ]
)
"""``input_ids`` [T] and ``loss_mask`` [T] (1 where the token is trained on: it is predicted from those before it);
``kind`` is what the row is for, such as ``revision``."""
ROWS_PER_GROUP = 1000


def write_sft_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows with the columns of :data:`SCHEMA`, and no others; returns how many. The file appears whole or not.

    Raises:
        ConfigError: a row breaks the format, or there is none; the message names file, row and column.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    try:
        with pq.ParquetWriter(temporary, SCHEMA) as writer:
            remaining = iter(rows)
            while group := list(islice(remaining, ROWS_PER_GROUP)):
                for number, row in enumerate(group, start=count):
                    if set(row) != set(SCHEMA.names):
                        odd = sorted(set(row) ^ set(SCHEMA.names))[0]
                        raise ConfigError(
                            f"{path}, row {number}, column {odd}: {'missing' if odd in SCHEMA.names else 'not known'}; "
                            f"a row has {', '.join(SCHEMA.names)}"
                        )
                    _check_row(f"{path}, row {number}", *(row[name] for name in SCHEMA.names))
                writer.write_table(pa.Table.from_pylist([dict(row) for row in group], schema=SCHEMA))
                count += len(group)
        if not count:
            raise ConfigError(f"{path}: there are no rows to write")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _check_row(where: str, input_ids: Sequence[int], loss_mask: Sequence[int], kind: Any, question_id: Any) -> None:
    """Raises ConfigError with the column that breaks the format."""
    try:
        ids, mask = np.asarray(input_ids), np.asarray(loss_mask)
        numbers = all(values.ndim == 1 and (values.size == 0 or values.dtype.kind in "iub") for values in (ids, mask))
    except (TypeError, ValueError):
        numbers = False
    if not numbers:
        raise ConfigError(f"{where}, columns input_ids, loss_mask: expected two lists of whole numbers")
    if len(ids) < 2:
        raise ConfigError(f"{where}, column input_ids: {len(ids)} tokens; a sequence has at least 2")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        found = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise ConfigError(f"{where}, column input_ids: {found} is no token number")
    if len(mask) != len(ids):
        raise ConfigError(f"{where}, column loss_mask: {len(mask)} entries for {len(ids)} tokens of input_ids")
    if mask.min() < 0 or mask.max() > 1:
        raise ConfigError(f"{where}, column loss_mask: {int(mask[(mask < 0) | (mask > 1)][0])}; allowed: 0 and 1")
    if mask[0]:
        # verl would take it for the token after the previous sequence's last one.
        raise ConfigError(f"{where}, column loss_mask: 1 at the first token, which nothing predicts")
    if not mask.any():
        raise ConfigError(f"{where}, column loss_mask: no token is trained on")
    for name, value in (("kind", kind), ("question_id", question_id)):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where}, column {name}: {value!r}; expected text")


class SftRows:
    """The checked rows of one or more files, in their order.

    Attributes:
        input_ids: int32 [T] of every row.
        loss_mask: int8 [T] of every row.
        kinds, question_ids: text of every row.
    """

    def __init__(self) -> None:
        self.input_ids: list[np.ndarray] = []
        self.loss_mask: list[np.ndarray] = []
        self.kinds: list[str] = []
        self.question_ids: list[str] = []
        self._starts: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self.input_ids)

    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 [B]."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    def trained(self) -> int:
        """Tokens that are trained on, over all rows."""
        return sum(int(mask.sum()) for mask in self.loss_mask)

    def where(self, row: int) -> str:
        """File and row in it, for messages."""
        start, path = next((start, path) for start, path in reversed(self._starts) if start <= row)
        return f"{path}, row {row - start}"

    def check(self, *, max_length: int | None = None, vocabulary: int | None = None) -> None:
        """Raises ConfigError for a sequence over ``max_length`` tokens or a token the vocabulary does not have."""
        for row, ids in enumerate(self.input_ids):
            if max_length is not None and len(ids) > max_length:
                raise ConfigError(
                    f"{self.where(row)}, column input_ids: {len(ids)} tokens; allowed: up to {max_length} "
                    "(a sequence is never cut: leave the row out or raise the length)"
                )
            if vocabulary is not None and ids.max() >= vocabulary:
                raise ConfigError(
                    f"{self.where(row)}, column input_ids: token {int(ids.max())}; the model has {vocabulary} tokens"
                )

    def add_file(self, path: str) -> None:
        """Appends a file's rows. Raises ConfigError that names file, row and column."""
        table = _read_table(path)
        start = len(self)
        self._starts.append((start, path))
        ids, masks = _arrays(table["input_ids"]), _arrays(table["loss_mask"])
        rows = zip(ids, masks, table["kind"].to_pylist(), table["question_id"].to_pylist(), strict=True)
        for number, (input_ids, loss_mask, kind, question_id) in enumerate(rows):
            _check_row(f"{path}, row {number}", input_ids, loss_mask, kind, question_id)
            self.input_ids.append(input_ids)
            self.loss_mask.append(loss_mask)
            self.kinds.append(kind)
            self.question_ids.append(question_id)


def read_sft_rows(files: str | os.PathLike[str] | Sequence[str]) -> SftRows:
    """All rows of the files.

    Raises:
        ConfigError: a file is missing, is no parquet, has other columns, or a row breaks the format.
    """
    rows = SftRows()
    for name in file_list(files):
        rows.add_file(name)
    return rows


def _read_table(path: str) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {error}") from error
    for field in SCHEMA:
        if field.name not in table.column_names:
            raise ConfigError(f"{path}: column {field.name} is missing; it has {', '.join(table.column_names)}")
        found = table.schema.field(field.name).type
        try:
            cast = table[field.name].cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ConfigError(f"{path}, column {field.name}: {found}, expected {field.type} ({error})") from error
        if not field.type.equals(pa.string()):
            row = next((i for i, entry in enumerate(cast) if not entry.is_valid or entry.values.null_count), None)
            if row is not None:
                raise ConfigError(f"{path}, row {row}, column {field.name}: a value is missing")
        table = table.set_column(table.column_names.index(field.name), field, cast)
    if not table.num_rows:
        raise ConfigError(f"{path} has no rows")
    return table


def _arrays(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Every row's values, without a copy."""
    for chunk in column.chunks:
        yield from (entry.values.to_numpy() for entry in chunk)


class TokenRows(torch.utils.data.Dataset):
    """Rows of :data:`SCHEMA` as verl's SFT trainer takes them; for its ``data.custom_cls``.

    verl's loss shifts ``loss_mask`` left by one over the packed sequences, so that entry t stands beside the
    log-probability of token t: the tokens with 1 are exactly those trained on.
    """

    def __init__(
        self,
        parquet_files: str | Sequence[str],
        tokenizer: Any,
        config: Any,
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        """``config`` is verl's ``data`` block, of which ``pad_mode`` and ``max_length`` are read; ``max_samples`` keeps
        the first so many rows.

        Raises:
            ConfigError: a file or row breaks the format, a sequence is longer than ``data.max_length``, or
                ``data.pad_mode`` is not ``no_padding``.
        """
        if config["pad_mode"] != "no_padding":
            raise ConfigError(f"data.pad_mode is {config['pad_mode']!r}; allowed: no_padding")
        self.rows = read_sft_rows(parquet_files)
        self.rows.check(max_length=config["max_length"])
        self._count = min(len(self.rows), max_samples) if max_samples > 0 else len(self.rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """int64 [T] each: ``input_ids``, ``position_ids`` from 0, ``loss_mask``."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        ids = torch.from_numpy(self.rows.input_ids[index].astype(np.int64))
        return {
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "loss_mask": torch.from_numpy(self.rows.loss_mask[index].astype(np.int64)),
        }
