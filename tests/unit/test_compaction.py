"""Compaction: rows whose loss is exactly zero are left out, and nothing else changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.compaction import PADDING_ROW, PADDING_ROW_TOKENS, keep_rows, plan_mini_batches


def plan(keep, *, rows=4, ranks=1, lengths=None, teacher=None, tokens=None, padding=None):
    count = len(keep)
    return plan_mini_batches(
        keep,
        tokens or [10] * count,
        lengths or [100] * count,
        teacher or [0] * count,
        mini_batch_rows=rows,
        ranks=ranks,
        padding_N=padding,
    )


# --------------------------------------------------------------------------------------------------------------- keep


def test_distillation_only_keeps_rows_with_weight_and_context():
    keep = keep_rows([1.0, 0.0, 2.0, 0.0], [True, True, False, False], coefficient=1.0)
    assert keep.tolist() == [True, False, False, False]


def test_policy_gradient_only_keeps_rows_with_an_advantage():
    keep = keep_rows([1.0] * 3, [True] * 3, coefficient=0.0, advantages_N=[0.0, -0.5, 0.0])
    assert keep.tolist() == [False, True, False]


def test_a_blend_keeps_a_row_for_either_term():
    keep = keep_rows([1.0, 0.0, 0.0], [True, True, False], coefficient=0.3, advantages_N=[0.0, 0.1, 0.0])
    assert keep.tolist() == [True, True, False]


def test_advantages_do_not_count_where_the_policy_gradient_is_off():
    assert keep_rows([0.0], [True], coefficient=1.0, advantages_N=[3.0]).tolist() == [False]


def test_unknown_advantages_keep_every_row():
    assert keep_rows([0.0] * 2, [False] * 2, coefficient=0.9).all()


@pytest.mark.parametrize("name", ["kl_coefficient", "entropy_coefficient"])
def test_kl_and_entropy_keep_every_row(name):
    assert keep_rows([0.0] * 2, [False] * 2, coefficient=1.0, **{name: -0.001}).all()
    assert not keep_rows([0.0] * 2, [False] * 2, coefficient=1.0, **{name: 0.0}).any()


def test_other_terms_keep_their_rows():
    assert keep_rows([0.0] * 2, [False] * 2, coefficient=1.0, other_terms_N=[False, True]).tolist() == [False, True]


def test_padding_rows_are_never_kept():
    keep = keep_rows([1.0] * 2, [True] * 2, coefficient=0.5, kl_coefficient=0.1, padding_N=[False, True])
    assert keep.tolist() == [True, False]


def test_bad_input_names_the_row_or_column():
    with pytest.raises(ValueError, match="row 1: weights is nan"):
        keep_rows([1.0, float("nan")], [True] * 2, coefficient=1.0)
    with pytest.raises(ValueError, match="row 0: advantages is inf"):
        keep_rows([1.0], [True], coefficient=0.5, advantages_N=[float("inf")])
    with pytest.raises(ValueError, match="coefficient is 1.5"):
        keep_rows([1.0], [True], coefficient=1.5)
    with pytest.raises(ValueError, match="kl_coefficient"):
        keep_rows([1.0], [True], coefficient=1.0, kl_coefficient=float("nan"))
    with pytest.raises(ValueError, match="distill has 1 entries for 2 rows"):
        keep_rows([1.0, 1.0], [True], coefficient=1.0)
    with pytest.raises(ValueError, match="ranks is 0"):
        plan([True], ranks=0)
    with pytest.raises(ValueError, match="mini_batch_rows is 0"):
        plan([True], rows=0)
    with pytest.raises(ValueError, match="row 1: student_lengths is -1"):
        plan([True, True], lengths=[1, -1])


# -------------------------------------------------------------------------------------------------------- mini-batches


def test_rows_are_left_out_inside_their_mini_batch():
    result = plan([True, False, False, True, False, True, False, False], tokens=[1, 2, 3, 4, 5, 6, 7, 8])
    assert [batch.rows for batch in result.mini_batches] == [[0, 3], [5]]
    # denominators are those of the whole mini-batch
    assert [(batch.row_count, batch.token_count) for batch in result.mini_batches] == [(4, 10), (4, 26)]
    assert [batch.padding for batch in result.mini_batches] == [0, 0]


def test_a_mini_batch_without_rows_is_skipped_and_counted():
    result = plan([False] * 4 + [True] * 4 + [False] * 4)
    assert [batch.number for batch in result.mini_batches] == [1]
    assert result.skipped == 2 and result.metrics["compaction/updates_skipped"] == 2
    empty = plan([False] * 8, ranks=4)
    assert empty.mini_batches == () and empty.skipped == 2


def test_padding_goes_to_a_multiple_of_the_ranks_only():
    result = plan([True] * 5 + [False] * 59, rows=64, ranks=4)
    (batch,) = result.mini_batches
    assert (batch.size, batch.padding, batch.row_count) == (8, 3, 64)
    assert batch.rows == [0, 1, 2, 3, 4] and batch.order.count(PADDING_ROW) == 3
    assert result.metrics["compaction/padding_rows"] == 3
    assert [len(rank) for rank in batch.ranks] == [2, 2, 2, 2]


def test_fewer_rows_than_ranks():
    (batch,) = plan([True] + [False] * 3, ranks=8).mini_batches
    assert batch.size == 8 and batch.rows == [0]


def test_ranks_are_balanced_by_student_and_teacher_tokens():
    # equal student lengths: only the teacher's can tell the rows apart
    (batch,) = plan([True] * 4, ranks=2, lengths=[50] * 4, teacher=[1000, 900, 200, 100]).mini_batches
    assert sorted(sorted(rank) for rank in batch.ranks) == [[0, 3], [1, 2]]


def test_rows_that_verl_appended_are_dropped_before_anything_is_counted():
    keep = [True, True, True, False]
    result = plan(keep, rows=3, padding=[False, True, False, False], tokens=[1, 100, 2, 3])
    (batch,) = result.mini_batches
    assert batch.rows == [0, 2] and (batch.row_count, batch.token_count) == (3, 6)
    assert result.metrics["compaction/rows"] == 3


def test_a_last_short_mini_batch_keeps_its_own_count():
    assert [batch.row_count for batch in plan([True] * 6).mini_batches] == [4, 2]


def test_metrics_tell_what_was_saved():
    metrics = plan([True, False, True, False], lengths=[100, 300, 100, 300], teacher=[0, 0, 100, 100]).metrics
    assert metrics["compaction/rows_forwarded"] == 2 and metrics["compaction/rows_left_out"] == 2
    assert metrics["compaction/tokens_saved_share"] == pytest.approx(1 - 300 / 1000)
    assert not [name for name in metrics if "max" in name or "min" in name]
    assert plan([]).metrics["compaction/rank_load_ratio"] == 1.0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 4000), st.integers(0, 4000)), max_size=40),
    st.integers(1, 12),
    st.integers(1, 5),
)
@settings(max_examples=120, deadline=None)
def test_layout_holds_for_any_batch(rows, mini_batch_rows, ranks):
    keep = [row[0] for row in rows]
    result = plan(
        keep, rows=mini_batch_rows, ranks=ranks, lengths=[row[1] for row in rows], teacher=[row[2] for row in rows]
    )
    assert sorted(row for batch in result.mini_batches for row in batch.rows) == [i for i, k in enumerate(keep) if k]
    for batch in result.mini_batches:
        assert all(row // mini_batch_rows == batch.number for row in batch.rows)
        assert len(batch.ranks) == ranks and {len(rank) for rank in batch.ranks} == {batch.size // ranks}
        assert 0 <= batch.padding < ranks and batch.size == len(batch.rows) + batch.padding
        assert batch.row_count == min(mini_batch_rows, len(rows) - batch.number * mini_batch_rows)
        if batch.padding == 0 and ranks > 1:
            # two ranks never differ by more than the spread of row lengths times the rows of a rank
            cost = [rows[row][1] + rows[row][2] for row in batch.rows]
            sums = [sum(rows[row][1] + rows[row][2] for row in rank) for rank in batch.ranks]
            assert max(sums) - min(sums) <= (max(cost) - min(cost)) * (batch.size // ranks)
    total = -(-len(rows) // mini_batch_rows)
    assert len(result.mini_batches) + result.skipped == total


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 4), st.integers(1, 50)), min_size=1, max_size=24))
@settings(max_examples=60, deadline=None)
def test_compaction_changes_no_loss(rows):
    """The weighted loss of every mini-batch, computed from the plan, equals the one over all of its rows."""
    weights, mask = [row[1] for row in rows], [row[0] for row in rows]
    keep = keep_rows(weights, mask, coefficient=1.0)
    result = plan(keep, rows=5, tokens=[row[2] for row in rows])
    term = [weight * masked * tokens**0.5 for masked, weight, tokens in rows]
    found = {batch.number: sum(term[i] for i in batch.rows) / batch.row_count for batch in result.mini_batches}
    for number in range(-(-len(rows) // 5)):
        members = term[number * 5 : number * 5 + 5]
        assert found.get(number, 0.0) == pytest.approx(sum(members) / len(members), rel=1e-12, abs=0.0)


def test_padding_rows_have_the_length_verl_gives_them():
    from verl.trainer.ppo.padding_utils import SYNTHETIC_PADDING_SEQ_LEN

    assert PADDING_ROW_TOKENS == SYNTHETIC_PADDING_SEQ_LEN
