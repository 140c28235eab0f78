"""The sampler on the real stack: verl's standalone rollout servers, then the same store topped up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from data_prep.tiny_world import write_data
from recipe.cluster import ray_cluster
from recipe.sample import compose, main
from verl_ext.sample_store import read_store
from verl_ext.verifiers.tiny_world import compute_score

pytestmark = pytest.mark.e2e


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(arguments)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out.splitlines()[-1])


def test_samples_are_drawn_verified_and_topped_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world, out = tmp_path / "world", tmp_path / "store"
    write_data(world)
    asked = ["model=tiny", "data=tiny_world", "hardware=cpu", f"data.val_files={world / 'test.parquet'}"]
    asked += [f"sample.out={out}", "sample.limit=4"]
    # One cluster for both calls, which is how a pipeline of commands runs and leaves nothing behind in between.
    with ray_cluster(compose([*asked, "sample.k=2"])):
        free = ray.available_resources()
        first = call(capsys, *asked, "sample.k=2")
        settings, before = read_store(out)
        second = call(capsys, *asked, "sample.k=3")
        after = read_store(out)[1]
        assert {key: ray.available_resources()[key] for key in ("CPU", "GPU")} == {k: free[k] for k in ("CPU", "GPU")}
    assert not ray.is_initialized()

    assert (first["questions"], first["samples"], first["drawn"], first["verifier_errors"]) == (4, 8, 8, 0)
    assert (second["questions"], second["samples"], second["drawn"]) == (4, 12, 4)
    assert after[:8] == before and sorted(row["sample"] for row in after) == [0] * 4 + [1] * 4 + [2] * 4
    assert {row["sample"] for row in after[8:]} == {2}
    # Real weights and not vLLM's dummy ones: the warm-started model answers in the tiny world's format.
    assert sum("\\boxed{" in row["text"] for row in after) >= 10
    problems = {row["pred"]: row for row in after if row["score"] == 1.0}
    assert problems, "the model solves some of the easiest questions"
    for row in problems.values():
        assert compute_score("tiny_world", row["text"], row["pred"])["score"] == 1.0
    assert settings["sampling"]["max_tokens"] == 48 and all(0 < row["tokens"] <= 48 for row in after)
