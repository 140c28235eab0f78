"""Scores of questions, and that validation in training and an evaluation give the same numbers for the same samples."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.evaluation_items import build_items
from recipe.evaluation_numbers import POOLED, group_numbers
from verl_ext.answer_keys import AnswerKeys
from verl_ext.question_scores import question_scores
from verl_ext.sampling import SampleRequest
from verl_ext.validation import validation_metrics


def test_scores_against_counting() -> None:
    rng = random.Random(0)
    correct = [[float(rng.random() < rate) for _ in range(5)] for rate in (0.0, 0.2, 0.5, 0.9)]
    answers = [["7" if right else rng.choice("12") for right in row] for row in correct]
    scores = question_scores(correct, answers, samples=5)
    assert list(scores) == ["mean@5", "maj@5", *(f"pass@{k}" for k in range(1, 6))]
    assert scores["mean@5"] == [sum(row) / 5 for row in correct]
    for k in range(1, 6):
        subsets = [list(combinations(row, k)) for row in correct]
        assert scores[f"pass@{k}"] == pytest.approx([sum(map(any, part)) / len(part) for part in subsets])
    for row, votes, found in zip(correct, answers, scores["maj@5"], strict=True):
        most = max(votes.count(vote) for vote in votes)
        winners = {vote for vote in votes if votes.count(vote) == most}
        assert found == pytest.approx(sum(vote == "7" for vote in winners) / len(winners))
        assert "7" not in winners or any(row)


def test_the_names_say_how_many_samples_were_asked_for() -> None:
    scores = question_scores([[1.0, 0.0], [1.0]], None, samples=4)
    assert scores == {"mean@4": [0.5, 1.0], "pass@1": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("correct", "ks", "message"),
    [
        ([], None, "no questions"),
        ([[1.0], []], [1], "pass@1 needs at least 1 samples, found 0"),
        ([[1.0, 0.0], [1.0]], [2], "pass@2 needs at least 2 samples, found 1"),
        ([[0.5]], [1], "pass@k needs verdicts of 0 or 1"),
    ],
)
def test_what_has_no_score_is_refused(correct: list[list[float]], ks: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        question_scores(correct, None, samples=2, ks=ks)


STATUS = st.sampled_from(["ok", "ok", "error"])
SAMPLE = st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from(["a", "A", "b", ""]), STATUS)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5).flatmap(lambda k: st.lists(st.lists(SAMPLE, min_size=k, max_size=k), min_size=1, max_size=6)))
def test_validation_and_evaluation_give_the_same_numbers(questions: list[list[tuple[float, str, str]]]) -> None:
    """Of the same samples, verifier errors and two data sources among them, with a rule of equivalence."""
    keys = AnswerKeys(lambda first, second: first.lower() == second.lower())
    requests = [
        SampleRequest(str(i), [{"role": "user", "content": "?"}], data_source="st"[i % 2], ground_truth="a")
        for i in range(len(questions))
    ]
    rows = [
        {"question_id": str(i), "sample": j, "acc": acc if status == "ok" else None, "pred": pred, "status": status}
        | {"tokens": 3, "truncated": False}
        for i, samples in enumerate(questions)
        for j, (acc, pred, status) in enumerate(samples)
    ]
    infos = {name: [row[name] for row in rows] for name in ("acc", "pred", "status")}
    sources = ["st"[int(row["question_id"]) % 2] for row in rows]
    asked = len(questions[0])
    expected = {("st"[i % 2], str(i)): asked for i in range(len(questions))}
    trained = validation_metrics(sources, [row["question_id"] for row in rows], infos, expected, keys)

    groups = group_numbers(build_items(requests, rows, asked, keys), samples=asked)
    evaluated = {f"val/{name}": entry["value"] for name, entry in groups[POOLED]["metrics"].items()}
    if f"val/maj@{asked}" not in evaluated and evaluated:
        # An evaluation does not show the majority of no answers at all; validation keeps the key, at 0.
        assert trained.pop(f"val/maj@{asked}") == 0.0
    judged_sources = {source for source, row in zip(sources, rows, strict=True) if row["status"] == "ok"}
    for source in judged_sources if len(judged_sources) > 1 else ():
        evaluated[f"val/{source}/mean@{asked}"] = groups[source]["metrics"][f"mean@{asked}"]["value"]
    shown = {name: value for name, value in evaluated.items() if "pass@" not in name or name in trained}
    counts = {"val/missing_samples": 0.0, "val/verifier_errors": float(groups[POOLED]["verifier_errors"])}
    assert trained == pytest.approx(shown | counts)
    assert {name for name in trained if "pass@" in name} <= set(evaluated)
