"""`python -m recipe.teacher_text` without a cluster: on stores that are full, and on data it must refuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from omegaconf import DictConfig
from transformers import AutoTokenizer

from data_prep.schema import make_row, write_parquet
from data_prep.tiny_world import write_data
from recipe import teacher_text_data
from recipe.compose import compose_config
from recipe.sample_data import context_identity, read_questions, teacher_questions
from recipe.sample_settings import sample_config
from recipe.teacher_text import compose, main, run
from recipe.teacher_text_data import FAULTS, LEFT_OUT, REASONS, check_sources, choose_texts
from recipe.teacher_text_settings import text_config
from verl_ext.config import ConfigError, distill_config
from verl_ext.model_identity import model_identity
from verl_ext.reference_text import reference_responses
from verl_ext.sample_store import SampleStore, StoreError
from verl_ext.sampling import SampleRequest, plan_jobs, store_settings
from verl_ext.sampling_prompts import PromptBuilder
from verl_ext.verification import Verifier

LAST_LINE = [
    *("questions", "kept", "texts", *(f"dropped_{name}" for name in REASONS)),
    *("samples", *(f"samples_{name}" for name in LEFT_OUT), "mean", "file", "drawn", "seconds", "store"),
]
WRONG = {"score": 0.0}
CUT = {"truncated": True}
PBSD = ["method=pbsd", "teacher=frozen", "sequences=pairs_replayed"]
BROKEN = {"score": None, "acc": None, "status": "error", "error": "it broke"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_world")
    write_data(folder)
    first = folder / "first.parquet"
    pq.write_table(pq.read_table(folder / "train.parquet").slice(0, 8), first)
    return first


def call(folder: Path, source: Path, *more: str) -> list[str]:
    return [f"sample.out={folder / 'store'}", f"text.out={folder / 'out'}", f"data.train_files={source}", *more]


def draw(arguments: Sequence[str], sample: Callable[[int, int], dict[str, Any]]) -> list[str]:
    """What the sampler would have done: row j of question number i, last samples first; returns the question ids."""
    config = compose(arguments)
    block = sample_config(config)
    settings = block.sampling(config.data.max_response_length)
    path = config.actor_rollout_ref.model.path
    context = distill_config(config.distill).context
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(path), context.template_kwargs if block.context else None)
    requests = asked(config)
    stored = store_settings(model_identity(path), settings, prompts, Verifier.from_config(config))
    if block.context:
        stored["context"] = context_identity(context)
    numbers = {request.question_id: i for i, request in enumerate(requests)}
    with SampleStore(block.out, stored) as store:
        for job in reversed(plan_jobs(requests, settings, prompts, store, None)):
            name, i = job.request.question_id, job.sample
            row = {"question_id": name, "sample": i, "prompt": job.prompt, "status": "ok", "truncated": False}
            store.append(row | {"tokens": 10, "score": 1.0, "acc": 1.0, "text": f"t{i}"} | sample(numbers[name], i))
    return list(numbers)


def asked(config: DictConfig) -> list[SampleRequest]:
    """The questions as the model reads them."""
    block = sample_config(config)
    requests = read_questions(config, block.split, block.limit)[0]
    if not block.context:
        return requests
    tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
    return teacher_questions(requests, distill_config(config.distill).context, tokenizer)[0]


def drawn_prompts(arguments: Sequence[str]) -> list[list[int]]:
    """Token ids of every question's prompt."""
    config = compose(arguments)
    kwargs = distill_config(config.distill).context.template_kwargs
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path), kwargs)
    return [prompts(request.question_id, request.messages, None) for request in asked(config)]


def mixed(question: int, sample: int) -> dict[str, Any]:
    """A question for every reason; 1 and 7 are kept."""
    return {
        0: WRONG if sample else CUT,
        1: WRONG if sample % 2 else {"text": f" text {sample // 4}\n"},
        2: CUT,
        3: BROKEN if sample else CUT | WRONG,
        4: {"text": " \n"} if sample else WRONG,
        5: {"text": "a<|im_end|>b"} if sample else BROKEN,
        6: BROKEN if sample else WRONG,
        7: {},
    }[question]


def infos(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).column("extra_info").to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -------------------------------------------------------------------------------------------------------- the settings


def test_the_config_is_that_of_sampling_plus_the_text_block() -> None:
    config = compose(["sample.out=store", "text.out=data"])
    block, text = sample_config(config), text_config(config)
    assert (block.split, block.k, block.temperature) == ("train", 8, 1.0)
    assert (text.out, text.key, text.per_question) == ("data", "teacher_text", None)
    training = ["method=paced_distill", "sequences=teacher_text", "distill.teacher.path=teacher"]
    sequences = compose_config(training).distill.sequences
    assert (sequences.source, sequences.reference_key) == ("reference", text.key)


def test_help_names_presets_and_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [key for key in LAST_LINE if key not in text] == []
    assert "tiny_world" in text and "train.parquet" in text and "text.per_question" in text
    assert max(map(len, text.split("Keys:")[1].splitlines())) <= 120


def test_cfg_prints_the_composed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "text.per_question=3"]) == 0
    text = capsys.readouterr().out
    assert "split: train" in text and "key: teacher_text\n  only_right: true\n  per_question: 3\n" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["sample.out=null"], "sample.out has no value"),
        (["text.out=null"], "text.out has no value"),
        (["text.key=7"], "text.key is 7; allowed: the name of a new field"),
        (["text.per_question=0"], "text.per_question is 0; allowed: a whole number from 1, or null for all"),
        (["text.per_question=true"], "text.per_question is True; allowed"),
        (["text.only_right=3"], "text.only_right is 3; allowed: true, false"),
        (["text.name=x"], "text.name=x"),
        (["sample.split=test"], "sample.split is 'test'; allowed: train"),
        (["data.train_files=missing.parquet"], "data.train_files: missing.parquet does not exist"),
        (["text.key=question_id"], "text.key is 'question_id'; allowed: a name that extra_info of"),
        (["text.out=${sample.out}"], "a folder of samples; allowed: another folder"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    more: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call(tmp_path, source, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()


# ------------------------------------------------------------------------------------------------------ a whole command


def test_rows_counts_and_manifest(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = call(tmp_path, source)
    names = draw(arguments, mixed)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert sum(line.startswith("{") for line in captured.out.splitlines()) == 1
    assert list(summary) == LAST_LINE
    assert (summary["questions"], summary["kept"], summary["texts"], summary["samples"]) == (8, 2, 10, 64)
    dropped = {reason: summary[f"dropped_{reason}"] for reason in REASONS}
    assert dropped == dict.fromkeys(REASONS, 1) | {"not_sampled": 0, "no_right_sample": 2}
    left_out = {fault: summary[f"samples_{fault}"] for fault in LEFT_OUT}
    assert sum(left_out.values()) + summary["texts"] == summary["samples"]
    assert left_out == {
        **{"truncated": 1 + 8 + 1, "verifier_error": 7 + 1 + 7, "wrong": 7 + 4 + 1 + 1, "blank": 7},
        **{"special_token": 7, "repeated": 2, "beyond_per_question": 0},
    }
    # Score alone makes a pass rate: whether a text can be used is another question.
    assert summary["mean"] == pytest.approx((1 / 8 + 4 / 8 + 1 + 0 + 7 / 8 + 1 + 0 + 1) / 8, abs=1e-6)
    assert summary["drawn"] == 0 and summary["store"] == str(tmp_path / "store")

    path = tmp_path / "out" / "train.parquet"
    assert summary["file"] == str(path)
    old, new = pq.read_table(source), pq.read_table(path)
    rows, given = new.to_pylist(), old.to_pylist()
    assert [row["extra_info"]["question_id"] for row in rows] == [names[1], names[7]]
    assert rows[0]["extra_info"].pop("teacher_text") == [" text 0\n", " text 1\n"]
    assert rows[1]["extra_info"].pop("teacher_text") == [f"t{i}" for i in range(8)]
    assert rows == [given[1], given[7]]
    assert new.schema.names == old.schema.names
    fields = new.schema.field("extra_info").type
    assert list(fields)[:-1] == list(old.schema.field("extra_info").type)
    assert fields.field("teacher_text").type == pa.list_(pa.string())

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    store = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["dropped"] == {
        "not_sampled": [],
        "all_truncated": [names[2]],
        "only_verifier_errors": [names[3]],
        "no_right_sample": [names[0], names[6]],
        "only_blank_texts": [names[4]],
        "only_special_tokens": [names[5]],
    }
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["files"] == {"train.parquet": {"rows": 2, "sha256": digest}}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest["sources"] == [{"file": str(source), "rows": 8, "sha256": digest}]
    assert (manifest["store"]["key"], manifest["store"]["settings"]) == (store["key"], store["settings"])
    assert (manifest["success_threshold"], manifest["sampled"]) == (0.5, {"k": 8, "limit": None})
    assert manifest["text"] == {"key": "teacher_text", "only_right": True, "per_question": None}
    assert manifest["context"] is None
    assert manifest["counts"] == {key: summary[key] for key in manifest["counts"]}
    assert sorted(contents(tmp_path / "out")) == ["manifest.json", "train.parquet"]


def test_training_can_replay_the_texts(source: Path, tmp_path: Path) -> None:
    arguments = call(tmp_path, source)
    draw(arguments, lambda question, sample: {"text": "1+2=3\n#### 3"})
    run(compose(arguments))
    tokenizer = AutoTokenizer.from_pretrained(compose(arguments).actor_rollout_ref.model.path)
    for extra in infos(tmp_path / "out" / "train.parquet"):
        (ids,) = reference_responses(extra, "teacher_text", tokenizer, limit=48)
        assert tokenizer.decode(ids) == "1+2=3\n#### 3" + tokenizer.eos_token


def test_fewer_questions_fewer_samples_another_key_and_fewer_texts(source: Path, tmp_path: Path) -> None:
    arguments = call(tmp_path, source, "sample.limit=3")
    names = draw(arguments, lambda question, sample: {})
    less = [*arguments, "sample.k=5", "sample.limit=2", "text.per_question=2", "text.key=texts", "run.quiet=true"]
    summary = run(compose(less))
    assert (summary["kept"], summary["dropped_not_sampled"], summary["samples"]) == (2, 6, 10)
    assert (summary["texts"], summary["samples_beyond_per_question"], summary["mean"]) == (4, 6, 1.0)
    assert [row["texts"] for row in infos(tmp_path / "out" / "train.parquet")] == [["t0", "t1"]] * 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["text"] == {"key": "texts", "only_right": True, "per_question": 2}
    assert manifest["sampled"] == {"k": 5, "limit": 2}
    assert names[2] in manifest["dropped"]["not_sampled"]


def test_the_threshold_is_that_of_training(source: Path, tmp_path: Path) -> None:
    """A float32 score of 0.7 meets a threshold of 0.7, and acc has no say."""
    arguments = call(tmp_path, source, "distill.context.success_threshold=0.7")
    draw(arguments, lambda question, sample: {"score": 0.7 if sample < 2 else 0.69, "acc": 0.0})
    summary = run(compose(arguments))
    assert (summary["texts"], summary["samples_wrong"], summary["mean"]) == (16, 48, 0.25)


def test_fair_samples_are_kept_right_or_wrong_and_as_often_as_drawn(source: Path, tmp_path: Path) -> None:
    arguments = call(tmp_path, source, "text.only_right=false")
    names = draw(arguments, mixed)
    summary = run(compose(arguments))
    written = {row["question_id"]: row["teacher_text"] for row in infos(tmp_path / "out" / "train.parquet")}
    texts = [f"t{i}" for i in range(8)]
    right = [" text 0\n", "t1", " text 0\n", "t3", " text 1\n", "t5", " text 1\n", "t7"]
    expected = {0: texts[1:], 1: right, 3: texts[1:], 4: ["t0"], 5: ["t0"], 6: texts, 7: texts}
    assert written == {names[i]: found for i, found in expected.items()}
    assert {fault: summary[f"samples_{fault}"] for fault in LEFT_OUT} == {
        **{"truncated": 10, "verifier_error": 0, "wrong": 0, "blank": 7, "special_token": 7},
        **{"repeated": 0, "beyond_per_question": 0},
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["text"]["only_right"] is False and manifest["dropped"]["all_truncated"] == [names[2]]
    # What the verifier says of them is told all the same.
    assert summary["mean"] == pytest.approx((1 / 8 + 4 / 8 + 1 + 0 + 7 / 8 + 1 + 0 + 1) / 8, abs=1e-6)


def test_the_teacher_reads_the_solution_and_a_question_without_one_is_not_sampled(source: Path, tmp_path: Path) -> None:
    table = pq.read_table(source)
    rows = table.to_pylist()
    rows[2]["extra_info"]["solution"] = ""
    own = tmp_path / "own.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), own)
    arguments = call(tmp_path, own, *PBSD, "sample.context=true", "text.only_right=false", "sample.k=1")
    # Drawn before the limit was lowered: the store has more questions than may be kept now.
    names = draw([*arguments, "distill.context.max_length=512"], lambda question, sample: {})
    with pytest.raises(ConfigError, match=r"too_long 7"):
        run(compose([*arguments, "distill.context.max_length=9"]))
    assert len(names) == 7
    lengths = sorted(len(ids) for ids in drawn_prompts(arguments))
    summary = run(compose([*arguments, f"distill.context.max_length={lengths[-1] - 1}"]))
    longest = sum(length == lengths[-1] for length in lengths)
    assert (summary["drawn"], summary["kept"], summary["dropped_not_sampled"]) == (0, 7 - longest, 1 + longest)
    left_out = json.loads((tmp_path / "out" / "manifest.json").read_text())["context"]["left_out"]
    assert left_out["without_reference"] == [rows[2]["extra_info"]["question_id"]]
    assert len(left_out["too_long"]) == longest and left_out["special_token"] == []


def test_several_files_and_rows_that_repeat_a_question(source: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.parquet"
    pq.write_table(pq.read_table(source).slice(6, 2), again)
    arguments = [*call(tmp_path, source), f"data.train_files=[{source},{again}]"]
    names = draw(arguments, mixed)
    summary = run(compose(arguments))
    assert (summary["questions"], summary["kept"]) == (8, 2)
    written = infos(tmp_path / "out" / "train.parquet")
    assert [row["question_id"] for row in written] == [names[1], names[7], names[7]]
    assert written[1] == written[2]
    sources = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert [(one["file"], one["rows"]) for one in sources] == [(str(source), 8), (str(again), 2)]


# ----------------------------------------------------------------------------------------------------- whole or nothing


def test_a_second_run_gives_the_same_bytes_and_leaves_other_files_alone(source: Path, tmp_path: Path) -> None:
    arguments, out = call(tmp_path, source), tmp_path / "out"
    out.mkdir()
    (out / "train.parquet").write_text("old")
    (out / "test.parquet").write_text("mine")
    draw(arguments, mixed)
    run(compose(arguments))
    first = contents(out)
    assert sorted(first) == ["manifest.json", "test.parquet", "train.parquet"] and first["test.parquet"] == b"mine"
    run(compose(arguments))
    assert contents(out) == first


@pytest.mark.parametrize("failing", ["json_text", "sha256_of"])
def test_nothing_is_left_behind_where_writing_fails(
    failing: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = call(tmp_path, source), tmp_path / "out"
    draw(arguments, mixed)
    run(compose(arguments))
    before = contents(out)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_text_data, failing, full)
    assert main([*arguments, "text.per_question=1"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert contents(out) == before


def test_no_right_text_at_all_is_one_line_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = call(tmp_path, source)
    draw(arguments, lambda question, sample: CUT if question == 0 else WRONG)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "no text to train on; questions by reason: all_truncated 1, no_right_sample 7" in captured.err
    assert captured.err.splitlines()[-1].startswith("error: ") and "{" not in captured.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sample", "message"),
    [({"text": None}, "text is None; allowed: text"), ({"score": None}, "score is None; allowed: a finite number")],
)
def test_a_sample_that_cannot_be_read_is_named(
    sample: dict[str, Any], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = call(tmp_path, source)
    names = draw(arguments, lambda question, number: sample if (question, number) == (3, 2) else {})
    assert main(arguments) == 2
    assert f"sample 2 of question {names[3]}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_store_of_another_teacher_is_refused(source: Path, tmp_path: Path) -> None:
    arguments = call(tmp_path, source)
    draw(arguments, mixed)
    with pytest.raises(StoreError, match=r"sampling\.temperature: the store has 1\.0, asked for 0\.5"):
        run(compose([*arguments, "sample.temperature=0.5"]))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- folders and sources


def test_neither_the_data_nor_another_store_is_overwritten(source: Path, tmp_path: Path) -> None:
    own = tmp_path / "out" / "train.parquet"
    own.parent.mkdir()
    own.write_bytes(source.read_bytes())
    with pytest.raises(ConfigError, match=r"text\.out is .*; allowed: another folder than that of data\.train_files"):
        run(compose(call(tmp_path, own)))
    assert own.read_bytes() == source.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "samples-0123.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"text\.out is .*, a folder of samples"):
        run(compose(call(tmp_path, source, f"text.out={other}")))


def test_a_place_that_cannot_be_written_is_refused_before_sampling(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"text\.out is .*file/deep, but nothing can be written into .*file;"):
        run(compose(call(tmp_path, source, f"text.out={tmp_path / 'file' / 'deep'}")))
    assert not (tmp_path / "store").exists()


def test_files_of_different_columns_are_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    row = {"prompt": [{"role": "user", "content": "?"}], "ground_truth": "1", "split": "train", "index": 0}
    write_parquet([make_row(data_source="own", **row)], other)
    with pytest.raises(ConfigError, match=r"other\.parquet has the columns .*, .*first\.parquet data_source: string"):
        check_sources([str(source), str(other)], "teacher_text", tmp_path)


def test_the_columns_note_of_the_datasets_library_does_not_hide_the_new_field(source: Path, tmp_path: Path) -> None:
    noted = tmp_path / "noted.parquet"
    Dataset.from_parquet(str(source), cache_dir=str(tmp_path / "cache")).to_parquet(noted)
    assert b"huggingface" in pq.read_schema(noted).metadata
    arguments = call(tmp_path, noted)
    draw(arguments, mixed)
    run(compose(arguments))
    loaded = Dataset.from_parquet(str(tmp_path / "out" / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["extra_info"]["teacher_text"] == [" text 0\n", " text 1\n"]


# ------------------------------------------------------------------------------------------------------------ the texts


def test_a_question_is_counted_under_the_sample_that_came_furthest(tmp_path: Path) -> None:
    samples = {
        "truncated": CUT | BROKEN,
        "verifier_error": BROKEN,
        "wrong": WRONG | {"text": ""},
        "blank": {"text": ""},
        "special_token": {"text": "<s>"},
    }
    assert list(samples) == list(FAULTS)
    names = list(samples)
    with SampleStore(tmp_path, {}) as store:
        for i, name in enumerate(names):
            # Question i has one sample of each fault up to its own.
            for j, fault in enumerate(names[: i + 1]):
                row = {"question_id": name, "sample": j, "prompt": "p", "status": "ok", "truncated": False}
                store.append(row | {"score": 1.0, "text": "right"} | samples[fault])
    chosen = choose_texts(
        tmp_path,
        ["unknown", *names],
        sampled=names,
        samples=8,
        threshold=0.5,
        per_question=None,
        special_token=lambda text: "<s>" if "<s>" in text else None,
    )
    assert chosen.texts == {} and chosen.samples == 15
    assert chosen.dropped == {"not_sampled": ["unknown"]} | {FAULTS[name]: [name] for name in names}
    counts = dict(zip(names, [5, 4, 3, 2, 1], strict=True))
    assert chosen.left_out == counts | {"repeated": 0, "beyond_per_question": 0}
