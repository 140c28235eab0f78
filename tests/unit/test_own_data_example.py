"""The example of docs/your_own_data.md does what the page says, through the checks and the loader that a run uses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from data_prep.schema import check_row
from recipe.compose import compose_config
from recipe.preflight import check_parquet
from verl_ext.verification import Verdict, Verifier
from verl_ext.verifier_config import check_function, verifier_config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "word_count_verifier.py"
KEYS = {"score", "acc", "pred", "format", "feedback", "status"}


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "word_count_verifier"}
    exec(compile(EXAMPLE.read_text(encoding="utf-8"), str(EXAMPLE), "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    ("response", "truth", "score", "status", "feedback"),
    [
        ("Rain fell softly.", "3", 1.0, "ok", ""),
        ("Rain fell.", "3", 0.0, "ok", "few"),
        ("Rain fell on all of us.", "3", 0.0, "ok", "many"),
        ("", "3", 0.0, "ok", "few"),
        ("Rain fell softly.", "three", 0.0, "error", ""),
    ],
)
def test_the_verdict_always_has_the_same_keys(
    example: dict[str, Any], response: str, truth: str, score: float, status: str, feedback: str
) -> None:
    verdict = example["compute_score"]("word_count", response, truth, {})
    assert set(verdict) == KEYS
    assert (verdict["score"], verdict["acc"], verdict["status"]) == (score, score, status)
    assert feedback in verdict["feedback"] and truth not in verdict["feedback"]


def test_the_example_s_data_pass_the_checks_of_a_run(example: dict[str, Any], tmp_path: Path) -> None:
    example["write_data"](tmp_path)
    ids = []
    for split, rows in (("train", 32), ("test", 16)):
        path = tmp_path / f"{split}.parquet"
        check_parquet(path, f"data.{split}_files")
        table = parquet.read_table(path).to_pylist()
        assert len(table) == rows
        for row in table:
            check_row(row)
        ids += [row["extra_info"]["question_id"] for row in table]
    assert len(set(ids)) == len(ids), "no question is in both splits"


def test_a_run_takes_the_verifier_by_its_path() -> None:
    config = compose_config([f"verifier.function={EXAMPLE}:compute_score", "verifier.processes=1"])
    check_function(verifier_config(config.verifier))
    verifier = Verifier.from_config(config, workers=1)
    call = verifier(data_source="word_count", solution_str="Rain fell softly.", ground_truth="3", extra_info={})
    verdict = asyncio.run(call)
    verifier.close()
    assert verdict == Verdict(score=1.0, acc=1.0, pred="3", status="ok", feedback=None, error=None, format=1.0)
    assert len(json.dumps(verifier.identity)) > 0 and len(verifier.identity["source"]) == 32


def test_the_page_shows_the_keys_and_the_columns_that_the_code_has(example: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "your_own_data.md").read_text(encoding="utf-8")
    for name in (*KEYS, "data_source", "prompt", "ability", "reward_model", "extra_info", "question_id"):
        assert f"`{name}`" in page, name
    assert "docs/examples/word_count_verifier.py" in page
