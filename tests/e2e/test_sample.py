"""The sampler on the real stack: an exported checkpoint on verl's rollout servers, then an evaluation that tops up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from recipe import compare_evaluations, evaluate
from recipe.evaluation_items import read_items
from recipe.export import export
from recipe.sample import compose, main
from recipe.sample_data import read_questions
from verl_ext.sample_store import read_store
from verl_ext.verifiers.tiny_world import compute_score

pytestmark = pytest.mark.e2e


def call(
    capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], int], *arguments: str | Path
) -> dict[str, Any]:
    code = command([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out.splitlines()[-1])


def test_samples_are_drawn_verified_topped_up_and_evaluated(
    cluster: None, data: Path, recorded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    asked = ["model=tiny", "data=tiny_world", "hardware=cpu", f"data.val_files={data / 'test.parquet'}"]
    export(recorded[1], tmp_path / "student")
    asked += [f"sample.out={out}", f"sample.checkpoint={tmp_path / 'student'}"]
    free = ray.available_resources()
    first = call(capsys, main, *asked, "sample.limit=4", "sample.k=2")
    settings, before = read_store(out)
    second = call(capsys, evaluate.main, *asked, "sample.limit=10", "sample.k=4")
    after = read_store(out)[1]
    assert {name: ray.available_resources()[name] for name in ("CPU", "GPU")} == {k: free[k] for k in ("CPU", "GPU")}

    assert (first["questions"], first["samples"], first["drawn"], first["verifier_errors"]) == (4, 8, 8, 0)
    assert (second["questions"], second["samples"], second["drawn"], second["verifier_errors"]) == (10, 40, 32, 0)
    assert after[:8] == before and sorted(row["sample"] for row in after) == [i for i in range(4) for _ in range(10)]
    by_question: dict[str, list[float]] = {}
    for row in after:
        by_question.setdefault(row["question_id"], []).append(row["acc"])
    shares = [sum(verdicts) / 4 for verdicts in by_question.values()]
    assert second["mean@4"] == pytest.approx(sum(shares) / 10, abs=1e-6)
    assert second["pass@4"] == pytest.approx(sum(share > 0 for share in shares) / 10, abs=1e-6)
    items = read_items(out / "items.jsonl")
    assert {item.item: sum(item.verdicts) / 4 for item in items} == {q: sum(v) / 4 for q, v in by_question.items()}
    written = json.loads((out / "evaluation.json").read_text())
    assert written["settings"] == settings and written["versions"]["vllm"]
    assert settings["model"]["path"] == str(tmp_path / "student")
    compared = call(capsys, compare_evaluations.main, out, out)
    assert (compared["value"], compared["n_items"], compared["verdict"]) == (0, 10, "no")
    # Real weights and not vLLM's dummy ones: the warm-started model answers in the tiny world's format.
    assert sum("\\boxed{" in row["text"] for row in after) >= 30
    assert settings["sampling"]["max_tokens"] == 48 and all(0 < row["tokens"] <= 48 for row in after)
    answers = {request.question_id: request for request in read_questions(compose([*asked, "sample.k=1"]), "test")[0]}
    for row in after:
        asked_for = answers[row["question_id"]]
        judged = compute_score("tiny_world", row["text"], asked_for.ground_truth, dict(asked_for.extra_info))
        assert (row["score"], row["pred"], row["status"]) == (judged["score"], judged["pred"], "ok")
