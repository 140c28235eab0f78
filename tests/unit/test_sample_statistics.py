"""mean@k, maj@k and pass@k against closed forms."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_ext.sample_statistics import majority_correct, mean_at_k, pass_at_k


@pytest.mark.parametrize(("k", "expected"), [(1, 0.25), (4, 0.728022), (8, 0.961538), (13, 1.0), (16, 1.0)])
def test_pass_at_k_of_four_right_samples_in_sixteen(k: int, expected: float) -> None:
    assert pass_at_k(16, 4, k) == pytest.approx(expected, abs=5e-7)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(case: tuple[int, int, int]) -> None:
    n, right, k = case
    subsets = list(combinations([1] * right + [0] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_is_refused_without_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs"):
        pass_at_k(4, 2, k)


def test_mean_at_k_averages_over_questions_not_over_samples() -> None:
    assert mean_at_k([[1, 1, 1, 1], [0]]) == 0.5


@pytest.mark.parametrize("rows", [[], [[]], [[1.0], []]])
def test_a_mean_over_nothing_is_refused(rows: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="no samples"):
        mean_at_k(rows)


def test_the_majority_may_be_right_although_few_samples_are() -> None:
    assert majority_correct([1, 1, 0, 0, 0], ["7", "7", "1", "2", "3"]) == 1.0


def test_a_majority_of_wrong_answers_outvotes_right_ones() -> None:
    assert majority_correct([1, 0, 0], ["7", "2", "2"]) == 0.0


def test_a_tie_counts_as_a_fair_draw_among_the_most_frequent_answers() -> None:
    assert majority_correct([1, 0], ["7", "2"]) == 0.5
    assert majority_correct([1, 0, 0], ["7", "2", "3"]) == pytest.approx(1 / 3)


def test_samples_without_an_answer_do_not_vote() -> None:
    assert majority_correct([1, 0, 0, 0], ["7", None, "", None]) == 1.0
    assert majority_correct([0, 0], [None, ""]) == 0.0


def test_votes_need_one_answer_a_verdict() -> None:
    with pytest.raises(ValueError, match="2 verdicts for 1 answers"):
        majority_correct([1, 0], ["7"])


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=9))
def test_the_majority_does_not_depend_on_the_order_of_the_samples(rows: list[tuple[bool, str | None]]) -> None:
    def verdict(part: list[tuple[bool, str | None]]) -> float:
        return majority_correct([float(right) for right, _ in part], [answer for _, answer in part])

    assert verdict(rows) == pytest.approx(verdict(rows[::-1]))
