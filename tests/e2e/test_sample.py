"""The sampler on the real stack: verl's standalone rollout servers, then the same store topped up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from recipe.sample import compose, main
from recipe.sample_data import read_questions
from verl_ext.sample_store import read_store
from verl_ext.verifiers.tiny_world import compute_score

pytestmark = pytest.mark.e2e


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(arguments)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out.splitlines()[-1])


def test_samples_are_drawn_verified_and_topped_up(
    cluster: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    asked = ["model=tiny", "data=tiny_world", "hardware=cpu", f"data.val_files={data / 'test.parquet'}"]
    asked += [f"sample.out={out}", "sample.limit=4"]
    free = ray.available_resources()
    first = call(capsys, *asked, "sample.k=2")
    settings, before = read_store(out)
    second = call(capsys, *asked, "sample.k=3")
    after = read_store(out)[1]
    assert {name: ray.available_resources()[name] for name in ("CPU", "GPU")} == {k: free[k] for k in ("CPU", "GPU")}

    assert (first["questions"], first["samples"], first["drawn"], first["verifier_errors"]) == (4, 8, 8, 0)
    assert (second["questions"], second["samples"], second["drawn"]) == (4, 12, 4)
    assert after[:8] == before and sorted(row["sample"] for row in after) == [0] * 4 + [1] * 4 + [2] * 4
    assert {row["sample"] for row in after[8:]} == {2}
    # Real weights and not vLLM's dummy ones: the warm-started model answers in the tiny world's format.
    assert sum("\\boxed{" in row["text"] for row in after) >= 10
    assert settings["sampling"]["max_tokens"] == 48 and all(0 < row["tokens"] <= 48 for row in after)
    answers = {request.question_id: request for request in read_questions(compose([*asked, "sample.k=1"]), "test")[0]}
    for row in after:
        asked_for = answers[row["question_id"]]
        judged = compute_score("tiny_world", row["text"], asked_for.ground_truth, dict(asked_for.extra_info))
        assert (row["score"], row["pred"], row["status"]) == (judged["score"], judged["pred"], "ok")
