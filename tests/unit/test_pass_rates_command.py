"""`python -m recipe.pass_rates` without a cluster: on stores that are full, or that it must refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data_prep.tiny_world import write_data
from recipe.pass_rates import compose, file_content, histogram, main, run, summarize
from recipe.sample_data import read_questions
from recipe.sample_settings import sample_config
from verl_ext.model_identity import model_identity
from verl_ext.pass_rate_store import PassRateTable, QuestionRate, read_pass_rates
from verl_ext.sample_store import SampleStore
from verl_ext.sampling import plan_jobs, store_settings
from verl_ext.sampling_prompts import PromptBuilder
from verl_ext.verification import Verifier

LAST_LINE = [
    *("questions", "samples", "mean", "pass_rate_std", "share_zero", "share_one", "share_active", "kept"),
    *("truncated", "verifier_errors", "drawn", "seconds", "store"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny_world")
    write_data(folder)
    return [f"data.train_files={folder / 'train.parquet'}", f"data.val_files={folder / 'test.parquet'}"]


def draw(folder: Path, arguments: list[str], verdict: Callable[[int, int], dict[str, Any]]) -> list[str]:
    """What the sampler would have done: rows for question number i, sample j; returns the question ids."""
    config = compose(arguments)
    block = sample_config(config)
    settings = block.sampling(config.data.max_response_length)
    path = config.actor_rollout_ref.model.path
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(path))
    requests = read_questions(config, block.split, block.limit)[0]
    stored = store_settings(model_identity(path), settings, prompts, Verifier.from_config(config))
    numbers = {request.question_id: i for i, request in enumerate(requests)}
    with SampleStore(folder, stored) as store:
        for job in plan_jobs(requests, settings, prompts, store, None):
            name, sample = job.request.question_id, job.sample
            row = {"question_id": name, "sample": sample, "prompt": job.prompt, "status": "ok", "truncated": False}
            store.append(row | {"tokens": 10} | verdict(numbers[name], sample))
    return list(numbers)


def right(when: bool) -> dict[str, Any]:
    return {"score": float(when), "acc": float(when)}


def broken(status: str = "error") -> dict[str, Any]:
    return {"score": None, "acc": None, "status": status, "error": "it broke"}


# -------------------------------------------------------------------------------------------------------- the settings


def test_the_config_is_that_of_sampling_with_paced_s_rollouts() -> None:
    block = sample_config(compose(["sample.out=somewhere"]))
    assert (block.split, block.k, block.temperature, block.top_p, block.top_k) == ("train", 8, 1.0, 1.0, -1)
    other = sample_config(compose(["sample.out=somewhere", "sample.split=test", "sample.k=2", "data=gsm8k"]))
    assert (other.split, other.k) == ("test", 2)


def test_help_names_presets_and_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [key for key in LAST_LINE if key not in text] == []
    assert "tiny_world" in text and "pass_rates.json" in text and "distill.context.success_threshold" in text


def test_cfg_prints_the_composed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "sample.k=3"]) == 0
    text = capsys.readouterr().out
    assert "split: train" in text and "\n  k: 3\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sample.out has no value"),
        (["sample.out=OUT", "sample.split=dev"], "sample.split is 'dev'; allowed: train, test"),
        (["sample.out=OUT", "sample.rollouts=3"], "sample.rollouts=3"),
        (["sample.out=OUT", "data.train_files=missing.parquet"], "data.train_files: missing.parquet does not exist"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("OUT", str(tmp_path)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- a store


def test_the_pass_rates_of_a_full_store(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Question i of 10 has i successes in 8; number 9 could never be judged, number 4 lacks two verdicts."""
    call = [f"sample.out={tmp_path}", *data, "sample.limit=10"]

    def verdict(question: int, sample: int) -> dict[str, Any]:
        if question == 9 or (question == 4 and sample >= 6):
            return broken("timeout" if sample == 7 else "error")
        return right(sample < question) | {"truncated": sample == 7, "tokens": question}

    names = draw(tmp_path, call, verdict)
    assert main(call) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert sum(line.startswith("{") for line in captured.out.splitlines()) == 1
    assert list(summary) == LAST_LINE
    rates = [i / 8 for i in range(9) if i != 4] + [4 / 6]
    mean = sum(rates) / 9
    assert summary["mean"] == pytest.approx(mean, abs=1e-6)
    assert summary["pass_rate_std"] == pytest.approx((sum((p - mean) ** 2 for p in rates) / 9) ** 0.5, abs=1e-6)
    assert (summary["questions"], summary["samples"], summary["drawn"], summary["kept"]) == (10, 80, 0, 7)
    assert (summary["truncated"], summary["verifier_errors"]) == (8, 10)
    assert (summary["share_zero"], summary["share_one"]) == (round(1 / 9, 6), round(1 / 9, 6))
    assert summary["share_active"] == round(7 / 9, 6) and summary["store"] == str(tmp_path)

    written = json.loads((tmp_path / "pass_rates.json").read_text())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (written["key"], written["samples"], written["threshold"]) == (manifest["key"], 8, 0.5)
    assert list(written["questions"]) == names
    expected = {"successes": 4, "count": 6, "errors": 1, "timeouts": 1, "truncated": 0, "tokens": (6 * 4 + 20) / 8}
    assert written["questions"][names[4]] == expected
    assert written["totals"] == {key: summary[key] for key in written["totals"]}
    assert not list(tmp_path.glob("*.tmp"))

    for text in (captured.err, (tmp_path / "sample.log").read_text()):
        assert "successes of 8  questions   share" in text
        assert f"{'none verified':>14}  {1:>9}" in text
    assert captured.err.count("#" * 20) == 9, "4 of 6 stands at 5 of 8; the bins of 1 fill half of the bar"
    assert captured.err.count("#" * 40) == 1


def test_a_shorter_question_list_and_a_smaller_k_are_answered_from_the_same_store(
    data: list[str], tmp_path: Path
) -> None:
    call = [f"sample.out={tmp_path}", *data, "sample.limit=6"]
    draw(tmp_path, call, lambda question, sample: right(sample < 4))
    assert run(compose(call))["mean"] == 0.5
    fewer = run(compose([*call, "sample.limit=2", "sample.k=4", "run.quiet=true"]))
    assert (fewer["questions"], fewer["samples"], fewer["mean"], fewer["kept"]) == (2, 8, 1.0, 0)
    assert len(json.loads((tmp_path / "pass_rates.json").read_text())["questions"]) == 2


def test_a_run_that_was_cut_off_is_filled_up_to_the_rates_of_one_go(data: list[str], tmp_path: Path) -> None:
    def verdict(question: int, sample: int) -> dict[str, Any]:
        return right((question + sample) % 3 == 0)

    calls = {name: [f"sample.out={tmp_path / name}", *data, "sample.limit=4"] for name in ("one", "two")}
    draw(tmp_path / "one", calls["one"], verdict)
    draw(tmp_path / "two", [*calls["two"], "sample.k=3"], verdict)
    path = next((tmp_path / "two").glob("samples-*.jsonl"))
    path.write_bytes(path.read_bytes()[:-20])  # killed while writing its last line
    draw(tmp_path / "two", calls["two"], verdict)
    results = {name: run(compose(call)) for name, call in calls.items()}
    kept = [key for key in LAST_LINE if key not in ("seconds", "store")]
    assert {key: results["one"][key] for key in kept} == {key: results["two"][key] for key in kept}
    one, two = (json.loads((tmp_path / name / "pass_rates.json").read_text()) for name in calls)
    assert one == two


def test_the_threshold_is_that_of_training(data: list[str], tmp_path: Path) -> None:
    call = [f"sample.out={tmp_path}", *data, "sample.limit=2"]
    draw(tmp_path, call, lambda question, sample: {"score": sample / 8, "acc": 0.0})
    assert run(compose(call))["mean"] == 0.5
    strict = run(compose([*call, "distill.context.success_threshold=0.75"]))
    assert strict["mean"] == 0.25
    assert json.loads((tmp_path / "pass_rates.json").read_text())["threshold"] == 0.75


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sample.temperature=0.5", "sampling.temperature: the store has 1.0, asked for 0.5"),
        ("sample.max_tokens=7", "sampling.max_tokens: the store has 48, asked for 7"),
        ("+verifier.options.strict=true", "verifier.kwargs.strict: the store has 'none', asked for True"),
    ],
)
def test_a_store_of_other_settings_is_refused_and_left_as_it_is(
    argument: str, message: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [f"sample.out={tmp_path}", *data, "sample.limit=1"]
    draw(tmp_path, call, lambda question, sample: right(True))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([*call, argument]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "sample.log"}
    assert before == after
    assert read_pass_rates(tmp_path).samples == 8


def test_a_sample_that_cannot_be_counted_is_one_line_too(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [f"sample.out={tmp_path}", *data, "sample.limit=1"]
    draw(tmp_path, call, lambda question, sample: {"score": None, "acc": 1.0})
    assert main(call) == 2
    captured = capsys.readouterr()
    assert "score is None; allowed: a finite number" in captured.err and captured.err.count("\n") == 1
    assert "{" not in captured.out and not (tmp_path / "pass_rates.json").exists()


# ---------------------------------------------------------------------------------------------------------- the shapes


def table(*pairs: tuple[int, int]) -> PassRateTable:
    rates = {f"q{i}": QuestionRate(f"q{i}", s, c, 8 - c, 0, 0, 1 / 3) for i, (s, c) in enumerate(pairs)}
    return PassRateTable(rates, {}, 8, Path("store"))


def test_nothing_measured_has_no_mean() -> None:
    summary = summarize(table((0, 0)))
    assert (summary["questions"], summary["kept"], summary["verifier_errors"]) == (1, 0, 8)
    assert {summary[key] for key in ("mean", "pass_rate_std", "share_zero", "share_one", "share_active")} == {None}
    json.dumps(file_content(table((0, 0)), 0.5, summary), allow_nan=False)


def test_the_histogram_line_by_line() -> None:
    lines = histogram(table(*[(0, 8)] * 4, (1, 8), (1, 8), (8, 8), (7, 7), (0, 0))).splitlines()
    assert lines[0] == "successes of 8  questions   share"
    assert lines[1] == "             0          4   50.0%  " + "#" * 40
    assert lines[2] == "             1          2   25.0%  " + "#" * 20
    assert lines[3] == "             2          0    0.0%"
    assert lines[9] == "             8          2   25.0%  " + "#" * 20
    assert lines[10] == " none verified          1"
    assert len(lines) == 11
