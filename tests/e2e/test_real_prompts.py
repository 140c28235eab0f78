"""Real prompts and real verifiers on the real stack: nothing is lost on the way, whatever the score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import sciknoweval, tooluse
from data_prep.random_model import write_model

pytestmark = pytest.mark.e2e

# Rows in the released schemas, for machines that do not have the data sets.
QUESTION = {
    "prompt": {"default": "Please select the right answer."},
    "choices": {"text": ["2 m/s", "4 m/s", "6 m/s", "8 m/s"], "label": ["A", "B", "C", "D"]},
    "type": "mcq-4-choices",
    "domain": "Physics",
    "details": {"level": "L3", "task": "general_physics_calculation", "subtask": "x", "source": "SciBench"},
    "answer": "",
}
TOOLS = (
    "Your task is to answer the user's question using available tools. \nYou have access to the following tools:\n"
    "Name: Clock\nDescription: Tells the time\nDocumentation:\ngetTime: The time in a city.\n"
    'Parameters: {"city": "Required. string. The city."}\nOutput: Successful response.\n\nUse the following format:\n'
    "Thought: you should always think about what to do\nAction: the action to take, should be one of the tool names.\n"
    "Action Input: the input to the action, must be in JSON format. All of the action input must be realistic and from "
    "the user.\n\nBegin!\nQuestion: What time is it in "
)


def _sources(folder: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """The released files, or rows in their schema."""
    try:
        real = request.getfixturevalue("real_data")
    except pytest.skip.Exception:
        physics = folder / "physics.jsonl"
        rows = [
            {**QUESTION, "question": f"A cart moves {2 * i} m in {i} s. Its speed?", "answerKey": "A"}
            for i in range(1, 41)
        ]
        physics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        calls = folder / "tooluse" / "test.json"
        calls.parent.mkdir()
        gold = [{"Action": "getTime", "Action_Input": '{"city": "Oslo"}'}]
        row = {"system": None, "answer": json.dumps(gold), "tests": "-", "kind": "tooluse", "dataset": "tooluse"}
        cities = ("Oslo", "Rome", "Lima", "Bonn", "Cork", "Kiel")
        lines = [
            {**row, "idx": i, "prompt": f"{TOOLS}{city}?", "description": f"{TOOLS}{city}?", "elo": 1500}
            for i, city in enumerate(cities)
        ]
        calls.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return physics, calls.parent
    return real / "sciknoweval_raw" / "Physics", real / "tooluse"


def _shortest(path: Path, count: int) -> list[dict[str, Any]]:
    """The shortest prompts of a file, as they are: a byte-level model makes a token of every byte."""
    rows = pq.read_table(path).to_pylist()
    return sorted(rows, key=lambda row: sum(len(message["content"]) for message in row["prompt"]))[:count]


def test_real_prompts_reach_the_model_and_every_response_is_judged(
    tmp_path: Path, request: pytest.FixtureRequest, runs: Any, records: Any
) -> None:
    physics, calls = _sources(tmp_path, request)
    assert sciknoweval.run(["--out", str(tmp_path / "sci"), "--source", str(physics), "--domain", "physics"]) == 0
    assert tooluse.run(["--out", str(tmp_path / "tools"), "--source", str(calls)]) == 0
    rows = _shortest(tmp_path / "sci" / "train.parquet", 4) + _shortest(tmp_path / "tools" / "test.parquet", 4)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "both.parquet")
    write_model(tmp_path / "model", positions=16384)
    # A random model that reads bytes; both kinds of questions in one batch, each judged by its own verifier.
    _, output = runs(
        "real_prompts",
        "data=tooluse",
        "method=sdpo",
        # No right answer is to be expected of noise: the verifier's words on the attempt are the teacher's context.
        "context=sibling_feedback",
        f"verifier.function={Path(__file__).with_name('verifier_by_source.py')}:compute_score",
        f"actor_rollout_ref.model.path={tmp_path / 'model'}",
        f"data.train_files={tmp_path / 'both.parquet'}",
        f"data.val_files={tmp_path / 'both.parquet'}",
        "data.train_batch_size=8",
        "data.max_prompt_length=7000",
        "data.max_response_length=48",
        "distill.context.max_length=8000",
        "distill.samples.per_step=16",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.max_model_len=16384",
        "actor_rollout_ref.rollout.max_num_batched_tokens=16384",
        "verifier.max_error_rate=0",
        steps=1,
        replay=False,
    )
    record = records(output)[0]
    # All eight questions with both rollouts came back, were judged, and were given to the teacher with their feedback.
    assert (record["rollout/groups"], record["rollout/groups_short"], record["rollout/groups_lost"]) == (8, 0, 0)
    assert (record["verifier/errors"], record["verifier/timeouts"]) == (0, 0)
    shown = [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]
    assert len(shown) == 16
    assert {row["prompt"] for row in shown} == {row["prompt"][-1]["content"] for row in rows}
    assert all(row["teacher_context"] for row in shown)
    assert record["distill/loss"] > 0 and record["actor/grad_norm"] > 0
