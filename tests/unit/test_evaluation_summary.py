"""The summary of one evaluation: mean@K, maj@K, pass@k, and what is refused."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from recipe.evaluation_summary import summarize
from recipe.score_interval import share_interval


def values(summary: dict[str, dict[str, float]]) -> dict[str, float]:
    return {key: entry["value"] for key, entry in summary.items()}


def test_keys_and_values_of_two_questions() -> None:
    found = summarize([[1, 1, 0, 0], [0, 0, 0, 1]], [["7", "7", "1", "2"], ["3", "3", "4", "9"]])
    assert values(found) == pytest.approx(
        {"mean@4": 0.375, "maj@4": 0.5, "pass@1": 0.375, "pass@2": (5 / 6 + 1 / 2) / 2, "pass@3": 0.875, "pass@4": 1.0}
    )
    assert all(set(entry) == {"value", "low", "high"} for entry in found.values())


def test_no_majority_without_answers() -> None:
    assert list(summarize(np.eye(4))) == ["mean@4", "pass@1", "pass@2", "pass@3", "pass@4"]


def test_answers_that_mean_the_same_are_not_merged_here() -> None:
    verdicts = [[1, 1, 0, 0, 0]]
    assert values(summarize(verdicts, [["1/2", "0.5", "7", "8", "9"]]))["maj@5"] == pytest.approx(0.4)
    assert values(summarize(verdicts, [["1/2", "1/2", "7", "8", "9"]]))["maj@5"] == 1.0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_pass_at_k_is_unbiased(rate: float) -> None:
    # Every outcome of 6 samples with its probability.
    expected = dict.fromkeys(range(1, 7), 0.0)
    for outcome in product([0, 1], repeat=6):
        weight = rate ** sum(outcome) * (1 - rate) ** (6 - sum(outcome))
        found = values(summarize([outcome]))
        for k in expected:
            expected[k] += weight * found[f"pass@{k}"]
    assert expected == pytest.approx({k: 1 - (1 - rate) ** k for k in expected})


def test_pass_at_one_is_the_mean_and_pass_at_k_rises() -> None:
    found = values(summarize(np.random.default_rng(0).random((20, 8)) < 0.3))
    passes = [found[f"pass@{k}"] for k in range(1, 9)]
    assert passes[0] == pytest.approx(found["mean@8"])
    assert passes == sorted(passes)


def test_intervals_are_over_questions() -> None:
    correct = np.random.default_rng(1).random((40, 8)) < 0.4
    entry = summarize(correct, level=0.9)["mean@8"]
    assert (entry["low"], entry["high"]) == pytest.approx(share_interval(correct.mean(axis=1), 0.9))


@pytest.mark.parametrize("verdict", [0, 1])
def test_all_right_or_all_wrong_still_has_an_interval(verdict: int) -> None:
    for entry in summarize(np.full((20, 3), verdict), [["1"] * 3] * 20).values():
        assert entry["value"] == verdict
        assert 0.1 < entry["high"] - entry["low"] < 0.3


def test_partly_right_samples_are_averaged_and_have_no_pass_at_k() -> None:
    assert values(summarize([[0.5, 1.0]])) == {"mean@2": 0.75}
    with pytest.raises(ValueError, match="pass@k needs verdicts of 0 or 1"):
        summarize([[0.5, 1.0]], ks=[1])


def test_chosen_k_only() -> None:
    assert list(summarize(np.eye(8), ks=[1, 4])) == ["mean@8", "pass@1", "pass@4"]


@pytest.mark.parametrize("k", [0, 3])
def test_k_without_as_many_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs at least"):
        summarize([[1, 0], [0, 0]], ks=[k])


@pytest.mark.parametrize(
    ("correct", "answers", "message"),
    [
        ([], None, "no questions"),
        ([[1], []], None, "question 1 has no samples"),
        ([[1, 0], [1]], None, "question 1 has 1 samples, question 0 has 2"),
        ([[1, 0], [2, 0]], None, "question 1 has 2"),
        ([[1, -1]], None, "question 0 has -1"),
        ([[1, math.nan]], None, "question 0 has nan"),
        ([[1, 0]], [], "answers of 0 questions for verdicts of 1"),
        ([[1, 0]], [["7"]], "2 verdicts for 1 answers"),
    ],
)
def test_what_cannot_be_summarised_is_refused(correct: list, answers: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(correct, answers)
