"""Tool use: rows of SDPO's and of ToolAlpaca's files."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from data_prep import tooluse
from data_prep.prompts import TOOL_USE
from verl_ext.verifiers.tool_use import compute_score

DOCUMENTATION = 'getCat: A cat\nParameters: {"name": "Required. string. Its name."}\nOutput: Successful response.\n'
API = {"name": "Cats", "description": "All of them", "documentation": DOCUMENTATION}
GOLD = [{"Action": "getCat", "Action_Input": '{"name": "Tom"}'}]


def prompt(question="Show Tom"):
    return TOOL_USE.messages({**API, "question": question})[0]["content"]


def sdpo(number=1, **changes):
    row = {"prompt": prompt(f"Show Tom {number}"), "idx": number, "dataset": "tooluse", "system": None}
    return {**row, "answer": json.dumps(GOLD), "kind": "tooluse", **changes}


def toolalpaca(instructions, answers, **changes):
    return {
        "Name": "Cats",
        "Description": "All of them",
        "NLDocumentation": DOCUMENTATION,
        "Instructions": instructions,
        "Golden_Answers": answers,
        **changes,
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source, out, *options):
    return tooluse.run(["--out", str(out), "--source", str(source), *options])


def rows_of(folder, split="test"):
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def check_demonstration(row):
    result = compute_score(
        row["data_source"], row["extra_info"]["demonstration"], row["reward_model"]["ground_truth"], row["extra_info"]
    )
    assert (result["score"], result["format"], result["status"]) == (1.0, 1.0, "ok")


def test_rows_of_split_files(tmp_path, capsys):
    write(tmp_path / "in" / "train.json", [sdpo(1), sdpo(2, system="Be brief.")])
    write(tmp_path / "in" / "test.json", [sdpo(3)])
    assert run(tmp_path / "in", tmp_path / "out") == 0
    first, second = rows_of(tmp_path / "out", "train")
    assert first["prompt"] == [{"role": "user", "content": prompt("Show Tom 1")}]
    assert second["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert first["reward_model"]["ground_truth"] == json.dumps(GOLD)
    assert first["extra_info"]["problem"] == "", "the bare question lacks the tools' documentation"
    assert first["extra_info"]["demonstration"] == 'Action: getCat\nAction Input: {"name": "Tom"}'
    assert (first["extra_info"]["api"], first["extra_info"]["gold_problem"], first["extra_info"]["idx"]) == (
        "Cats",
        "",
        1,
    )
    check_demonstration(first)
    (tmp_path / "in" / "train.json").unlink()
    assert run(tmp_path / "in", tmp_path / "test_only") == 0
    assert not (tmp_path / "test_only" / "train.parquet").exists()
    assert "note: the source has no train split" in capsys.readouterr().out


def test_rows_whose_gold_answer_contradicts_the_prompt(tmp_path, capsys):
    unlisted = json.dumps([{"Action": "getDog", "Action_Input": "{}"}])
    source = write(tmp_path / "test.json", [sdpo(1), sdpo(2, answer=unlisted)])
    assert run(source, tmp_path / "all") == 0
    problems = [row["extra_info"]["gold_problem"] for row in rows_of(tmp_path / "all")]
    assert problems == ["", "calls 'getDog', which is not in the tool list"]
    assert manifest_of(tmp_path / "all")["gold_problems"] == {"test": 1}
    assert "note: 1 test rows have a gold answer that cannot be derived" in capsys.readouterr().out
    assert run(source, tmp_path / "some", "--leave-out-unsolvable") == 0
    assert [row["extra_info"]["idx"] for row in rows_of(tmp_path / "some")] == [1]
    (entry,) = manifest_of(tmp_path / "some")["counts"]["left_out"]
    assert (entry["count"], entry["examples"]) == (1, [f"{source}, row 2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "getCat"}, "field 'answer': found getCat… ("),
        ({"answer": "[]"}, "field 'answer': found []"),
        ({"answer": json.dumps([{"Action": "getCat", "Action_Input": "{"}])}, "field 'answer'"),
        ({"answer": json.dumps([{"Action": "getCat"}])}, "field 'answer'"),
        ({"answer": GOLD}, "field 'answer': found [{'Action': 'getCat'"),
        ({"answer": None}, "field 'answer': found None (NoneType); expected a JSON list of {"),
        ({"prompt": "Do it"}, "field 'prompt': found 'Do it' (str); expected a text that starts with"),
        ({"prompt": ""}, "field 'prompt': found ''"),
        ({"idx": "first"}, "field 'idx': found 'first' (str); expected a whole number"),
        ({"system": 3}, "field 'system': found 3 (int)"),
        ({"kind": "mcq"}, "field 'kind': found 'mcq' (str); expected tooluse"),
    ],
)
def test_broken_rows(tmp_path, capsys, changes, message):
    source = write(tmp_path / "test.json", [sdpo(1), sdpo(2, **changes)])
    assert run(source, tmp_path / "out") == 1
    assert f"{source}, row 2, {message}" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", "--on-error", "skip") == 0
    assert len(rows_of(tmp_path / "out")) == 1


def test_toolalpaca_files(tmp_path, capsys):
    reference = [*GOLD, {"Action": "getCat", "Action_Input": '{"name": ${name from getCat}}'}]
    broken = [{"Action": "getCat", "Action_Input": '{"name": "a": "b"}'}]
    path = tmp_path / "eval_real.json"
    path.write_text(json.dumps([toolalpaca(["Show Tom", "More", "Odd"], [GOLD, reference, broken])]))
    assert run(path, tmp_path / "out") == 1 and "--source SPLIT=PATH for each" in capsys.readouterr().err
    assert run(f"test={path}", tmp_path / "out") == 1
    assert f"{path}, row 1, field 'Golden_Answers': found [" in capsys.readouterr().err
    assert run(f"test={path}", tmp_path / "out", "--on-error", "skip") == 0
    (row,) = rows_of(tmp_path / "out")
    assert row["prompt"] == [{"role": "user", "content": prompt()}]
    check_demonstration(row)
    counts = manifest_of(tmp_path / "out")["counts"]
    assert (counts["records_read"], counts["rows_made"]) == ({"test": 1}, 3)
    assert {entry["reason"]: entry["count"] for entry in counts["left_out"]} == {
        "broken field 'Golden_Answers'": 1,
        "the gold answer uses the result of an earlier call": 1,
    }
    path.write_text(json.dumps([toolalpaca(["a", "b"], [GOLD])]))
    assert run(f"test={path}", tmp_path / "no") == 1
    assert "field 'Golden_Answers': found [[{" in capsys.readouterr().err


def test_the_whole_test_set(real_data, tmp_path):
    assert run(real_data / "tooluse", tmp_path / "sdpo") == 0
    rows = rows_of(tmp_path / "sdpo")
    assert len(rows) == 68 and [row["extra_info"]["idx"] for row in rows] == list(range(4046, 4114))
    assert len({row["extra_info"]["api"] for row in rows}) == 10
    assert sum(bool(row["extra_info"]["gold_problem"]) for row in rows) == 8
    for row in rows:
        check_demonstration(row)
    simulated = real_data / "tooluse" / "toolalpaca_eval_simulated.json"
    assert run(f"test={simulated}", tmp_path / "simulated") == 0
    prompts = {row["extra_info"]["question_id"]: row["prompt"] for row in rows_of(tmp_path / "simulated")}
    assert len(prompts) == 69, "the 68 rows and one whose password holds a dollar sign"
    assert all(prompts[row["extra_info"]["question_id"]] == row["prompt"] for row in rows)
