"""GSM8K and AIME 2024."""

from __future__ import annotations

import importlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import aime24, gsm8k, sciknoweval, tooluse


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(module, source, out, *options):
    return module.run(["--out", str(out), "--source", str(source), *options])


def rows_of(folder, split):
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


ROW = {"question": " How many? ", "answer": "It is 2 * 600 = $<<2*600=1200>>1,200.\nDone.\n#### 1,200"}


def test_gsm8k_rows(tmp_path):
    write(tmp_path / "in" / "train.jsonl", [ROW])
    write(tmp_path / "in" / "test.jsonl", [{**ROW, "answer": "#### -0.5"}])
    assert run(gsm8k, tmp_path / "in", tmp_path / "out") == 0
    (row,) = rows_of(tmp_path / "out", "train")
    assert row["data_source"] == "gsm8k" and row["reward_model"] == {"style": "rule", "ground_truth": "1200"}
    assert row["prompt"][0]["content"] == (
        "How many?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert row["extra_info"]["problem"] == "How many?"
    assert row["extra_info"]["solution"] == "It is 2 * 600 = $1,200.\nDone."
    assert row["extra_info"]["demonstration"].endswith("Done.\n\nThe final answer is $\\boxed{1200}$.")
    (test,) = rows_of(tmp_path / "out", "test")
    assert (test["reward_model"]["ground_truth"], test["extra_info"]["demonstration"]) == ("-0.5", "")
    assert run(gsm8k, tmp_path / "in", tmp_path / "marks", "--calculator-marks", "--prompt", "paced") == 0
    (row,) = rows_of(tmp_path / "marks", "train")
    assert "<<2*600=1200>>" in row["extra_info"]["solution"]
    assert row["extra_info"]["demonstration"].endswith("\n\nAnswer: 1200")


@pytest.mark.parametrize(
    "answer", ["It is 5", "#### ", "#### five", "#### 1,20", "#### 5\nmore", "#### 1/2", 5, None, ""]
)
def test_gsm8k_unknown_answers(tmp_path, capsys, answer):
    source = write(tmp_path / "train.jsonl", [ROW, {**ROW, "answer": answer}])
    assert run(gsm8k, source, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"{source}, row 2, field 'answer': found {answer!r}" in message
    assert "expected a worked solution that ends in a line '#### NUMBER'" in message
    assert run(gsm8k, source, tmp_path / "out", "--on-error", "skip") == 0
    assert len(rows_of(tmp_path / "out", "train")) == 1


def test_gsm8k_missing_columns(tmp_path, capsys):
    source = write(tmp_path / "train.jsonl", [{"answer": "#### 1"}])
    assert run(gsm8k, source, tmp_path / "out") == 1
    assert "row 1, field 'question': found no such field (there are answer)" in capsys.readouterr().err


@pytest.mark.parametrize("module", [gsm8k, aime24, tooluse, sciknoweval])
def test_the_named_verifier_exists(module):
    dataset = getattr(module, "DATA_SET", None) or module.COMMAND
    path, function = dataset.verifier.split(":")
    assert callable(getattr(importlib.import_module(path), function))


def test_gsm8k_whole(real_data, tmp_path):
    assert run(gsm8k, real_data / "gsm8k", tmp_path) == 0
    for split, size in (("train", 7473), ("test", 1319)):
        rows = rows_of(tmp_path, split)
        assert len(rows) == size == len({row["extra_info"]["question_id"] for row in rows})
        for row in rows:
            truth, solution = row["reward_model"]["ground_truth"], row["extra_info"]["solution"]
            assert truth.lstrip("-").replace(".", "", 1).isdecimal() and solution
            assert "<<" not in solution and "####" not in solution
            assert f"\\boxed{{{truth}}}" in row["extra_info"]["demonstration"]


def test_aime24_both_schemas(tmp_path):
    problem = {"problem": "P", "solution": "S \\boxed{25}"}
    qwen = write(tmp_path / "aime24.jsonl", [{"id": 60, **problem, "answer": "025", "url": "u", "question": "P"}])
    hub = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": 60, **problem, "answer": 25, "year": "2024"}]), hub)
    assert run(aime24, qwen, tmp_path / "one") == 0 and run(aime24, hub, tmp_path / "two") == 0
    (row,) = rows_of(tmp_path / "one", "test")
    assert [row] == rows_of(tmp_path / "two", "test")
    assert row["reward_model"]["ground_truth"] == "25" and row["extra_info"]["id"] == "60"
    assert row["extra_info"]["demonstration"] == row["extra_info"]["solution"] == "S \\boxed{25}"
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["manifest.json", "test.parquet"]


@pytest.mark.parametrize("answer", ["1000", "-1", "2.5", 2.5, "", None, "x", [25], "٣"])
def test_aime24_unknown_answers(tmp_path, capsys, answer):
    source = write(tmp_path / "a.jsonl", [{"problem": "P", "answer": "7"}, {"problem": "P", "answer": answer}])
    assert run(aime24, source, tmp_path / "out") == 1
    assert f"{source}, row 2, field 'answer': found {answer!r}" in capsys.readouterr().err
    assert run(aime24, source, tmp_path / "out", "--on-error", "skip") == 0
    (row,) = rows_of(tmp_path / "out", "test")
    assert (row["extra_info"]["solution"], row["extra_info"]["id"]) == ("", "")


def test_aime24_whole(real_data, tmp_path):
    assert run(aime24, real_data / "aime", tmp_path) == 0
    rows = rows_of(tmp_path, "test")
    assert len(rows) == 30 == len({row["extra_info"]["question_id"] for row in rows})
    assert [row["reward_model"]["ground_truth"] for row in rows][:8] == [
        "204",
        "113",
        "371",
        "385",
        "110",
        "104",
        "721",
        "25",
    ]
    assert all(row["extra_info"]["solution"] for row in rows)
