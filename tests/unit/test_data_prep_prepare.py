"""From records to files: counts, options, bytes, errors; prompt presets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import gsm8k, pipeline, prepare, progress, prompts, schema, staging
from data_prep.prepare import DataSet, Draft, Hub, LeftOut, RowError, main
from data_prep.sources import open_source


def convert(record, settings):
    if record.fields.get("skip"):
        raise LeftOut("marked to skip")
    if record.fields.get("odd"):
        raise ValueError("an odd row")
    many = record.integer("many") if record.has("many") else 1
    drafts = [
        Draft(
            fields={"problem": record.text("problem") + "!" * place},
            ground_truth=record.text_or_number("answer"),
            key=record.text("key", empty=True) or None,
            extra={"tags": []},
        )
        for place in range(many)
    ]
    return drafts[0] if many == 1 else drafts


TOY = DataSet(
    name="toy",
    about="A toy with 100% of what is needed.",
    hub=Hub(""),
    convert=convert,
    prompts=prompts.MATH_PRESETS,
    verifier="verl_ext.verifiers.math_answer:compute_score",
    extra_fields={"tags": pa.list_(pa.string())},
)


@pytest.fixture
def run(tmp_path, capsys):
    """run(rows, *options) -> (exit status, output folder, stdout, stderr); rows is a list or split -> list."""

    def run_it(rows, *options, dataset=TOY, out="out"):
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for split, of_split in (rows if isinstance(rows, dict) else {"train": rows}).items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
        arguments = ["--out", str(tmp_path / out), "--source", str(folder), *options]
        status = main(dataset, arguments)
        return status, tmp_path / out, *capsys.readouterr()

    return run_it


def q(name, answer="1", **fields):
    return {"problem": name, "answer": answer, **fields}


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text())


def test_files_rows_and_manifest(run):
    status, out, stdout, stderr = run({"train": [q("a {problem}", 5), q("b")], "test": [q("c")]}, "--prompt", "opsd")
    assert (status, stderr) == (0, "") and sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "test.parquet",
        "train.parquet",
    ]
    rows = pq.read_table(out / "train.parquet").to_pylist()
    for index, row in enumerate(rows):
        schema.check_row(row)
        assert row["extra_info"]["index"] == index and row["extra_info"]["split"] == "train"
    assert rows[0]["prompt"] == [
        {
            "role": "user",
            "content": "Problem: a {problem}\n\n"
            "Please reason step by step, and put your final answer within \\boxed{}.",
        }
    ]
    assert (rows[0]["data_source"], rows[0]["ability"], rows[0]["reward_model"]) == (
        "toy",
        "math",
        {"style": "rule", "ground_truth": "5"},
    )
    assert sorted(rows[0]["extra_info"]) == [
        "demonstration",
        "index",
        "problem",
        "question_id",
        "solution",
        "split",
        "tags",
    ]
    assert [row["extra_info"]["problem"] for row in rows] == ["a {problem}", "b"]
    manifest = manifest_of(out)
    assert manifest["counts"] == {
        "records_read": {"train": 2, "test": 1},
        "rows_made": 3,
        "rows_written": {"train": 2, "test": 1},
        "left_out": [],
    }
    assert manifest["prompt"]["preset"] == "opsd" and "{problem}" in manifest["prompt"]["user"]
    assert manifest["options"] == {"on_error": "fail", "limit": None, "seed": None}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert pq.read_schema(out / "train.parquet").equals(pq.read_schema(out / "test.parquet"))
    assert pq.read_schema(out / "train.parquet").field("extra_info").type.field("tags").type == pa.list_(pa.string())
    assert "  train            2  " in stdout and "  test             1  " in stdout


def test_a_second_run_gives_the_same_bytes(run):
    rows = {"train": [q(f"question {i}", i) for i in range(100)], "test": [q("z")]}
    _, one, *_ = run(rows, out="one")
    _, two, *_ = run(rows, out="two")
    before = {path.name: path.read_bytes() for path in one.iterdir()}
    assert len(before) == 3 and before == {path.name: path.read_bytes() for path in two.iterdir()}
    run(rows, out="one")
    assert before == {path.name: path.read_bytes() for path in one.iterdir()}


BROKEN = [q("a"), {"problem": "b"}, {"problem": 3, "answer": "1"}, q("c", None), q("d", skip=1), q("e", odd=1), q("f")]


def test_a_broken_row_stops_before_anything_is_written(run, tmp_path):
    status, out, stdout, stderr = run(BROKEN)
    assert (status, stdout) == (1, "") and not out.exists()
    assert stderr == (
        f"python -m data_prep.toy: {tmp_path}/in/train.jsonl, row 2, field 'answer': found no such field (there are "
        "problem); expected a text or a number\n"
    )
    status, out, _, stderr = run([q("a"), q("e", odd=1)])
    assert status == 1 and not out.exists() and "row 2: found an odd row; expected" in stderr


def test_broken_rows_are_left_out_counted_and_listed_on_demand(run):
    status, out, stdout, stderr = run([*BROKEN, *[q("x", []) for _ in range(9)]], "--on-error", "skip")
    assert (status, stderr) == (0, "")
    counts = manifest_of(out)["counts"]
    assert counts["records_read"] == {"train": 16} and counts["rows_written"] == {"train": 2}
    left_out = {entry["reason"]: entry for entry in counts["left_out"]}
    assert {reason: entry["count"] for reason, entry in left_out.items()} == {
        "broken field 'answer'": 11,
        "broken field 'problem'": 1,
        "broken row": 1,
        "marked to skip": 1,
    }
    assert len(left_out["broken field 'answer'"]["examples"]) == pipeline.MAX_EXAMPLES
    assert "field 'problem': found 3 (int); expected a text" in left_out["broken field 'problem'"]["examples"][0]
    assert "left out        11  broken field 'answer'" in stdout and "and 6 more" in stdout
    assert "row 2, field 'answer'" in stdout and "row 3, field 'problem'" in stdout


def test_no_rows_left_is_an_error(run):
    status, out, _, stderr = run([{"problem": "b"}] * 3, "--on-error", "skip")
    assert status == 1 and not out.exists() and "no rows are left of 3 read (broken field 'answer': 3)" in stderr
    status, out, _, stderr = run([])
    assert status == 1 and "no rows are left of 0 read (nothing was read)" in stderr


def test_a_file_that_cannot_be_read_fails_even_where_rows_are_skipped(tmp_path, capsys):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 no")
    options = ["--out", str(tmp_path / "out"), "--source", str(path), "--on-error", "skip"]
    assert main(TOY, options) == 1 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and f"{path}: found a file that cannot be read as parquet" in message


def test_limit(run):
    rows = {"train": [q(f"{i}", many=2) for i in range(9)], "test": [q("a"), q("b")]}
    _, out, *_ = run(rows, "--limit", "3")
    counts = manifest_of(out)["counts"]
    assert counts["records_read"] == {"train": 2, "test": 2} and counts["rows_written"] == {"train": 3, "test": 2}
    assert counts["left_out"][0]["reason"] == "beyond --limit 3" and counts["left_out"][0]["count"] == 1
    for wrong in ("0", "-1", "x"):
        with pytest.raises(SystemExit):
            run(rows, "--limit", wrong)


def test_repeated_questions(run):
    rows = {
        "train": [q("a", key="k"), q("a", key="k"), q("b", "2", key="k"), q("c"), q("c")],
        "test": [q("c", key="k")],
    }
    _, out, stdout, _ = run(rows)
    manifest = manifest_of(out)
    assert {entry["reason"]: entry["count"] for entry in manifest["counts"]["left_out"]} == {
        "repeated question": 1,
        "repeated question with another answer": 1,
    }
    assert "row 2 (first: " in manifest["counts"]["left_out"][0]["examples"][0]
    assert manifest["repeated_questions"] == {"train": 1, "test": 0, "test_also_in_train": 1}
    assert "note: 1 repeated (test_also_in_train)" in stdout


def test_arrange_facts_options_and_seed(run):
    def arrange(drafts, settings):
        for place, draft in enumerate(drafts):
            draft.split = "test" if place < settings.options["tests"] else "train"
            draft.left_out = "the last" if place == len(drafts) - 1 else ""
        return drafts[::-1]

    dataset = replace(
        TOY,
        arrange=arrange,
        seed=3,
        add_options=lambda parser: parser.add_argument("--tests", type=int, default=1),
        facts=lambda drafts, settings: {"first": drafts[0].where, "notes": [f"seed {settings.seed}"]},
    )
    _, out, stdout, _ = run([q(name) for name in "abcd"], "--tests", "2", "--seed", "4", dataset=dataset)
    manifest = manifest_of(out)
    assert manifest["counts"]["rows_written"] == {"train": 1, "test": 2}
    assert manifest["options"]["tests"] == 2 and manifest["options"]["seed"] == 4
    assert manifest["first"].endswith("row 4") and manifest["notes"] == ["the source has no test split", "seed 4"]
    assert "note: seed 4" in stdout
    problems = [row["prompt"][0]["content"][0] for row in pq.read_table(out / "test.parquet").to_pylist()]
    assert problems == ["b", "a"]
    with pytest.raises(RuntimeError, match="every draft once"):
        run([q("a"), q("b")], dataset=replace(TOY, arrange=lambda drafts, settings: drafts[1:]))
    with pytest.raises(RuntimeError, match="found the split 'elsewhere'"):
        run([q("a")], dataset=replace(TOY, convert=lambda r, s: Draft({"problem": "a"}, "1", split="elsewhere")))


def test_one_broken_question_among_several_of_a_record(run):
    def several(record, settings):
        good = Draft({"problem": record.text("problem")}, "1", extra={"tags": ["x"]})
        return [good, record.error("answer", "another"), replace(good, left_out="too hard")]

    dataset = replace(TOY, convert=several)
    status, _, _, stderr = run([q("a")], dataset=dataset)
    assert status == 1 and "field 'answer': found '1' (str); expected another" in stderr
    status, out, *_ = run([q("a")], "--on-error", "skip", dataset=dataset)
    counts = manifest_of(out)["counts"]
    assert status == 0 and counts["rows_made"] == 3 and counts["rows_written"] == {"train": 1}
    assert [entry["reason"] for entry in counts["left_out"]] == ["broken field 'answer'", "too hard"]


def test_several_data_sets_in_one_command(run):
    def parts(options):
        return {name: replace(TOY, name=f"toy_{name}") for name in ("one", "two")}

    status, out, stdout, _ = run([q("a")], dataset=replace(TOY, parts=parts))
    assert status == 0 and manifest_of(out / "one")["data_set"] == "toy_one"
    assert pq.read_table(out / "two" / "train.parquet").to_pylist()[0]["data_source"] == "toy_two"
    assert stdout.count("manifest.json") == 2


@pytest.mark.parametrize("failing", ["write_parquet", "hash", "manifest", "rename", "keyboard"])
def test_an_interrupted_run_leaves_the_earlier_files_or_nothing(run, monkeypatch, failing):
    rows = {"train": [q("a")], "test": [q("b")]}

    def fail(*_, **__):
        raise KeyboardInterrupt if failing == "keyboard" else OSError("disk\nfull")

    def interrupt():
        if failing == "write_parquet":
            calls = []
            real = pipeline.write_typed_parquet
            monkeypatch.setattr(
                pipeline, "write_typed_parquet", lambda *args: fail() if calls else (calls.append(1), real(*args))
            )
        elif failing == "rename":
            monkeypatch.setattr(staging.Staging, "publish", fail)
        else:
            names = {"hash": "sha256_of", "manifest": "json_text", "keyboard": "json_text"}
            monkeypatch.setattr(pipeline, names[failing], fail)

    with monkeypatch.context() as patched:
        monkeypatch, outer = patched, monkeypatch
        interrupt()
        status, out, stdout, stderr = run(rows)
        monkeypatch = outer
    assert status == (130 if failing == "keyboard" else 1) and stdout == "" and len(stderr.splitlines()) == 1
    assert not out.exists() or not list(out.iterdir())
    assert failing == "keyboard" or "disk full" in stderr
    run(rows)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    interrupt()
    run({"train": [q("c")], "test": [q("d")]})
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after == {name: data for name, data in before.items() if name in after}
    # Where the rename itself fails, the old manifest is gone: it must not describe a mixture.
    assert set(before) - set(after) == ({"manifest.json"} if failing == "rename" else set())


def test_files_of_an_earlier_run_do_not_stay_beside_new_ones(run):
    run({"train": [q("a")], "test": [q("b")]})
    status, out, _, stderr = run({"test": [q("c")]})
    assert status == 1 and "train.parquet is there, and this run has no train rows" in stderr
    assert len(manifest_of(out)["files"]) == 2


def test_lost_rows_are_a_fault():
    accounts = pipeline.Accounts()
    accounts.read["train"] += 1
    with pytest.raises(RuntimeError, match="lost without a reason"):
        accounts.check()
    accounts.leave_out("why", "where", record=True)
    accounts.check()
    accounts.made += 1
    with pytest.raises(RuntimeError, match="lost"):
        accounts.check()


def test_wrong_types_and_undeclared_fields_are_refused(run):
    for extra, message in (({"tags": 3}, "rows 0 to 0: "), ({"tags": [], "more": 1}, "declared"), ({}, "declared")):
        dataset = replace(TOY, convert=lambda r, s, extra=extra: Draft({"problem": "a"}, "1", extra=extra))
        status, out, _, stderr = run([q("a")], dataset=dataset)
        assert status == 1 and "train.parquet" in stderr and message in stderr and not list(out.iterdir())
    status, _, _, stderr = run([q("a")], dataset=replace(TOY, convert=lambda r, s: Draft({}, "1")))
    assert status == 1 and "row 1: prompt 'boxed' asks for 'problem'; the question has []" in stderr


def test_progress_is_said_on_long_work(run, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    _, _, _, stderr = run([q("a"), q("b")])
    assert "toy: records read: 1 in 0 s" in stderr


def test_the_number_of_records_is_known_where_no_file_must_be_read_for_it(tmp_path):
    pq.write_table(pa.table({"a": [1, 2, 3]}), tmp_path / "train.parquet")
    assert open_source([str(tmp_path / "train.parquet")], TOY.hub).total == 3
    (tmp_path / "test.jsonl").write_text("{}\n")
    assert open_source([str(tmp_path)], TOY.hub).total is None
    (tmp_path / "train.parquet").write_bytes(b"none")
    assert open_source([str(tmp_path / "train.parquet")], TOY.hub).total is None


def test_time_left_is_said_where_the_total_is_known(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=iter([0.0, 0.0, 30.0, 90.0]).__next__))
    with progress.ProgressLine() as say:
        for done in (0, 1, 3):
            say("rows", done, 4)
    assert capsys.readouterr().err.splitlines() == [
        "rows: 0 of 4",
        "rows: 1 of 4, about 90 s left",
        "rows: 3 of 4, about 30 s left",
    ]


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        main(TOY, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0 and "A toy with 100% of what is needed." in text and "--seed" not in text
    with pytest.raises(SystemExit):
        main(TOY, ["--out", "x"])
    assert "--source" in capsys.readouterr().err
    text = prepare.build_parser(gsm8k.DATA_SET).format_help()
    assert "openai/gsm8k, config main" in " ".join(text.split())


# Prompts


def test_templates_keep_braces_and_do_not_nest():
    preset = prompts.Preset("x", "here", "{a} {b} \\boxed{} {A}", system="{b}")
    assert preset.messages({"a": "{b}", "b": "{a}{}"}) == [
        {"role": "system", "content": "{a}{}"},
        {"role": "user", "content": "{b} {a}{} \\boxed{} {A}"},
    ]
    with pytest.raises(ValueError, match="asks for 'b'"):
        preset.messages({"a": "1"})


def test_prompts_of_the_papers():
    def text(preset, **fields):
        return preset.messages(fields)[-1]["content"]

    ask = "Please reason step by step, and put your final answer within \\boxed{}."
    assert text(prompts.MATH_BOXED, problem="P") == "P\n\n" + ask
    assert text(prompts.OPSD, problem="P") == "Problem: P\n\n" + ask
    assert text(prompts.PACED, problem="P") == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\nP\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    assert text(prompts.CODE, problem="P") == (
        "You are a coding expert. You will be given a coding problem, and you need to write a correct Python program "
        "that matches the specification and passes all tests. The time limit is 1 second. You may start by outlining "
        "your thought process. In the end, please provide the complete code in a code block enclosed with ``` ```.\n\nP"
    )


def test_the_number_of_options_is_the_rows_own():
    two = prompts.MULTIPLE_CHOICE.messages(prompts.option_fields("Q", "AB", ["x", "y"]))
    assert two[0]["content"].startswith("\nGiven a question and two options, please select the right answer. Respond")
    assert "correct option (A or B), and nothing else" in two[0]["content"]
    assert two[1] == {"role": "user", "content": "Q\n\nA: x\nB: y\nPlease reason step by step."}
    four = prompts.option_fields("Q", "ABCD", "wxyz")
    own, sdpo = (p.messages(four) for p in (prompts.MULTIPLE_CHOICE, prompts.MULTIPLE_CHOICE_SDPO))
    assert own == sdpo
    assert "four options" in prompts.MULTIPLE_CHOICE_SDPO.messages(prompts.option_fields("Q", "AB", "xy"))[0]["content"]
    for labels, options in (("A", "x"), ("AB", "x"), ("ABCDEFGHIJK", "abcdefghijk")):
        with pytest.raises(ValueError, match="expected as many of both"):
            prompts.option_fields("Q", labels, options)


@pytest.mark.parametrize(
    ("preset", "solution", "expected"),
    [
        (prompts.MATH_BOXED, "1+1=2\n", "1+1=2\n\nThe final answer is $\\boxed{2}$."),
        (prompts.MATH_BOXED, "so \\boxed{2}.", "so \\boxed{2}."),
        (prompts.PACED, "1+1=2", "1+1=2\n\nAnswer: 2"),
        (prompts.PACED, "x\nAnswer: 2", "x\nAnswer: 2"),
        (prompts.MULTIPLE_CHOICE, "s", "<reasoning>\ns\n</reasoning>\n<answer>\n2\n</answer>"),
        (prompts.PLAIN, " s ", "s"),
        (prompts.MATH_BOXED, " \n", ""),
        (prompts.CODE, "", ""),
    ],
)
def test_worked_responses(preset, solution, expected):
    assert prompts.worked_response(preset, solution, "2") == expected


def test_no_general_response_for_code():
    with pytest.raises(ValueError, match="code_block"):
        prompts.worked_response(prompts.CODE, "s", "2")
    assert RowError("f, row 1", None, "x", "y").reason == "broken row"
