"""`python -m recipe.sample` without a cluster: data, settings, refusals, the summary."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from data_prep.tiny_world import write_data
from recipe import drawing
from recipe.drawing import load_tokenizer
from recipe.sample import compose, main, run, summarize
from recipe.sample_data import read_questions
from recipe.sample_settings import SampleConfig
from verl_ext.batch_plan import teacher_prompts
from verl_ext.config import ConfigError, distill_config
from verl_ext.model_identity import model_identity
from verl_ext.sample_store import SampleStore, StoreError
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


# ---------------------------------------------------------------------------------------------- the teacher's prompts


class Servers:
    """In the rollout servers' place: keeps the prompts, answers with the end token."""

    def __init__(self, end: int) -> None:
        self.prompts: list[list[int]] = []
        self._end = end

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        self.prompts.append(prompt_ids)
        return SimpleNamespace(token_ids=[self._end], stop_reason="completed")


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    made = Servers(AutoTokenizer.from_pretrained(compose(["sample.out=x"]).actor_rollout_ref.model.path).eos_token_id)

    @contextmanager
    def started(*_: object) -> Iterator[tuple[Servers, list[int]]]:
        yield made, []

    monkeypatch.setattr(drawing, "rollout_client", started)
    return made


def with_solutions(questions: str, folder: Path, *solutions: str | None) -> str:
    """A file of the first questions, with these solutions."""
    table = pq.read_table(questions).slice(0, len(solutions))
    rows = copy.deepcopy(table.to_pylist())
    for row, solution in zip(rows, solutions, strict=True):
        row["extra_info"]["solution"] = solution
    path = folder / "questions.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return str(path)


def call_with_context(file: str, folder: Path, *more: str) -> list[str]:
    context = ["context=reference", "sample.context=true"]
    return [f"sample.out={folder / 'store'}", f"data.val_files={file}", "sample.k=1", *context, *more]


SOLUTIONS = ("1+2=3", "2+2=4", None, " \n", "1<|im_end|>", "<think>1+1</think>", "1+2=3 " * 100)


def test_the_ids_of_a_teacher_s_prompt_are_those_that_training_scores_under(
    questions: str, tmp_path: Path, servers: Servers
) -> None:
    file = with_solutions(questions, tmp_path, *SOLUTIONS)
    style = ["+data.apply_chat_template_kwargs.style=2", "+data.apply_chat_template_kwargs.more=3"]
    config = compose(call_with_context(file, tmp_path, *style, "+distill.context.template_kwargs.style=5"))
    model = config.actor_rollout_ref.model
    template = AutoTokenizer.from_pretrained(model.path).chat_template
    OmegaConf.update(model, "custom_chat_template", template + "{{ style }}{{ more }}", force_add=True)
    run(config)
    rows, tokenizer = pq.read_table(file).to_pylist(), load_tokenizer(config)
    ids = teacher_prompts(
        [row["prompt"] for row in rows],
        [row["extra_info"] for row in rows],
        context=distill_config(config.distill).context,
        tokenizer=tokenizer,
        template_kwargs={"style": 2, "more": 3},
    )
    assert [one is None for one in ids] == [False, False, True, True, True, True, True]
    # One request is answered after the other, but which is asked first is the sampler's.
    assert sorted(servers.prompts) == sorted(one for one in ids if one is not None)
    text = tokenizer.decode(ids[0])
    assert "1+2=3" in text and rows[0]["prompt"][0]["content"] in text and text.endswith("53")


def test_questions_without_a_teacher_s_prompt_are_named_and_counted(
    questions: str, tmp_path: Path, servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = call_with_context(with_solutions(questions, tmp_path, *SOLUTIONS), tmp_path)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert (summary["questions"], summary["drawn"], summary["left_out"]) == (2, 2, 5)
    ids = [request.question_id for request in read_questions(compose(arguments), "test")[0]]
    said = captured.out + captured.err
    assert f"3 questions are left out, without_reference: {ids[2]}, {ids[3]}, {ids[5]}\n" in said
    assert f"1 questions are left out, special_token: {ids[4]}\n" in said
    assert f"1 questions are left out, too_long: {ids[6]}\n" in said
    assert run(compose(arguments))["drawn"] == 0 and len(servers.prompts) == 2


def test_a_store_of_one_kind_of_prompt_takes_no_other(questions: str, tmp_path: Path, servers: Servers) -> None:
    arguments = call_with_context(with_solutions(questions, tmp_path, "1+2=3"), tmp_path)
    run(compose(arguments))
    with pytest.raises(StoreError, match=r"context\.kind: the store has 'reference', asked for 'none'"):
        run(compose([*arguments, "sample.context=false"]))
    with pytest.raises(StoreError, match=r"context\.reference_template"):
        run(compose([*arguments, "distill.context.reference_template='{prompt} {solution}'"]))
    other = tmp_path / "other"
    run(compose([*arguments, "sample.context=false", f"sample.out={other}"]))
    assert "context" not in json.loads((other / "manifest.json").read_text())["settings"]
    with pytest.raises(StoreError, match=r"context\.kind: the store has 'none', asked for 'reference'"):
        run(compose([*arguments, f"sample.out={other}"]))


@pytest.mark.parametrize(
    ("solutions", "more", "message"),
    [
        (["1"], ["context=sibling"], "distill.context.kind is 'sibling'; allowed: reference with sample.context=true"),
        (["1"], ["sample.context=3"], "sample.context is 3; allowed: true, false"),
        (["", "<|im_end|>"], [], "none of 2 questions has a teacher's prompt (without_reference 1, special_token 1)"),
        (["1"], ["distill.context.max_length=5"], "a teacher's prompt (too_long 1); see distill.context.reference_key"),
        (["1"], ["distill.context.reference_key=no"], "reference_key=no: no row has the reference text extra_info.no"),
        (["1"], ["sample.max_tokens=500"], "is more than the model length 512 of the servers"),
    ],
)
def test_a_context_that_cannot_be_is_refused(
    solutions: list[str],
    more: list[str],
    message: str,
    questions: str,
    tmp_path: Path,
    servers: Servers,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(call_with_context(with_solutions(questions, tmp_path, *solutions), tmp_path, *more)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and servers.prompts == []


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
