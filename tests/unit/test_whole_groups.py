"""Which groups of a batch are whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_ext.whole_groups import check_whole, sort_groups


def keys(uid: str, *rollouts: int) -> list[str]:
    return [f"{uid}_{number}_0" for number in rollouts]


def test_short_failed_and_missing_groups_are_told_apart() -> None:
    rows = [*keys("a", 0, 1), *keys("b", 1), *keys("d", 0, 1)]
    found = sort_groups(["a", "b", "c", "d"], failed=["b", "c", "d"], keys=rows, rollouts=2)
    # d has all its rows, and verl says that a rollout of it raised: not trusted.
    assert (found.whole, found.short, found.lost) == (("a",), ("b", "d"), ("c",))


def test_a_finished_group_with_too_few_rows_is_short() -> None:
    assert sort_groups(["a"], failed=[], keys=keys("a", 0, 2), rollouts=3).short == ("a",)


def test_several_outputs_of_a_rollout_count_once() -> None:
    rows = ["a_0_0", "a_0_1", "a_1_0"]
    assert sort_groups(["a"], failed=[], keys=rows, rollouts=2).whole == ("a",)
    assert sort_groups(["a"], failed=[], keys=rows[:2], rollouts=2).short == ("a",)


def test_a_uid_may_hold_an_underscore() -> None:
    assert sort_groups(["a_b"], failed=[], keys=["a_b_0_0"], rollouts=1).whole == ("a_b",)


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.sets(st.integers(0, 3)), st.booleans())))
def test_what_is_whole_is_what_a_count_by_hand_says(groups: dict[str, tuple[set[int], bool]]) -> None:
    rows = [key for uid, (rollouts, _) in groups.items() for key in keys(uid, *rollouts)]
    failed = [uid for uid, (_, raised) in groups.items() if raised]
    found = sort_groups(list(groups), failed, rows, rollouts=4)
    assert set(found.whole) == {uid for uid, (rollouts, raised) in groups.items() if len(rollouts) == 4 and not raised}
    assert sorted([*found.whole, *found.short, *found.lost]) == sorted(groups)
    check_whole([uid for uid in found.whole for _ in groups[uid][0]], 4)


@pytest.mark.parametrize("rows", (["a", "a", "b"], ["b", "a", "a", "a", "b"]))
def test_a_batch_with_a_group_that_is_not_whole_is_refused_by_name(rows: list[str]) -> None:
    bad = "b" if len(rows) == 3 else "a"
    with pytest.raises(ValueError, match=f"group {bad} has {rows.count(bad)} rollouts in the batch, a whole one has 2"):
        check_whole(rows, 2)
