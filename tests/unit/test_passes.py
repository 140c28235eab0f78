"""The passes on packed logits: which positions are read, what they leave, and what a row left out costs: nothing."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from verl_ext import passes
from verl_ext.config import DivergenceConfig
from verl_ext.divergence import full_divergence
from verl_ext.packing import lengths, response_positions, to_jagged
from verl_ext.passes import ROW_ID, Discrepancy, StudentSupport, TeacherSupport, packed_divergence
from verl_ext.row_store import STORE, RowState, RowStore

PROMPTS, RESPONSES, VOCABULARY = [2, 1, 4], [3, 5, 2], 11
FULL = DivergenceConfig(kind="forward_kl", topk=VOCABULARY, tail=False)


@pytest.fixture(autouse=True)
def empty_store():
    STORE.clear()
    yield
    STORE.clear()


def make_batch(prompts: list[int], responses: list[int], row_ids: list[int], seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (p + r,), generator=generator) for p, r in zip(prompts, responses, strict=True)]
    return TensorDict(
        {
            "input_ids": to_jagged(tokens),
            "responses": to_jagged([row[p:] for row, p in zip(tokens, prompts, strict=True)]),
            ROW_ID: torch.tensor(row_ids),
        },
        batch_size=len(row_ids),
    )


@pytest.fixture
def data() -> TensorDict:
    return make_batch(PROMPTS, RESPONSES, [10, 11, 12])


def logits(seed: int, tokens: int = sum(PROMPTS) + sum(RESPONSES)) -> torch.Tensor:
    return torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def every(data: TensorDict) -> torch.Tensor:
    return torch.ones(len(data), dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------------ packing


def test_positions_lie_one_before_the_tokens_they_predict() -> None:
    positions = response_positions(torch.tensor([5, 6]), torch.tensor([3, 5]))
    assert positions.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]


def test_a_row_without_a_response_has_no_position() -> None:
    assert response_positions(torch.tensor([3, 4]), torch.tensor([0, 2])).tolist() == [4, 5]


def test_a_response_without_a_prompt_token_before_it_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt token"):
        response_positions(torch.tensor([3, 2]), torch.tensor([1, 2]))


def test_lengths_of_a_jagged_tensor(data: TensorDict) -> None:
    assert lengths(data["responses"]).tolist() == RESPONSES


# -------------------------------------------------------------------------------------------------------------- store


def test_the_store_names_the_row_whose_student_pass_ran_elsewhere() -> None:
    store = RowStore()
    store.put(1, RowState(torch.zeros(1, 1), torch.zeros(1)))
    assert 1 in store and 2 not in store
    with pytest.raises(KeyError, match="row 2 has no student pass on this rank .1 rows"):
        store[2]
    store.clear()
    assert 1 not in store


# ------------------------------------------------------------------------------------------------------------- passes


def test_the_student_pass_leaves_ids_and_log_probabilities_at_the_response_positions(data: TensorDict) -> None:
    student = logits(1)
    assert StudentSupport(4)(student_logits=student[None], data=data) == {}
    log_probs = student.log_softmax(-1)
    offsets = data["input_ids"].offsets().tolist()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        state = STORE[10 + row]
        rows = slice(offsets[row] + prompt - 1, offsets[row] + prompt - 1 + response)
        assert state.support_ids.tolist() == student[rows].topk(4).indices.tolist()
        sampled = log_probs[rows].gather(1, data["responses"][row].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(state.student_log_probs, sampled)


def test_chunks_of_any_size_leave_the_same(data: TensorDict, monkeypatch: pytest.MonkeyPatch) -> None:
    StudentSupport(4).collect(logits(1), data)
    whole = {row: STORE[row] for row in (10, 11, 12)}
    STORE.clear()
    monkeypatch.setattr(passes, "CHUNK_TOKENS", 2)
    StudentSupport(4).collect(logits(1), data)
    for row, state in whole.items():
        assert torch.equal(STORE[row].support_ids, state.support_ids)
        assert torch.equal(STORE[row].student_log_probs, state.student_log_probs)


def test_padding_rows_leave_nothing() -> None:
    data = make_batch(PROMPTS, RESPONSES, [10, -1, 12])
    StudentSupport(4).collect(logits(1), data)
    TeacherSupport().collect(logits(2), data)
    assert -1 not in STORE and 10 in STORE and 12 in STORE


def test_a_support_larger_than_the_vocabulary_is_the_vocabulary(data: TensorDict) -> None:
    StudentSupport(100).collect(logits(1), data)
    assert STORE[10].support_ids.shape == (3, VOCABULARY)


def test_a_forward_pass_answers_verls_second_call_with_a_zero_loss(data: TensorDict) -> None:
    loss, metrics = StudentSupport(4)(model_output={}, data=data)
    assert float(loss) == 0.0 and metrics == {}


def test_the_teacher_may_have_other_prompts_and_another_row_order(data: TensorDict) -> None:
    """The teacher's pass packs longer prompts, its own rows in its own order; the responses meet by row id."""
    student = logits(1)
    StudentSupport(VOCABULARY).collect(student, data)
    longer = TensorDict(
        {
            "input_ids": to_jagged(
                [torch.cat([torch.zeros(n, dtype=torch.int64), data["responses"][row]]) for n, row in ((7, 2), (3, 0))]
            ),
            "responses": to_jagged([data["responses"][2], data["responses"][0]]),
            ROW_ID: torch.tensor([12, 10]),
        },
        batch_size=2,
    )
    teacher = logits(2, tokens=7 + 2 + 3 + 3)
    TeacherSupport().collect(teacher, longer)
    divergence = packed_divergence(student, data, torch.tensor([True, False, True]), FULL)
    expected = full_divergence(student[1:4], teacher[7 + 2 + 2 : 7 + 2 + 2 + 3], kind="forward_kl")
    torch.testing.assert_close(divergence[1:4], expected)
    assert STORE[11].teacher_log_probs is None and (divergence[5:10] == 0).all()


# --------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teacher_that_equals_the_student_gives_zero(data: TensorDict, kind: str) -> None:
    same = logits(1)
    StudentSupport(4).collect(same, data)
    TeacherSupport().collect(same, data)
    divergence = packed_divergence(same, data, every(data), DivergenceConfig(kind=kind, topk=4))
    assert divergence.shape == (len(same),)
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), atol=1e-6, rtol=0)


def test_on_the_whole_vocabulary_it_is_the_full_divergence_at_response_positions_and_zero_elsewhere(
    data: TensorDict,
) -> None:
    student, teacher = logits(1), logits(2)
    StudentSupport(VOCABULARY).collect(student, data)
    TeacherSupport().collect(teacher, data)
    divergence = packed_divergence(student, data, every(data), FULL)
    positions = response_positions(lengths(data["input_ids"]), lengths(data["responses"]))
    torch.testing.assert_close(
        divergence[positions], full_divergence(student[positions], teacher[positions], kind="forward_kl")
    )
    elsewhere = torch.ones(len(student), dtype=torch.bool)
    elsewhere[positions] = False
    assert (divergence[elsewhere] == 0).all()


def test_rows_not_chosen_are_not_read_and_get_no_gradient(data: TensorDict) -> None:
    student, teacher = logits(1), logits(2)
    StudentSupport(4).collect(student, data)
    TeacherSupport().collect(teacher, data)
    chosen = torch.tensor([True, False, True])
    clean = packed_divergence(student, data, chosen, DivergenceConfig(topk=4))
    poisoned = student.clone()
    poisoned[sum((PROMPTS[0], RESPONSES[0])) : 11] = math.nan  # the second row
    poisoned.requires_grad_()
    divergence = packed_divergence(poisoned, data, chosen, DivergenceConfig(topk=4))
    assert torch.equal(divergence.detach(), clean)
    divergence.sum().backward()
    assert torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad[5:11] == 0).all() and (poisoned.grad[1:4] != 0).any()


def test_a_micro_batch_without_chosen_rows_is_zero_but_stays_in_the_graph(data: TensorDict) -> None:
    student = logits(1).fill_(math.nan).requires_grad_()
    divergence = packed_divergence(student, data, torch.zeros(3, dtype=torch.bool), DivergenceConfig())
    assert divergence.shape == (len(student),) and (divergence == 0).all() and divergence.requires_grad
    divergence.sum().backward()
    assert (student.grad == 0).all()


def test_a_row_without_a_student_pass_is_an_error_not_a_zero(data: TensorDict) -> None:
    with pytest.raises(KeyError, match="row 10 has no student pass"):
        packed_divergence(logits(1), data, every(data), DivergenceConfig())


def test_the_self_check_counts_tokens_and_keeps_the_largest(data: TensorDict) -> None:
    student, teacher = logits(1), logits(2)
    StudentSupport(VOCABULARY).collect(student, data)
    TeacherSupport().collect(teacher, data)
    check = Discrepancy(FULL)
    check.collect(student, data)
    expected = packed_divergence(student, data, every(data), FULL)
    assert check.tokens == sum(RESPONSES)
    assert check.total == pytest.approx(float(expected.sum())) and check.largest == pytest.approx(float(expected.max()))
