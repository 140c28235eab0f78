"""The row format of fine-tuning: what is written is read, and what breaks it is named by file, row and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.config_values import ConfigError
from verl_ext.sft_rows import ROWS_PER_GROUP, SCHEMA, TokenRows, read_sft_rows, write_sft_rows

ROW = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1], "kind": "revision", "question_id": "q"}
DATA = {"pad_mode": "no_padding", "max_length": 8}


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    return [
        {**ROW, "input_ids": list(range(n)), "loss_mask": [0] + [1] * (n - 1), "question_id": f"q{n}"} for n in lengths
    ]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=2, max_size=9), min_size=1))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, sequences: list[Any]) -> None:
    rows = []
    for sequence in sequences:
        mask = [0, 1, *(int(trained) for _, trained in sequence[2:])]
        rows.append({**ROW, "input_ids": [token for token, _ in sequence], "loss_mask": mask})
    path = tmp_path_factory.mktemp("rows") / "x.parquet"
    assert write_sft_rows(path, iter(rows)) == len(rows)
    found = read_sft_rows([str(path), str(path)])
    assert [ids.tolist() for ids in found.input_ids] == 2 * [row["input_ids"] for row in rows]
    assert [mask.tolist() for mask in found.loss_mask] == 2 * [row["loss_mask"] for row in rows]
    assert found.kinds == 2 * ["revision"] * len(rows) and found.trained() == 2 * sum(sum(r["loss_mask"]) for r in rows)
    assert pq.read_schema(path).remove_metadata() == SCHEMA


def test_many_rows_are_written_in_groups_and_a_row_knows_its_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    count = ROWS_PER_GROUP + 3
    assert write_sft_rows(first, (ROW for _ in range(count))) == count
    write_sft_rows(second, rows_of([2, 4]))
    found = read_sft_rows([first, second])
    assert len(found) == count + 2 and found.where(0) == f"{first}, row 0"
    assert found.where(count - 1) == f"{first}, row {count - 1}" and found.where(count + 1) == f"{second}, row 1"
    assert pq.ParquetFile(first).num_row_groups == 2 and found.lengths()[-2:].tolist() == [2, 4]


BROKEN = [
    ({"input_ids": [5]}, "column input_ids: 1 tokens; a sequence has at least 2"),
    ({"input_ids": [5, -1, 7]}, "column input_ids: -1 is no token number"),
    ({"loss_mask": [0, 1]}, "column loss_mask: 2 entries for 3 tokens"),
    ({"loss_mask": [0, 0, 2]}, "column loss_mask: 2; allowed: 0 and 1"),
    ({"loss_mask": [1, 0, 1]}, "column loss_mask: 1 at the first token, which nothing predicts"),
    ({"loss_mask": [0, 0, 0]}, "column loss_mask: no token is trained on"),
    ({"kind": ""}, "column kind: ''; expected text"),
    ({"question_id": None}, "column question_id: None; expected text"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_a_row_that_breaks_the_format_is_refused_on_both_ways(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(ConfigError, match=f"x.parquet, row 1, {message}"):
        write_sft_rows(path, [ROW, {**ROW, **change}])
    assert not list(tmp_path.iterdir()), "neither half a file nor a temporary one"
    pq.write_table(pa.Table.from_pylist([ROW, {**ROW, **change}], schema=SCHEMA), path)
    with pytest.raises(ConfigError, match=f"x.parquet, row 1, {message}"):
        read_sft_rows(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({key: value for key, value in ROW.items() if key != "kind"}, "row 0, column kind: missing"),
        ({**ROW, "weight": 1.0}, "row 0, column weight: not known"),
        ({**ROW, "input_ids": [0.5, 1.0, 2.0]}, "row 0, columns input_ids, loss_mask: expected two lists of whole"),
        ({**ROW, "input_ids": [1, 2, 2**31]}, "row 0, column input_ids: 2147483648 is no token number"),
    ],
)
def test_only_the_format_is_written(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        write_sft_rows(tmp_path / "x.parquet", [row])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no rows to write"):
        write_sft_rows(tmp_path / "x.parquet", [])
    with pytest.raises(ConfigError, match="missing.parquet does not exist"):
        read_sft_rows(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="text.parquet cannot be read as parquet"):
        read_sft_rows(tmp_path / "text.parquet")
    table = pa.Table.from_pylist([ROW], schema=SCHEMA)
    pq.write_table(table.drop_columns("kind"), tmp_path / "short.parquet")
    with pytest.raises(ConfigError, match="short.parquet: column kind is missing; it has input_ids, loss_mask"):
        read_sft_rows(tmp_path / "short.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ConfigError, match="empty.parquet has no rows"):
        read_sft_rows(tmp_path / "empty.parquet")
    pq.write_table(table.set_column(0, "input_ids", pa.array(["text"])), tmp_path / "text.parquet")
    with pytest.raises(ConfigError, match="text.parquet, column input_ids: string, expected list"):
        read_sft_rows(tmp_path / "text.parquet")
    holes = pa.array([[5, None, 7]], type=pa.list_(pa.int32()))
    pq.write_table(table.set_column(0, "input_ids", holes), tmp_path / "holes.parquet")
    with pytest.raises(ConfigError, match="holes.parquet, row 0, column input_ids: a value is missing"):
        read_sft_rows(tmp_path / "holes.parquet")


def test_wider_integers_are_read_as_they_are(tmp_path: Path) -> None:
    schema = pa.schema([("input_ids", pa.large_list(pa.int64())), ("loss_mask", pa.list_(pa.int64()))])
    schema = schema.append(pa.field("kind", pa.string())).append(pa.field("question_id", pa.string()))
    pq.write_table(pa.Table.from_pylist([ROW], schema=schema), tmp_path / "x.parquet")
    found = read_sft_rows(tmp_path / "x.parquet")
    assert found.input_ids[0].dtype == np.int32 and found.loss_mask[0].tolist() == [0, 0, 1]


def test_a_data_set_item_is_what_verl_s_own_data_set_gives(tmp_path: Path) -> None:
    write_sft_rows(tmp_path / "x.parquet", rows_of([3, 8, 2]))
    data = TokenRows([str(tmp_path / "x.parquet")], tokenizer=None, config=DATA)
    assert len(data) == 3 and len(TokenRows(str(tmp_path / "x.parquet"), None, DATA, max_samples=2)) == 2
    item = data[0]
    assert set(item) == {"input_ids", "position_ids", "loss_mask"}
    assert all(value.dtype == torch.int64 and value.shape == (3,) for value in item.values())
    assert item["position_ids"].tolist() == [0, 1, 2] and item["loss_mask"].tolist() == [0, 1, 1]
    with pytest.raises(IndexError):
        data[3]


def test_a_sequence_is_never_cut(tmp_path: Path) -> None:
    write_sft_rows(tmp_path / "x.parquet", rows_of([8, 9]))
    message = r"x.parquet, row 1, column input_ids: 9 tokens; allowed: up to 8 \(a sequence is never cut"
    with pytest.raises(ConfigError, match=message):
        TokenRows(str(tmp_path / "x.parquet"), None, DATA)
    with pytest.raises(ConfigError, match="data.pad_mode is 'right'; allowed: no_padding"):
        TokenRows(str(tmp_path / "x.parquet"), None, {**DATA, "pad_mode": "right"})
    with pytest.raises(ConfigError, match="x.parquet, row 1, column input_ids: token 8; the model has 8 tokens"):
        read_sft_rows(tmp_path / "x.parquet").check(vocabulary=8)
