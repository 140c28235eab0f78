"""The order of a run's questions: whole epochs without a gap, and a place in it that a checkpoint holds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.question_stream import QuestionStream

KEPT = st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True)
TAKES = st.lists(st.integers(0, 15), max_size=8)


@settings(max_examples=60, deadline=None)
@given(kept=KEPT, counts=TAKES, seed=st.integers(0, 5), shuffle=st.booleans())
def test_every_kept_question_comes_once_an_epoch_and_epochs_have_no_gap(
    kept: list[int], counts: list[int], seed: int, shuffle: bool
) -> None:
    stream = QuestionStream(kept, seed=seed, shuffle=shuffle)
    batches = [stream.take(count) for count in counts]
    assert [len(batch) for batch in batches] == counts, "a batch is always whole"
    taken = [position for batch in batches for position in batch]
    for start in range(0, len(taken), len(kept)):
        epoch = taken[start : start + len(kept)]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(kept)
        if len(epoch) == len(kept) and not shuffle:
            assert epoch == kept


@settings(max_examples=40, deadline=None)
@given(kept=KEPT, counts=TAKES, seed=st.integers(0, 5))
def test_the_order_does_not_depend_on_how_it_is_cut_into_batches(kept: list[int], counts: list[int], seed: int) -> None:
    one, other = QuestionStream(kept, seed=seed), QuestionStream(kept, seed=seed)
    assert [position for count in counts for position in one.take(count)] == other.take(sum(counts))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    kept = list(range(30))
    stream = QuestionStream(kept, seed=1)
    first, second = stream.take(30), stream.take(30)
    assert first != second and first != kept and sorted(first) == sorted(second) == kept
    assert QuestionStream(kept, seed=2).take(30) != first
    assert QuestionStream(kept, seed=1).take(30) == first
    assert QuestionStream(range(1, 31), seed=1).take(30) == [position + 1 for position in first]


@settings(max_examples=60, deadline=None)
@given(kept=KEPT, before=TAKES, after=TAKES, shuffle=st.booleans())
def test_a_restored_stream_goes_on_like_an_uninterrupted_one(
    kept: list[int], before: list[int], after: list[int], shuffle: bool
) -> None:
    stream = QuestionStream(kept, seed=3, shuffle=shuffle)
    for count in before:
        stream.take(count)
    state = json.loads(json.dumps(stream.state_dict()))
    restored = QuestionStream(kept, seed=3, shuffle=shuffle)
    restored.load_state_dict(state)
    assert [restored.take(count) for count in after] == [stream.take(count) for count in after]
    assert restored.state_dict() == stream.state_dict()


@settings(max_examples=40, deadline=None)
@given(first=KEPT, second=KEPT, before=st.integers(0, 30), after=st.integers(0, 30))
def test_other_questions_begin_a_new_epoch_and_can_be_restored(
    first: list[int], second: list[int], before: int, after: int
) -> None:
    stream = QuestionStream(first, seed=4)
    stream.take(before)
    epoch = stream.epoch
    stream.keep(second)
    assert (stream.epoch, stream.position, len(stream)) == (epoch + 1, 0, len(second))
    state = stream.state_dict()
    taken = stream.take(len(second))
    assert sorted(taken) == sorted(second)
    restored = QuestionStream(second, seed=4)
    restored.load_state_dict(state)
    assert restored.take(len(second) + after) == taken + stream.take(after)


def test_the_same_questions_kept_again_are_shuffled_again() -> None:
    kept = list(range(20))
    stream = QuestionStream(kept, seed=0)
    before = stream.take(20)
    stream.keep(kept)
    assert stream.take(20) != before


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no question is left"):
        QuestionStream([])
    with pytest.raises(ValueError, match="stands twice"):
        QuestionStream([1, 2, 1])
    stream = QuestionStream([1, 2, 3], seed=5)
    state = stream.state_dict()
    with pytest.raises(ValueError, match="kept="):
        QuestionStream([1, 2, 4], seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=5, this run has 6"):
        QuestionStream([1, 2, 3], seed=6).load_state_dict(state)
    with pytest.raises(ValueError, match="no question is left"):
        stream.keep([])
