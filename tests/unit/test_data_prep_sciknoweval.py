"""SciKnowEval: which rows are taken, prompts, the split of the SDPO repository."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from data_prep import sciknoweval
from data_prep.sciknoweval import split_options
from verl_ext.verifiers.multiple_choice import compute_score

SIZES = {"biology": (450, 50), "chemistry": (1890, 210), "material": (841, 94), "physics": (720, 80)}


def raw(number, domain="Physics", kind="mcq-4-choices", level="L3", answer="B", **changes):
    labels = ["A", "B", "C", "D"][: 2 if kind == "mcq-2-choices" else 4]
    return {
        "question": f"Question {number}?",
        "choices": {"text": [f"option {number} {label}" for label in labels], "label": labels},
        "answerKey": answer,
        "type": kind,
        "domain": domain,
        "details": {"level": level, "task": "general_physics_calculation", "subtask": "general_physics_calculation"},
        "answer": "",
        **changes,
    }


def sdpo(number, labels="ABCD", **changes):
    options = "\n".join(f"{label}: option {number} {label}" for label in labels)
    prompt = f"Question {number}?\n\n{options}\nPlease reason step by step."
    return {"idx": number, "kind": "mcq", "dataset": "sciknoweval", "answer": "B", "prompt": prompt, **changes}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source, out, *options):
    return sciknoweval.run(["--out", str(out), "--source", str(source), *options])


def rows_of(folder, split):
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_levels_types_and_domains_are_counted(tmp_path, capsys):
    rows = [
        *[raw(i) for i in range(30)],
        raw(90, level="L5"),
        raw(91, kind="true_or_false", choices={"text": [], "label": []}, answerKey=""),
        raw(92, kind="filling", choices=None),
        raw(93, domain="Biology"),
    ]
    write(tmp_path / "raw" / "Physics" / "a_test.jsonl", rows)
    assert run(tmp_path / "raw", tmp_path / "out", "--domain", "physics") == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["counts"]["records_read"] == {"all": 34}
    assert manifest["counts"]["rows_written"] == {"train": 27, "test": 3}
    assert {entry["reason"]: entry["count"] for entry in manifest["counts"]["left_out"]} == {
        "domain Biology": 1,
        "level L5": 1,
        "question type filling": 1,
        "question type true_or_false": 1,
    }
    assert manifest["split_of_sdpo"] is False and manifest["options"]["seed"] == 42
    assert "the split is not that of the SDPO repository" in capsys.readouterr().out


def test_rows(tmp_path):
    rows = [raw(i, kind="mcq-2-choices" if i % 2 else "mcq-4-choices") for i in range(20)]
    source = write(tmp_path / "a.jsonl", rows)
    assert run(source, tmp_path / "out", "--domain", "physics") == 0
    seen = Counter()
    for split in ("train", "test"):
        for row in rows_of(tmp_path / "out", split):
            info = row["extra_info"]
            system, user = (message["content"] for message in row["prompt"])
            two = len(info["choices"]) == 2
            seen[two] += 1
            assert info["choices"] == (["A", "B"] if two else ["A", "B", "C", "D"])
            assert ("two options" in system, "(A or B)" in system) == (two, two)
            assert ("four options" in system, "(A, B, C, or D)" in system) == (not two, not two)
            number = user.split()[1].strip("?")
            last = "B" if two else "D"
            assert user.startswith(f"Question {number}?\n\nA: option {number} A\n")
            assert user.endswith(f"\n{last}: option {number} {last}\nPlease reason step by step.")
            assert (row["data_source"], row["ability"], info["demonstration"]) == ("sciknoweval_physics", "science", "")
            right = compute_score(
                row["data_source"], "<answer>\nB\n</answer>", row["reward_model"]["ground_truth"], info
            )
            assert (right["score"], right["status"]) == (1.0, "ok")
    assert seen == {True: 10, False: 10}
    assert run(source, tmp_path / "sdpo", "--domain", "physics", "--prompt", "sdpo_verbatim") == 0
    assert all("four options" in row["prompt"][0]["content"] for row in rows_of(tmp_path / "sdpo", "train"))


def test_the_split_depends_on_seed_and_rows_but_not_on_files(tmp_path):
    names = sciknoweval.ORDER["chemistry"]
    rows = {
        name: [
            raw(f"{name} {i}", domain="Chemistry", details={"level": "L3", "task": name, "subtask": "x"})
            for i in range(10)
        ]
        for name in names
    }
    for place, name in enumerate(sorted(names)):
        write(tmp_path / "files" / f"{place}.jsonl", rows[name])
    write(tmp_path / "one.jsonl", [row for name in names for row in rows[name]])
    for source, out in (("files", "a"), ("one.jsonl", "b")):
        assert run(tmp_path / source, tmp_path / out, "--domain", "chemistry") == 0
    for split in ("train", "test"):
        assert rows_of(tmp_path / "a", split) == rows_of(tmp_path / "b", split)
    assert sorted(row["extra_info"]["idx"] for s in ("train", "test") for row in rows_of(tmp_path / "a", s)) == list(
        range(50)
    )
    assert run(tmp_path / "one.jsonl", tmp_path / "c", "--domain", "chemistry", "--seed", "1") == 0
    assert rows_of(tmp_path / "c", "test") != rows_of(tmp_path / "b", "test")
    assert run(tmp_path / "one.jsonl", tmp_path / "d", "--domain", "chemistry", "--limit", "2") == 0
    assert rows_of(tmp_path / "d", "test") == rows_of(tmp_path / "b", "test")[:2]
    assert run(write(tmp_path / "single.jsonl", [raw(1)]), tmp_path / "e", "--domain", "physics") == 1


def test_split_files_keep_their_split(tmp_path, capsys):
    for domain in sciknoweval.DOMAINS:
        write(tmp_path / "sdpo" / domain / "train.json", [sdpo(i, "AB" if i < 2 else "ABCD") for i in range(5)])
        write(tmp_path / "sdpo" / domain / "test.json", [sdpo(7)])
    assert run(tmp_path / "sdpo", tmp_path / "out") == 0
    for domain in sciknoweval.DOMAINS:
        train, test = (rows_of(tmp_path / "out" / domain, split) for split in ("train", "test"))
        assert [row["extra_info"]["idx"] for row in (*train, *test)] == [0, 1, 2, 3, 4, 7]
        assert {row["data_source"] for row in train} == {f"sciknoweval_{domain}"}
        assert {row["extra_info"]["problem"] for row in train} == {""}, "the bare question lacks its options"
        assert len(train[0]["extra_info"]["choices"]) == 2 and "two options" in train[0]["prompt"][0]["content"]
        assert train[4]["prompt"][1]["content"] == sdpo(4)["prompt"]
    capsys.readouterr()
    write(tmp_path / "nameless" / "train.json", [sdpo(1)])
    assert run(tmp_path / "nameless", tmp_path / "no") == 1
    assert "in a folder named after its domain" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (raw(1, answer="E"), "field 'answerKey': found 'E' (str); expected one of ['A', 'B', 'C', 'D']"),
        (raw(1, answer=""), "field 'answerKey': found '' (str); expected"),
        (raw(1, answer="C", kind="mcq-2-choices"), "field 'answerKey': found 'C'"),
        (raw(1, choices=None), "field 'choices.label': found no such field"),
        (raw(1, choices={"text": ["x"], "label": ["A"]}), "field 'choices.label': found ['A'] (list); expected"),
        (
            raw(1, choices={"text": ["x", "y", "", "z"], "label": list("ABCD")}),
            "field 'choices.text': found ['x', 'y', '', 'z'] (list); expected 4 texts that are not empty",
        ),
        (raw(1, choices={"text": ["x", "y", 1.5, "z"], "label": list("ABCD")}), "field 'choices.text'"),
        (raw(1, details={"level": "L3"}), "field 'details.subtask': found no such field"),
        (raw(1, details="L3"), "field 'details.level': found no such field"),
        (raw(1, question=None), "field 'question': found None"),
        ({"question": "x"}, "field 'domain': found no such field (there are question)"),
    ],
)
def test_broken_rows(tmp_path, capsys, row, message):
    source = write(tmp_path / "a.jsonl", [*[raw(i) for i in range(10)], row])
    assert run(source, tmp_path / "out", "--domain", "physics") == 1
    assert f"{source}, row 11, {message}" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", "--domain", "physics", "--on-error", "skip") == 0
    assert manifest_of(tmp_path / "out")["counts"]["rows_written"] == {"train": 9, "test": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "Question?\nPlease reason step by step."},
        {"prompt": "Question?\n\nA: x\nB: y"},
        {"prompt": "Question?\n\nA: x\nPlease reason step by step."},
        {"prompt": 3},
        {"answer": "F"},
        {"answer": None},
        {"idx": "x"},
        {"kind": "code"},
    ],
)
def test_broken_rows_of_split_files(tmp_path, capsys, changes):
    source = write(tmp_path / "physics" / "train.json", [sdpo(0), sdpo(1, **changes)])
    assert run(source, tmp_path / "out", "--domain", "physics") == 1
    assert f"{source}, row 2, field '{next(iter(changes))}'" in capsys.readouterr().err


def test_defects_of_the_release_are_marked(tmp_path, capsys):
    rows = [raw(i) for i in range(20)]
    rows[3]["choices"]["text"] = ["same", "same", "c", "d"]
    rows[4]["choices"]["text"].insert(0, "a hint")
    source = write(tmp_path / "a.jsonl", rows)
    assert run(source, tmp_path / "out", "--domain", "physics") == 0
    marked = [row for s in ("train", "test") for row in rows_of(tmp_path / "out", s) if row["extra_info"]["defect"]]
    assert sorted(row["extra_info"]["defect"] for row in marked) == [sciknoweval.SURPLUS, sciknoweval.AMBIGUOUS]
    (shifted,) = [row for row in marked if row["extra_info"]["defect"] == sciknoweval.SURPLUS]
    assert "\n\nA: a hint\nB: option 4 A\nC: option 4 B\nD: option 4 C\n" in shifted["prompt"][1]["content"]
    assert f"1 kept with a defect ({sciknoweval.AMBIGUOUS}): {source}, row 4" in capsys.readouterr().out


def test_split_options():
    assert split_options("Q\nB: no\n\nA: x\n\nB: y: z\nC: ") == ("Q\nB: no", ["A", "B", "C"], ["x\n", "y: z", ""])
    assert split_options("Q\n\nA: in the text\nA: x") == ("Q", ["A"], ["in the text\nA: x"])
    assert split_options("Q A: x") == ("Q A: x", [], [])


# The whole sets


def test_the_published_split_comes_out_of_the_raw_files(real_data, tmp_path):
    assert run(real_data / "sciknoweval_raw", tmp_path / "raw", "--prompt", "sdpo_verbatim") == 0
    assert run(real_data / "sciknoweval", tmp_path / "split", "--prompt", "sdpo_verbatim") == 0
    for domain, sizes in SIZES.items():
        manifests = [manifest_of(tmp_path / kind / domain) for kind in ("raw", "split")]
        assert [manifest["split_of_sdpo"] for manifest in manifests] == [True, True]
        for split, size in zip(("train", "test"), sizes, strict=True):
            rows = rows_of(tmp_path / "raw" / domain, split)
            published = [
                json.loads(line)
                for line in (real_data / "sciknoweval" / domain / f"{split}.json").open(encoding="utf-8")
            ]
            assert len(rows) == len(published) == size
            for row, theirs, own in zip(rows, published, rows_of(tmp_path / "split" / domain, split), strict=True):
                assert [message["content"] for message in row["prompt"]] == [theirs["system"], theirs["prompt"]]
                assert row["reward_model"]["ground_truth"] == theirs["answer"]
                assert row["extra_info"]["idx"] == theirs["idx"]
                for key in ("question_id", "choices", "idx"):
                    assert row["extra_info"][key] == own["extra_info"][key]


def test_counts_of_the_whole_sets(real_data, tmp_path):
    assert run(real_data / "sciknoweval_raw", tmp_path) == 0
    two = {}
    for domain in SIZES:
        manifest = manifest_of(tmp_path / domain)
        read, left_out = manifest["counts"]["records_read"]["all"], manifest["counts"]["left_out"]
        assert read == 4953 == sum(SIZES[domain]) + sum(entry["count"] for entry in left_out)
        two[domain] = [
            sum(len(row["extra_info"]["choices"]) == 2 for row in rows_of(tmp_path / domain, split))
            for split in ("train", "test")
        ]
        defects = {defect: len(places) for defect, places in manifest["defects"].items()}
        assert defects == {"physics": {sciknoweval.AMBIGUOUS: 3}, "material": {sciknoweval.SURPLUS: 1}}.get(domain, {})
        assert manifest["repeated_questions"]["test_also_in_train"] == (1 if domain == "material" else 0)
    assert two == {"biology": [181, 19], "chemistry": [0, 0], "material": [0, 0], "physics": [0, 0]}
