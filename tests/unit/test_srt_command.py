"""`python -m recipe.srt collect` without a cluster: only the rollout servers and the verifier are stand-ins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from data_prep.random_model import CHAT_TEMPLATE, byte_tokenizer
from data_prep.schema import make_row, write_parquet
from recipe import drawing
from recipe.sample import REFUSALS
from recipe.srt import collect, compose, main
from recipe.srt_attempts import ATTEMPT_FAULTS
from recipe.srt_settings import SrtConfig
from recipe.srt_traces import REVISION_FAULTS
from verl_ext.revision import PHRASES
from verl_ext.sample_store import read_store
from verl_ext.verification import Verifier

TOKENIZER = byte_tokenizer()
QUESTIONS = 4
QWEN = PHRASES["qwen"]
LAST_LINE = [
    *("questions", "attempts", "right", "wrong", "mean", "revisions", "correction_rate", "retention", "traces"),
    *("traces_right", "traces_wrong", *(f"dropped_attempts_{reason}" for reason in ATTEMPT_FAULTS)),
    *(f"dropped_revisions_{reason}" for reason in REVISION_FAULTS),
    *("rows", "dropped_rows_too_long", "files", "drawn", "seconds"),
]


@dataclass
class Output:
    token_ids: list[int]
    stop_reason: str = "completed"


class Model:
    """Answers the question "N" with N where N is even; revisions are right but for those that ``revise`` changes."""

    def __init__(self, fail_at: int | None = None, revise: Callable[[str, int], str] | None = None) -> None:
        self.prompts: list[str] = []
        self.fail_at, self.revise = fail_at, revise or (lambda number, call: number)
        self.started = 0

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Output:
        if len(self.prompts) == self.fail_at:
            raise RuntimeError("the server is gone")
        prompt = TOKENIZER.decode(prompt_ids)
        self.prompts.append(prompt)
        number = re.search(r"user\n(\d+)", prompt)[1]
        if prompt.endswith("assistant\n"):
            answer = number if int(number) % 2 == 0 else f"not {number}."
        else:
            answer = self.revise(number, len(self.prompts))
        tokens = [*TOKENIZER.encode(answer, add_special_tokens=False), TOKENIZER.eos_token_id]
        return Output(tokens[: sampling_params["max_tokens"]])


def judge(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    if "broken" in solution_str:
        raise RuntimeError("sandbox is down")
    return float(solution_str.endswith(ground_truth))


@cache
def tokenizer_with(template: str) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Model]]:
    """The list's last model answers. verl, which is slow to import, is not needed."""
    models = [Model()]

    @contextmanager
    def rollout_client(config: Any, weights: Path) -> Iterator[tuple[Model, list[int]]]:
        models[-1].started += 1
        yield models[-1], []

    def load_tokenizer(config: Any) -> Any:
        return tokenizer_with(config.actor_rollout_ref.model.get("custom_chat_template") or CHAT_TEMPLATE)

    monkeypatch.setattr(drawing, "rollout_client", rollout_client)
    monkeypatch.setattr(drawing, "load_tokenizer", load_tokenizer)
    monkeypatch.setattr(
        Verifier, "from_config", lambda config, workers=8: Verifier(judge, {"path": "judge"}, workers=workers)
    )
    yield models


@cache
def composed() -> DictConfig:
    """Composing takes a second: once, then copies are changed. Without the blocks of verl that nobody reads here."""
    made = compose(["srt.out=out", "data.max_response_length=40", "srt.concurrency=1", "run.quiet=true"])
    made = OmegaConf.create(OmegaConf.to_container(made, resolve=True))
    made.actor_rollout_ref = {"model": made.actor_rollout_ref.model, "rollout": {"max_model_len": 512}}
    read = ("actor_rollout_ref", "data", "distill", "reward", "run", "srt", "verifier")
    return OmegaConf.create({name: made[name] for name in read})


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """A model folder and four questions."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_type(tmp_path, "qwen3")
    (folder / "model.safetensors").write_bytes(b"weights")
    rows = [
        make_row(
            data_source="own",
            prompt=[{"role": "user", "content": f"{i}"}],
            ground_truth=f"{i}",
            split="train",
            index=i,
        )
        for i in range(QUESTIONS)
    ]
    write_parquet(rows, tmp_path / "train.parquet")
    return {
        "srt.out": str(tmp_path / "out"),
        "data.train_files": str(tmp_path / "train.parquet"),
        "actor_rollout_ref.model.path": str(folder),
    }


def write_type(folder: Path, name: str) -> None:
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": name}))


def config(paths: Mapping[str, Any], changes: Mapping[str, Any]) -> DictConfig:
    made = composed().copy()
    with open_dict(made):
        for key, value in {**paths, **changes}.items():
            OmegaConf.update(made, key, value)
    return made


def run(paths: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """``collect`` with changed keys of ``srt``; others are set in ``paths``."""
    return collect(config(paths, {f"srt.{key}": value for key, value in changes.items()}))


def refused(paths: Mapping[str, Any], **changes: Any) -> str:
    with pytest.raises(REFUSALS) as caught:
        run(paths, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def manifest(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "manifest.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------ a whole command


def test_two_rounds_on_one_set_of_servers(
    model: list[Model], paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.max_response_length=40", "srt.concurrency=1", "run.quiet=true"]
    assert main(["collect", *(f"{key}={value}" for key, value in paths.items()), *overrides]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    summary = json.loads(line)
    assert list(summary) == LAST_LINE
    counts = {key: summary[key] for key in ("questions", "attempts", "right", "wrong", "revisions", "traces", "rows")}
    assert counts == {"questions": 4, "attempts": 4, "right": 2, "wrong": 2, "revisions": 12, "traces": 12, "rows": 24}
    assert (summary["traces_right"], summary["traces_wrong"], summary["drawn"]) == (6, 6, 16)
    assert (summary["correction_rate"], summary["retention"], summary["mean"]) == (1.0, 1.0, 0.5)
    assert summary["files"] == str(tmp_path / "out" / "sft.parquet")
    assert model[0].started == 1 and len(model[0].prompts) == 16

    begin = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert model[0].prompts[:4] == [begin.format(i) for i in range(4)]
    assert model[0].prompts[4] == begin.format(0) + f"0\n\n{QWEN.right}\n\n"
    assert model[0].prompts[7] == begin.format(1) + f"not 1.\n\n{QWEN.wrong}\n\n"

    rows = pq.read_table(tmp_path / "out" / "sft.parquet").to_pylist()
    assert [row["kind"] for row in rows] == ["generation", "revision"] * 12
    assert TOKENIZER.decode(rows[7]["input_ids"]) == model[0].prompts[7] + "1<|im_end|>"
    traces = pq.read_table(tmp_path / "out" / "traces.parquet").to_pylist()
    assert [(trace["attempt"], trace["revision"]) for trace in traces[2:4]] == [("0", "0"), ("not 1.", "1")]
    stores = ["attempts", "collect.log", "manifest.json", "revisions"]
    assert names(tmp_path / "out") == [*stores, "sft.parquet", "traces.parquet"]


def test_the_manifest_counts_every_sample_by_branch_and_reason(
    model: list[Model], paths: dict[str, str], tmp_path: Path
) -> None:
    answers = ["{}", "wrong", "broken", "Good catch!", "x" * 60, "Thanks! {}", "a<|im_end|>"]
    model[0].revise = lambda number, call: answers[call % len(answers)].format(number)
    summary = run(paths | {"verifier.max_error_rate": 1.0}, revisions=7, per_attempt=1, skip=1, limit=2)
    assert (summary["questions"], summary["attempts"], summary["revisions"]) == (2, 2, 14)
    found = manifest(tmp_path)
    for branch in ("right", "wrong"):
        counts = found["branches"][branch]
        dropped = counts["dropped_revisions"]
        assert sum(dropped.values()) + counts["traces"] == counts["revisions"] == 7 and counts["traces"] == 1
        assert dropped["verifier_error"] == 1 and dropped["truncated"] == 1 and dropped["beyond_per_attempt"] == 1
        assert sum(counts["dropped_attempts"].values()) + counts["revised"] == counts["attempts"] == 1
    left_out = sum(value for key, value in summary.items() if key.startswith("dropped_revisions_"))
    assert left_out + summary["traces"] == summary["revisions"]
    assert found["phrases"] == {"right": QWEN.right, "wrong": QWEN.wrong} and found["settings"]["per_attempt"] == 1
    assert found["counts"]["traces"] == 2 and found["files"]["sft.parquet"]["rows"] == 4
    assert found["stores"]["revisions"]["settings"]["revision"]["attempts"] == found["stores"]["attempts"]["key"]


@pytest.mark.parametrize("fail_at", [2, 9])
def test_a_killed_collection_goes_on_and_draws_nothing_twice(
    fail_at: int, model: list[Model], paths: dict[str, str], tmp_path: Path
) -> None:
    model[0].fail_at = fail_at
    with pytest.raises(RuntimeError, match="the server is gone"):
        run(paths)
    assert not (tmp_path / "out" / "manifest.json").exists()
    model.append(Model())
    assert run(paths)["drawn"] == 16 - fail_at
    assert [len(one.prompts) for one in model] == [fail_at, 16 - fail_at]
    written = {name: (tmp_path / "out" / name).read_bytes() for name in ("sft.parquet", "traces.parquet")}
    # A third call needs no servers, and leaves the same bytes.
    model.append(Model())
    assert run(paths)["drawn"] == 0 and model[-1].started == 0
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in written.items())
    # One run without an interruption holds the same samples.
    run(paths, out=str(tmp_path / "other"))
    for store in ("attempts", "revisions"):
        both = [
            sorted((row["question_id"], row["sample"], row["text"]) for row in read_store(tmp_path / out / store)[1])
            for out in ("out", "other")
        ]
        assert both[0] == both[1]


def test_a_store_is_topped_up(model: list[Model], paths: dict[str, str]) -> None:
    assert run(paths, limit=2, revisions=1)["drawn"] == 2 + 2
    assert run(paths, limit=2, revisions=2, attempts=2)["drawn"] == 2 + 2 + 4
    assert run(paths, revisions=2, attempts=2)["drawn"] == 4 + 8


def test_two_stages_take_the_place_of_one_file(model: list[Model], paths: dict[str, str], tmp_path: Path) -> None:
    run(paths)
    summary = run(paths, losses="two_stage", placement="user", revision_rows=8)
    out = tmp_path / "out"
    assert summary["files"] == [str(out / "sft_generation.parquet"), str(out / "sft_revision.parquet")]
    assert summary["rows"] == 4 + 8 and summary["drawn"] == 0
    assert sorted(manifest(tmp_path)["files"]) == ["sft_generation.parquet", "sft_revision.parquet", "traces.parquet"]
    assert not (out / "sft.parquet").exists()
    revision = pq.read_table(out / "sft_revision.parquet").to_pylist()
    assert TOKENIZER.decode(revision[0]["input_ids"]) == (
        f"<|im_start|>user\n0\n\n0\n\n{QWEN.right}<|im_end|>\n<|im_start|>assistant\n0<|im_end|>"
    )


def test_without_revisions_the_rows_are_the_right_attempts(
    model: list[Model], paths: dict[str, str], tmp_path: Path
) -> None:
    """RFT; no phrases are needed, so any family will do."""
    write_type(tmp_path, "llama")
    summary = run(paths, revisions=0, attempts=3, per_question=1)
    assert (summary["attempts"], summary["revisions"], summary["rows"], summary["drawn"]) == (12, 0, 2, 12)
    left_out = sum(value for key, value in summary.items() if key.startswith("dropped_attempts_"))
    assert left_out + summary["rows"] == 12 and summary["dropped_attempts_wrong"] == 6
    rows = pq.read_table(tmp_path / "out" / "sft.parquet").to_pylist()
    begin = "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n{0}<|im_end|>"
    assert [TOKENIZER.decode(row["input_ids"]) for row in rows] == [begin.format(0), begin.format(2)]
    assert not (tmp_path / "out" / "traces.parquet").exists() and not (tmp_path / "out" / "revisions").exists()


def test_drawing_and_counting_only(model: list[Model], paths: dict[str, str], tmp_path: Path) -> None:
    model[0].revise = lambda number, call: "wrong"
    summary = run(paths, write=False, revisions=1, limit=1)
    assert (summary["retention"], summary["correction_rate"], summary["files"]) == (0.0, None, [])
    assert names(tmp_path / "out") == ["attempts", "collect.log", "revisions"]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_no_wrong_attempt(model: list[Model], paths: dict[str, str]) -> None:
    error = refused(paths, limit=1)
    assert "no wrong attempt to revise: of 1 attempts at 1 questions 1 are right, 0 wrong and 0 not judged" in error
    assert "Set srt.limit=1, srt.attempts=1 or srt.revisions=3 higher, or srt.revise_wrong=false" in error
    assert len(model[0].prompts) == 1, "no revision was drawn"
    assert run(paths, limit=1, revise_wrong=False)["traces"] == 3 and len(model[0].prompts) == 4


def test_no_attempt_was_corrected(model: list[Model], paths: dict[str, str], tmp_path: Path) -> None:
    model[0].revise = lambda number, call: number if int(number) % 2 == 0 else "wrong"
    error = refused(paths)
    assert "no trace of a wrong attempt: 2 wrong attempts have 6 revisions, 0 of them right; left out: wrong 6" in error
    assert "srt.revise_wrong=false" in error and "what was drawn is kept" in error
    assert names(tmp_path / "out") == ["attempts", "collect.log", "revisions"]
    assert run(paths, revise_wrong=False)["drawn"] == 0


def test_no_attempt_leaves_room(paths: dict[str, str]) -> None:
    error = refused(paths, revision_max_tokens=500)
    assert "holds no right attempt to revise" in error and "left out: no_room 2" in error
    assert "set srt.revision_max_tokens lower or actor_rollout_ref.rollout.max_model_len higher" in error


def test_a_changed_phrase_is_refused_before_anything_is_drawn(model: list[Model], paths: dict[str, str]) -> None:
    run(paths, limit=2)
    error = refused(paths | {"distill.context.phrase_wrong": "Try again."})
    assert f"revision.phrases.wrong: the store has {QWEN.wrong!r}, asked for 'Try again.'" in error
    assert len(model[0].prompts) == 8


TEMPLATE = "actor_rollout_ref.model.custom_chat_template"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"srt.out": None}, "srt.out has no value"),
        ({"srt.split": "dev"}, "srt.split is 'dev'; allowed: train, test"),
        ({"srt.losses": "both"}, "srt.losses is 'both'; allowed: joint, generation, revision, two_stage"),
        ({"srt.placement": "system"}, "srt.placement is 'system'; allowed: assistant, user"),
        ({"srt.attempts": 0}, "srt.attempts is 0; allowed: a whole number from 1"),
        ({"srt.attempts": True}, "srt.attempts is True; allowed: a value of type int"),
        ({"srt.per_attempt": 0}, "srt.per_attempt is 0; allowed: a whole number from 1, or null"),
        ({"srt.revisions": -1}, "srt.revisions is -1; allowed: a whole number from 0"),
        ({"srt.temperature": 0}, "srt.revisions is 3; allowed: 1 with temperature 0"),
        ({"srt.top_p": 0}, "srt.top_p is 0.0; allowed"),
        ({"srt.revise_right": False, "srt.revise_wrong": False}, "srt.revise_wrong is False; allowed: true"),
        ({"srt.losses": "two_stage", "srt.revise_wrong": False}, "allowed: true with srt.losses=two_stage"),
        ({"srt.revision_rows": 3}, "srt.revision_rows is 3; allowed: null with srt.losses=joint"),
        ({"srt.skip": 4}, "srt.skip is 4; allowed: less than the 4 questions"),
        ({"srt.checkpoint": "/does/not/exist"}, "/does/not/exist is no folder"),
        ({"data.train_files": "missing.parquet"}, "missing.parquet does not exist"),
        ({"distill.context.phrase_right": " "}, "distill.context.phrase_right is ' '; allowed: a phrase"),
        ({"distill.context.phrases": "other"}, "distill.context.phrases is 'other'; allowed: auto, paper"),
        ({TEMPLATE: "{% for m in messages %}{{ m.content }}{% endfor %}"}, "the chat template opens no assistant turn"),
        ({TEMPLATE: "{% if add_generation_prompt %}<think>{% endif %}"}, "opens a thinking block (<think>)"),
    ],
)
def test_a_wrong_call_draws_nothing(
    changes: dict[str, Any], message: str, model: list[Model], paths: dict[str, str]
) -> None:
    assert message in refused(paths | changes)
    assert model[0].started == 0


def test_a_family_without_phrases_is_told_what_to_set(
    model: list[Model], paths: dict[str, str], tmp_path: Path
) -> None:
    write_type(tmp_path, "llama")
    error = refused(paths)
    assert "models of type 'llama' have no control phrases of their own; set distill.context.phrases to one of" in error
    assert run(paths | {"distill.context.phrases": "paper"})["traces"] == 12
    assert model[0].prompts[-1].endswith(f"\n\n{PHRASES['paper'].wrong}\n\n")


# ----------------------------------------------------------------------------------------------------- the command line


def test_a_refusal_is_one_line_and_exit_code_2(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recipe.srt.compose", lambda overrides: config(paths, {"srt.limit": 1}))
    assert main(["collect"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "{" not in captured.out


def test_help_names_the_keys_and_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--help"]) == 0
    text = capsys.readouterr().out
    assert [key for key in SrtConfig.__dataclass_fields__ if f"srt.{key}" not in text] == []
    assert [key for key in LAST_LINE if not key.startswith("dropped_") and key not in text] == []
    assert max(map(len, text.split("Keys:")[1].splitlines())) <= 120
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0 and "collect" in capsys.readouterr().out
    assert main(["train"]) == 2
    assert "'train' is no command of recipe.srt; there is: collect" in capsys.readouterr().err
    assert main(["collect", "--cfg", "srt.revisions=2"]) == 0
    assert "\nsrt:\n  out: null\n" in capsys.readouterr().out
