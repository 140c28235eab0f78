"""Counts by question in the rows of a study."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipe.study_items import pack_items, questions_digest, read_question_ids, unpack_items, write_questions
from verl_ext.config import ConfigError


def validation(step: int, right: list[float], judged: list[int] | None = None, k: int = 4) -> dict[str, Any]:
    items = [f"q{index}" for index in range(len(right))]
    return {"step": step, "samples": k, "items": items, "right": right, "judged": judged or [k] * len(right)}


def row(*validations: dict[str, Any]) -> dict[str, Any]:
    packed = pack_items(validations)
    return {"run_id": "grpo-seed0-1", **({"items": packed} if packed else {})}


def test_counts_come_back_step_by_step() -> None:
    made = json.loads(json.dumps(row(validation(0, [0, 4, 1]), validation(40, [4, 4, 2.5]))))
    assert made["items"]["right"] == {"0": "0 4 1", "40": "4 4 2.5"} and made["items"]["judged"] == {}
    first, last = unpack_items(made, 0), unpack_items(made, "40")
    assert first.mean_P == (0.0, 1.0, 0.25) and last.mean_P == (1.0, 1.0, 0.625)
    assert first.samples == 4 and first.questions == last.questions == questions_digest(["q0", "q1", "q2"])
    assert first.mean == pytest.approx(1.25 / 3)


def test_a_question_that_no_verifier_judged_is_no_number() -> None:
    made = row(validation(0, [0, 2], judged=[0, 3]), validation(9, [1, 1]))
    assert made["items"]["judged"] == {"0": "0 3"}
    found = unpack_items(made, 0)
    assert math.isnan(found.mean_P[0]) and found.mean_P[1] == pytest.approx(2 / 3)
    assert found.mean == pytest.approx(2 / 3), "as mean@k leaves it out"
    assert unpack_items(made, 9).mean_P == (0.25, 0.25)


def test_pass_at_k_by_question_is_unbiased_and_refuses_more_than_there_are() -> None:
    found = unpack_items(row(validation(0, [1, 4, 0], judged=[4, 4, 0])), 0)
    assert found.pass_P(2)[:2] == (pytest.approx(0.5), 1.0) and math.isnan(found.pass_P(2)[2])
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples, found 4"):
        found.pass_P(5)
    with pytest.raises(ValueError, match="partly right"):
        unpack_items(row(validation(0, [1.5])), 0).pass_P(1)


def test_an_older_row_and_a_step_without_counts_have_none() -> None:
    assert pack_items([]) is None
    assert unpack_items({"run_id": "old"}, 0) is None and unpack_items(row(validation(0, [1])), 40) is None


def test_validations_of_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="step 40 has other questions"):
        pack_items([validation(0, [1, 1]), validation(40, [1])])


@pytest.mark.parametrize(
    ("right", "judged", "message"),
    [("5 0", None, "5 right of 4 judged answers, of 4 samples"), ("1 x", None, "expected numbers, found '1 x'"),
     ("1 1", "4", "2 counts of right answers and 1 of judged ones"), ("", None, "0 counts"),
     ("1 1", "4 9", "9 judged")],
)  # fmt: skip
def test_counts_that_cannot_be_name_the_run(right: str, judged: str | None, message: str) -> None:
    items = {"questions": "d", "samples": 4, "right": {"0": right}, "judged": {} if judged is None else {"0": judged}}
    with pytest.raises(ConfigError, match=f"row grpo-seed0-1, items of step 0: .*{message}"):
        unpack_items({"run_id": "grpo-seed0-1", "items": items}, 0)


def test_the_questions_stand_once_beside_the_rows(tmp_path: Path) -> None:
    questions = ["q1", "q2 with a space"]
    path = write_questions(tmp_path / "study", questions)
    assert path.name == f"questions-{questions_digest(questions)}.txt"
    assert read_question_ids(path.parent, questions_digest(questions)) == questions
    before = path.stat().st_mtime_ns
    assert write_questions(path.parent, questions) == path and path.stat().st_mtime_ns == before
    assert read_question_ids(path.parent, "0" * 12) is None
    path.write_text("q1\n")
    with pytest.raises(ConfigError, match="holds other questions than its name says"):
        read_question_ids(path.parent, questions_digest(questions))
