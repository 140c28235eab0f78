"""`python -m recipe.sample` without a cluster: data, settings, refusals, the summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from data_prep.tiny_world import write_data
from recipe.sample import compose, main, run, summarize
from recipe.sample_data import read_questions
from recipe.sample_settings import SampleConfig
from verl_ext.config import ConfigError
from verl_ext.model_identity import model_identity
from verl_ext.sample_store import SampleStore
from verl_ext.sampling import SamplingSettings, plan_jobs, store_settings
from verl_ext.sampling_prompts import PromptBuilder
from verl_ext.verification import Verifier


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny_world")
    write_data(folder)
    return str(folder / "test.parquet")


def test_questions_of_the_data_files(questions: str) -> None:
    config = OmegaConf.create({"data": {"val_files": questions, "train_files": [questions, questions]}})
    requests, repeats = read_questions(config, "test", limit=3)
    assert len(requests) == 3 and repeats == 0
    assert requests[0].ground_truth == "1" and requests[0].messages[0]["role"] == "user"
    requests, repeats = read_questions(config, "train")
    assert len(requests) == 150 == repeats
    config.data.val_files = "/missing.parquet"
    with pytest.raises(ConfigError, match="data.val_files: /missing.parquet does not exist"):
        read_questions(config, "test")


def test_the_spread_of_pass_rates() -> None:
    rows = [
        {"question_id": q, "sample": i, "status": "ok", "acc": acc, "truncated": i == 0}
        for q, verdicts in (("a", [1.0, 1.0]), ("b", [1.0, 0.0]), ("c", [0.0, 0.0]))
        for i, acc in enumerate(verdicts)
    ]
    rows.append({"question_id": "d", "sample": 0, "status": "error", "acc": None, "truncated": False})
    summary = summarize(rows)
    assert (summary["questions"], summary["samples"], summary["truncated"], summary["verifier_errors"]) == (4, 7, 3, 1)
    assert summary["mean"] == 0.5 and summary["pass_rate_std"] == pytest.approx((1 / 6) ** 0.5, abs=1e-6)
    assert (summary["pass_rate_min"], summary["pass_rate_max"]) == (0.0, 1.0)
    assert summarize([])["mean"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sample.out has no value"),
        (["sample.split=dev"], "sample.split is 'dev'; allowed: train, test"),
        (["sample.k=0"], "sample.k is 0"),
        (["sample.temperature=0"], "sample.k is 8; allowed: 1 with temperature 0"),
        (["sample.kk=3"], "sample.kk=3"),
        (["model=huge"], "model=huge does not exist; model is one of"),
        (["sample.checkpoint=/does/not/exist"], "/does/not/exist is no folder"),
        (["data.val_files=/missing.parquet"], "/missing.parquet does not exist"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [f"sample.out={tmp_path}", f"data.val_files={questions}"] if arguments else []
    assert main([*out, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_full_store_needs_no_cluster_and_another_temperature_is_refused(
    questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [f"sample.out={tmp_path}", f"data.val_files={questions}", "sample.limit=2", "sample.k=1"]
    config = compose(call)
    tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
    prompts, drawn = PromptBuilder(tokenizer), SamplingSettings(max_tokens=config.data.max_response_length, k=1)
    identity = model_identity(config.actor_rollout_ref.model.path)
    settings = store_settings(identity, drawn, prompts, Verifier.from_config(config))
    with SampleStore(tmp_path, settings) as store:
        for job in plan_jobs(read_questions(config, "test", 2)[0], drawn, prompts, store, None):
            row = {"question_id": job.request.question_id, "sample": job.sample, "prompt": job.prompt}
            store.append({**row, "status": "ok", "acc": 1.0, "truncated": False})
    summary = run(config)
    assert (summary["questions"], summary["samples"], summary["drawn"]) == (2, 2, 0)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert main([*call, "sample.temperature=0.5"]) == 2
    error = capsys.readouterr().err
    assert "sampling.temperature: the store has 1.0, asked for 0.5" in error and error.count("\n") == 1


def test_help_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"sample.{key}" in text for key in SampleConfig.__dataclass_fields__)
