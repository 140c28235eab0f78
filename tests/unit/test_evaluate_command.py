"""`python -m recipe.evaluate` with everything real but the rollout servers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer

from data_prep.tiny_world import write_data
from recipe import compare_evaluations, drawing
from recipe.compose import EVALUATION, ROOT, choices
from recipe.evaluate import compose, folder_name, help_text, main, run
from recipe.evaluation_items import read_items
from recipe.evaluation_settings import evaluation_config
from recipe.score_interval import share_interval
from verl_ext.config import ConfigError
from verl_ext.sample_store import read_store
from verl_ext.verifier_config import route_through_pool

MODEL = ROOT / "models" / "tiny_world" / "plain"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Ten questions of the tiny world; the last three are called another data source."""
    folder = tmp_path_factory.mktemp("tiny_world")
    write_data(folder)
    found = pq.read_table(folder / "test.parquet").slice(0, 10).to_pylist()
    for row in found[7:]:
        row["data_source"] = "tiny_world_hard"
    return found


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "questions.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


class Servers:
    """In the rollout servers' place: right, wrong or without a box, as a sample's own seed decides."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.solutions = {row["prompt"][0]["content"]: row["extra_info"]["solution"] for row in rows}
        self.calls = 0
        self.killed_after: int | None = None
        self.shift = 0

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        self.calls += 1
        if self.calls == self.killed_after:
            raise KeyboardInterrupt
        prompt = self.tokenizer.decode(prompt_ids)
        solution = next(text for asked, text in self.solutions.items() if asked in prompt)
        kind = (sampling_params["seed"] + self.shift) % 5
        text = solution if kind < 2 else "\\boxed{0}" if kind < 4 else "1+1=2"
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        return SimpleNamespace(token_ids=ids, stop_reason="completed")


@pytest.fixture
def servers(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Servers:
    made = Servers(rows)

    @contextmanager
    def started(*_: object) -> Iterator[tuple[Servers, list[int]]]:
        yield made, []

    monkeypatch.setattr(drawing, "rollout_client", started)
    return made


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """Composed once: it takes longer than an evaluation here."""
    return compose(["sample.k=4", "sample.concurrency=1", "sample.out=unset", "run.quiet=true"])


def changed(config: DictConfig, folder: Path, file: str, **changes: Any) -> DictConfig:
    made = copy.deepcopy(config)
    for key, value in {"sample__out": str(folder), "data__val_files": file, **changes}.items():
        OmegaConf.update(made, key.replace("__", "."), value)
    return made


# --------------------------------------------------------------------------------------------------------- the command


def test_an_evaluation_that_is_killed_and_goes_on_gives_the_numbers_of_one_go(
    rows: list[dict[str, Any]],
    composed: DictConfig,
    servers: Servers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path, rows)
    call = [f"data.val_files={file}", f"sample.out={tmp_path / 'killed'}", "sample.k=4", "sample.concurrency=1"]
    servers.killed_after = 18
    assert main(call) == 130
    assert not (tmp_path / "killed" / "evaluation.json").exists()
    assert compare_evaluations.main([str(tmp_path / "killed"), str(tmp_path / "killed")]) == 2
    assert "unfinished, 17 samples and no evaluation.json" in capsys.readouterr().err
    servers.killed_after = None
    assert main(call) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert (summary["questions"], summary["samples"], summary["drawn"], servers.calls) == (10, 40, 23, 41)
    assert "| tiny_world " in printed.err + printed.out and "| tiny_world_hard " in printed.err + printed.out

    run(changed(composed, tmp_path / "whole", file))
    texts = [(tmp_path / name / "items.jsonl").read_text() for name in ("killed", "whole")]
    assert texts[0] == texts[1]
    killed, whole = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("killed", "whole"))
    assert killed["groups"] == whole["groups"] and killed["settings"] == whole["settings"]

    # Against the samples themselves.
    stored = read_store(tmp_path / "whole")[1]
    right = [[row["acc"] for row in stored if row["question_id"] == item["extra_info"]["question_id"]] for item in rows]
    pooled = whole["groups"]["pooled"]
    shares = [sum(part) / 4 for part in right]
    entry = pooled["metrics"]["mean@4"]
    assert entry["value"] == pytest.approx(sum(shares) / 10) and 0 < entry["value"] < 1
    assert (entry["low"], entry["high"]) == pytest.approx(share_interval(shares))
    assert pooled["metrics"]["pass@4"]["value"] == pytest.approx(sum(map(any, right)) / 10)
    assert summary["mean@4"] == pytest.approx(entry["value"], abs=1e-6)
    assert [name for name in pooled["metrics"]] == ["mean@4", "maj@4", "pass@1", "pass@2", "pass@3", "pass@4"]
    hard = whole["groups"]["tiny_world_hard"]
    assert (hard["questions"], hard["samples"]) == (3, 12)
    assert hard["metrics"]["mean@4"]["value"] == pytest.approx(sum(shares[7:]) / 3)
    boxed = sum("\\boxed" in row["text"] for row in stored) / 40
    assert pooled["format"]["value"] <= boxed < 1 and pooled["truncated"]["value"] == 0.0
    lengths = sorted(row["tokens"] for row in stored)
    assert pooled["length"] == {
        "mean": sum(lengths) / 40,
        "median": (lengths[19] + lengths[20]) / 2,
        "longest": lengths[-1],
    }

    # What it was measured with.
    assert whole["settings"]["model"]["path"] == str(MODEL) and len(whole["settings"]["chat_template"]["hash"]) == 32
    assert whole["settings"]["verifier"]["path"].endswith("tiny_world:compute_score")
    assert whole["versions"]["vllm"] and whole["versions"]["verl"] == "0.9.1" and whole["population"] == "items"
    page = (tmp_path / "whole" / "evaluation.md").read_text()
    assert whole["settings"]["model"]["fingerprint"] in page and "other questions of the same kind" in page

    # A larger k goes on from there.
    more = run(changed(composed, tmp_path / "whole", file, sample__k=6, evaluation__ks=[1, 6]))
    assert (more["drawn"], more["samples"]) == (20, 60) and "pass@6" in more and "pass@2" not in more
    assert [len(item.correct) for item in read_items(tmp_path / "whole" / "items.jsonl")] == [6] * 10


def test_verifier_errors_are_left_out_counted_and_named(
    rows: list[dict[str, Any]], composed: DictConfig, servers: Servers, tmp_path: Path
) -> None:
    """A verifier that fails where there is no box."""
    (tmp_path / "strict.py").write_text(
        "from verl_ext.verifiers import tiny_world\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    if 'boxed' not in solution_str:\n"
        "        raise RuntimeError('no box')\n"
        "    return tiny_world.compute_score(data_source, solution_str, ground_truth, extra_info)\n"
    )
    function = f"{tmp_path / 'strict.py'}:compute_score"
    config = changed(composed, tmp_path / "store", write(tmp_path, rows), verifier__function=function)
    config.verifier.max_error_rate = 1.0
    route_through_pool(config)
    summary = run(config)
    items = read_items(tmp_path / "store" / "items.jsonl")
    errors = sum(status != "ok" for item in items for status in item.statuses)
    assert summary["verifier_errors"] == errors > 0
    shares = [sum(item.verdicts) / len(item.verdicts) for item in items if item.verdicts]
    assert summary["mean@4"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert "pass@4" not in summary
    notes = " ".join(json.loads((tmp_path / "store" / "evaluation.json").read_text())["notes"])
    assert f"{errors} of 40 samples could not be judged" in notes and "No pass@k for k in" in notes


def without_answer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[0], {**rows[1], "reward_model": {**rows[1]["reward_model"], "ground_truth": ""}}]


@pytest.mark.parametrize(
    ("choose", "changes", "message"),
    [
        (without_answer, {}, r"data.val_files: 1 of 2 questions have no answer \(reward_model.ground_truth\): "),
        (list, {"sample__checkpoint": "/no/such/model"}, "the checkpoint /no/such/model is no folder"),
        (list, {"actor_rollout_ref__model__path": "/no/such/model"}, "the model /no/such/model is no folder"),
        (
            list,
            {"verifier__function": "verl_ext.verifiers.multiple_choice:compute_score"},
            "multiple_choice:compute_score is not for the data source 'tiny_world' of data.val_files: it accepts the "
            "right answer of 0 of 7 questions",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(
    choose: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    changes: dict[str, Any],
    message: str,
    rows: list[dict[str, Any]],
    composed: DictConfig,
    servers: Servers,
    tmp_path: Path,
) -> None:
    config = changed(composed, tmp_path / "store", write(tmp_path, choose(rows)), **changes)
    route_through_pool(config)
    with pytest.raises(ConfigError, match=message):
        run(config)
    assert servers.calls == 0 and not (tmp_path / "store" / "evaluation.json").exists()


def test_data_without_a_question_is_refused(rows: list[dict[str, Any]], composed: DictConfig, tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist(rows).slice(0, 0), path)
    with pytest.raises(ConfigError, match="empty.parquet'] holds no question"):
        run(changed(composed, tmp_path / "store", str(path)))


def test_a_setting_that_does_not_exist_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluation=nope"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: evaluation=nope does not exist; evaluation is one of: default")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ks": [1, 8]}, r"evaluation.ks holds 8; allowed: at most sample.k = 4, because pass@8 needs 8 samples"),
        ({"ks": [0]}, "evaluation.ks holds 0; allowed: whole numbers from 1"),
        ({"ks": 4}, r"evaluation.ks is 4; allowed: a value of type list\[int\]"),
        ({"level": 2.0}, "evaluation.level is 2.0; allowed: a share between 0 and 1"),
        ({"check_gold": 1}, "evaluation.check_gold is 1"),
        ({"k": 4}, "evaluation.k is not a key; evaluation has: setting"),
    ],
)
def test_a_bad_setting_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluation_config(OmegaConf.create({"evaluation": values, "sample": {"k": 4}}))


def test_the_same_command_means_the_same_folder(composed: DictConfig) -> None:
    def name(**changes: Any) -> str:
        return folder_name(changed(composed, Path("x"), "data/tiny_world/test.parquet", **changes))

    plain = name()
    assert plain.startswith("tiny_world-plain-tiny_world-default-")
    assert name(sample__k=3, sample__concurrency=2, evaluation__level=0.9, sample__out="y") == plain
    others = [name(sample__temperature=0.5), name(verifier__time_limit=3.0), name(sample__limit=2)]
    assert len({plain, *others}) == 4
    assert name(sample__checkpoint="runs/a/checkpoints/global_step_40").startswith("checkpoints-global_step_40-tiny")


def test_help_names_every_setting_and_file() -> None:
    text = help_text()
    assert [preset for preset in choices(EVALUATION) if preset not in text] == []
    assert all(name in text for name in ("evaluation.json", "evaluation.md", "items.jsonl", "evaluation.ks"))
