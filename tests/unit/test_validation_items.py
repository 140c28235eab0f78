"""Right answers by question: names, order, and that mean@k of the same validation follows from them."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from verl_ext.validation import group_answers, metrics_of
from verl_ext.validation_items import NamingLoader, item_counts, question_name


def batch(ids: list[str | None]) -> dict[str, Any]:
    infos = np.array([{} if name is None else {"question_id": name} for name in ids], dtype=object)
    prompts = np.empty(len(ids), dtype=object)
    prompts[:] = [[{"role": "user", "content": f"{index}"}] for index in range(len(ids))]
    return {"extra_info": infos, "raw_prompt": prompts}


def validate(
    rows: list[tuple[str, str, float, str]], asked: dict[tuple[str, str], int], names: list[str]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Rows are (data source, uid, acc, status)."""
    infos = {"acc": [row[2] for row in rows], "status": [row[3] for row in rows]}
    questions = group_answers([row[0] for row in rows], [row[1] for row in rows], infos, asked)
    return item_counts(questions, list(asked), names), metrics_of(questions)


def test_the_loader_names_the_questions_of_the_last_round_in_order() -> None:
    batches = [batch(["b", "a"]), batch(["c"])]
    loader = NamingLoader(batches)
    assert len(loader) == 2
    for _ in range(2):
        assert [id(one) for one in loader] == [id(one) for one in batches]
        assert loader.names == ["b", "a", "c"]


def test_a_question_without_an_id_is_known_by_its_prompt() -> None:
    loader = NamingLoader([batch([None, None])])
    list(loader)
    first, second = loader.names
    assert first != second and first == question_name({}, [{"role": "user", "content": "0"}])
    assert question_name({"question_id": "q"}, "any") == "q"
    without = {"raw_prompt": batch([None])["raw_prompt"]}
    assert list(NamingLoader([without])) == [without], "a data set may have no extra_info at all"


def test_counts_are_sorted_by_item_whatever_the_order_of_the_answers() -> None:
    asked = {("s", "u1"): 2, ("s", "u2"): 2, ("t", "u3"): 2}
    rows = [("t", "u3", 1.0, "ok"), ("s", "u2", 0.0, "ok"), ("s", "u1", 1.0, "ok"), ("t", "u3", 1.0, "ok")]
    rows += [("s", "u1", 0.0, "ok"), ("s", "u2", 0.0, "ok")]
    expected = {"samples": 2, "items": ["a", "b", "c"], "sources": ["s", "t", "s"], "right": [0, 2, 1]}
    for order in (rows, rows[::-1]):
        counts, _ = validate(order, asked, ["c", "a", "b"])
        assert counts == {**expected, "judged": [2, 2, 2]}


def test_a_question_that_stands_in_the_data_twice_is_two_items() -> None:
    counts, _ = validate([("s", "u1", 1.0, "ok"), ("s", "u2", 0.0, "ok")], {("s", "u1"): 1, ("s", "u2"): 1}, ["a", "a"])
    assert counts["items"] == ["a", "a#2"] and counts["right"] == [1, 0]


def test_lost_samples_are_wrong_and_verifier_errors_are_not_judged() -> None:
    asked = {("s", "u1"): 3, ("s", "u2"): 3, ("s", "u3"): 3}
    rows = [("s", "u1", 1.0, "ok"), ("s", "u2", 1.0, "ok"), ("s", "u2", 0.0, "error"), ("s", "u2", 0.5, "ok")]
    rows += [("s", "u3", 0.0, "error")] * 3
    counts, _ = validate(rows, asked, ["a", "b", "c"])
    assert counts["samples"] == 3
    assert (counts["right"], counts["judged"]) == ([1, 1.5, 0], [3, 2, 0])


def test_names_and_questions_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="1 questions were validated, and the loader named 2"):
        validate([("s", "u1", 1.0, "ok")], {("s", "u1"): 1}, ["a", "b"])


@pytest.mark.parametrize("seed", range(20))
def test_mean_at_k_of_the_counts_is_the_metric(seed: int) -> None:
    rng = random.Random(seed)
    k, count = rng.randint(1, 8), rng.randint(1, 12)
    asked = {(rng.choice("st"), f"u{i}"): k for i in range(count)}
    rows = [
        (source, uid, float(rng.random() < 0.5), rng.choice(["ok", "ok", "error"]))
        for source, uid in asked
        for _ in range(rng.randint(0, k))
    ]
    # Without a question that has all of its k samples, lost ones are added until there are as many.
    counts, metrics = validate(rows, asked, [f"q{i}" for i in range(count)])
    shares = [right / judged for right, judged in zip(counts["right"], counts["judged"], strict=True) if judged]
    if shares:
        assert math.fsum(shares) / len(shares) == pytest.approx(metrics[f"val/mean@{counts['samples']}"], abs=1e-12)
    assert len(set(counts["items"])) == count
