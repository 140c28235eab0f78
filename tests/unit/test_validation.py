"""Validation metrics: what is counted, what is left out, and under which name."""

from __future__ import annotations

from typing import Any

import pytest

from verl_ext.validation import validation_metrics


def measure(rows: list[tuple[str, str, float, str | None, str]], expected: dict | None = None) -> dict[str, float]:
    """Rows are (data source, uid, acc, pred, status)."""
    infos: dict[str, list[Any]] = {
        "reward": [row[2] for row in rows],
        "acc": [row[2] for row in rows],
        "pred": [row[3] for row in rows],
        "status": [row[4] for row in rows],
    }
    return validation_metrics([row[0] for row in rows], [row[1] for row in rows], infos, expected)


def sixteen(right: int, uid: str = "q") -> list[tuple[str, str, float, str | None, str]]:
    return [("s", uid, float(i < right), "7" if i < right else str(100 + i), "ok") for i in range(16)]


def test_sixteen_samples_with_four_right_give_the_closed_forms() -> None:
    values = measure(sixteen(4))
    assert values["val/mean@16"] == 0.25 and values["val/maj@16"] == 1.0
    assert values["val/pass@4"] == pytest.approx(0.728022, abs=5e-7)
    assert values["val/pass@8"] == pytest.approx(0.961538, abs=5e-7)
    assert {key for key in values if "pass@" in key} == {f"val/pass@{k}" for k in (1, 2, 4, 8, 16)}
    assert values["val/pass@1"] == pytest.approx(values["val/mean@16"])


def test_a_sample_that_never_came_back_counts_as_wrong_and_is_counted() -> None:
    values = measure(sixteen(4)[:12], {("s", "q"): 16})
    assert values["val/mean@16"] == 0.25 and values["val/missing_samples"] == 4


def test_a_question_none_of_whose_samples_came_back_counts_as_wrong() -> None:
    values = measure(sixteen(16), {("s", "q"): 16, ("s", "lost"): 16})
    assert values["val/mean@16"] == 0.5 and values["val/missing_samples"] == 16


def test_a_verifier_error_is_no_answer_and_is_counted_on_its_own() -> None:
    rows = sixteen(4)
    rows[15] = ("s", "q", 0.0, None, "error")
    for expected in (None, {("s", "q"): 16}):
        values = measure(rows, expected)
        assert values["val/verifier_errors"] == 1 and values["val/missing_samples"] == 0
        assert values["val/mean@16"] == pytest.approx(4 / 15), "the name says how many samples were asked for"
        assert "val/pass@8" in values and "val/pass@16" not in values


def test_errors_and_lost_samples_of_one_question_are_told_apart() -> None:
    rows = sixteen(4)[:10] + [("s", "q", 0.0, None, "error")] * 2
    values = measure(rows, {("s", "q"): 16})
    assert values["val/verifier_errors"] == 2 and values["val/missing_samples"] == 4
    assert values["val/mean@16"] == pytest.approx(4 / 14)


def test_a_question_with_verifier_errors_only_is_left_out_of_the_mean() -> None:
    rows = sixteen(4) + [("s", "broken", 0.0, None, "error")] * 16
    values = measure(rows, {("s", "q"): 16, ("s", "broken"): 16})
    assert values["val/mean@16"] == 0.25 and values["val/verifier_errors"] == 16


def test_nothing_but_verifier_errors_gives_counts_and_no_accuracy() -> None:
    values = measure([("s", "q", 0.0, None, "error")] * 3)
    assert values == {"val/missing_samples": 0.0, "val/verifier_errors": 3.0}


def test_several_data_sources_are_also_reported_one_by_one() -> None:
    rows = [("a", "1", 1.0, "x", "ok"), ("b", "2", 0.0, "y", "ok")]
    values = measure(rows)
    assert values["val/mean@1"] == 0.5
    assert (values["val/a/mean@1"], values["val/b/mean@1"]) == (1.0, 0.0)
    assert not [key for key in measure(rows[:1]) if "/a/" in key]


def test_equal_uids_of_two_data_sources_are_two_questions() -> None:
    values = measure([("a", "1", 1.0, "x", "ok"), ("b", "1", 0.0, "y", "ok")])
    assert values["val/mean@1"] == 0.5


def test_the_reward_serves_where_the_verifier_names_no_accuracy() -> None:
    values = validation_metrics(["s", "s"], ["q", "q"], {"reward": [1.0, 0.0]})
    assert values["val/mean@2"] == 0.5 and values["val/maj@2"] == 0.0


def test_no_name_holds_a_substring_that_verl_reduces_by() -> None:
    assert not [key for key in measure(sixteen(4)) if "min" in key or "max" in key]
