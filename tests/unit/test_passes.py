"""The passes before the update: which positions are read, what they leave in the store, and of which rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from verl_ext import chunks
from verl_ext.chunks import Head, Logits
from verl_ext.divergence import student_topk, support_log_probs
from verl_ext.packing import lengths, response_positions, to_jagged
from verl_ext.passes import ROW_ID, StudentPass, TeacherPass, rollout_temperature, settle_mixed_teacher
from verl_ext.row_store import STORE, RowState, RowStore

PROMPTS, RESPONSES, ROW_IDS = [2, 1, 4], [3, 5, 2], [10, 11, 12]
VOCABULARY, WIDTH, TOPK = 11, 6, 4
TEMPERATURE = 1.7
SUPPORTS = ("none", "given", "teacher_topk")


@pytest.fixture(autouse=True)
def empty_store():
    STORE.clear()
    yield
    STORE.clear()


def concatenated(parts: list[Head], shares: list[float]) -> Head:
    """A head over hidden states side by side: its logits are the sum of ``share * logits`` (SDPO's trust region)."""
    hidden = torch.cat([part.hidden * share for part, share in zip(parts, shares, strict=True)], dim=-1)
    return Head(hidden, torch.cat([part.weight for part in parts], dim=-1))


def make_batch(
    prompts: list[int], responses: list[int], row_ids: list[int], temperature: float = TEMPERATURE, seed: int = 0
) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (p + r,), generator=generator) for p, r in zip(prompts, responses, strict=True)]
    return TensorDict(
        {
            "input_ids": to_jagged(tokens),
            "responses": to_jagged([row[p:] for row, p in zip(tokens, prompts, strict=True)]),
            "temperature": torch.full((len(row_ids),), temperature),
            ROW_ID: torch.tensor(row_ids),
        },
        batch_size=len(row_ids),
    )


@pytest.fixture
def data() -> TensorDict:
    return make_batch(PROMPTS, RESPONSES, ROW_IDS)


def head(seed: int, tokens: int = sum(PROMPTS) + sum(RESPONSES), width: int = WIDTH) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return Head(
        torch.randn(tokens, width, generator=generator), torch.randn(VOCABULARY, width, generator=generator) * 0.7
    )


def divided(source: Head, temperature: float = TEMPERATURE) -> torch.Tensor:
    """Logits at the temperature, as verl's logits processor gets them."""
    return source.hidden @ source.weight.t() / temperature


def spans(data: TensorDict) -> dict[int, slice]:
    """Where each row's response is predicted, by row id; written out independently of the packing module."""
    ends, out = 0, {}
    for row_id, row, response in zip(
        data[ROW_ID].tolist(), data["input_ids"].unbind(), data["responses"].unbind(), strict=True
    ):
        ends += len(row)
        out[row_id] = slice(ends - len(response) - 1, ends - 1)
    return out


def sampled(log_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[token] for row, token in zip(log_probs, tokens, strict=True)])


def fields(row_id: int) -> set[str]:
    """What the row's state holds."""
    return {f.name for f in dataclasses.fields(RowState) if getattr(STORE[row_id], f.name) is not None}


def snapshot() -> dict[int, dict[str, torch.Tensor]]:
    return {row_id: {name: getattr(STORE[row_id], name) for name in fields(row_id)} for row_id in STORE._rows}


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


def test_the_temperature_is_read_from_a_column_or_from_one_number(data: TensorDict) -> None:
    assert rollout_temperature(data) == pytest.approx(TEMPERATURE)
    data["temperature"] = NonTensorData(0.6)
    assert rollout_temperature(data) == 0.6


# -------------------------------------------------------------------------------------------------------------- store


def test_the_store_names_the_row_that_no_pass_saw_on_this_rank() -> None:
    store = RowStore()
    store.of(1)
    assert 1 in store and 2 not in store and len(store.rows()) == 1
    with pytest.raises(KeyError, match=r"row 2 was in no earlier pass on this rank \(1 rows were\).*same rank"):
        store[2]


def test_a_row_s_state_is_made_once_and_forgotten_with_the_head_at_the_end_of_the_step() -> None:
    store = RowStore()
    assert store.of(1) is store.of(1) is store[1]
    store.teacher_head = torch.zeros(1)
    store.clear()
    assert 1 not in store and store.rows() == [] and store.teacher_head is None


# ------------------------------------------------------------------------------------------------------- student pass


@pytest.mark.parametrize("inputs", ["logits", "hidden_states"])
def test_the_student_pass_leaves_ids_and_log_probabilities_at_the_response_positions(
    data: TensorDict, inputs: str
) -> None:
    """verl's logits are divided already, hidden states are not; both must leave the same."""
    source = head(1)
    forward_pass = StudentPass(TOPK, hidden_states=inputs == "hidden_states")
    assert forward_pass.reads_hidden_states == (inputs == "hidden_states")
    if inputs == "logits":
        assert forward_pass(student_logits=divided(source)[None], data=data) == {}
    else:
        assert forward_pass(hidden_states=source, data=data) == {}
    expected = divided(source).log_softmax(-1)
    for (row_id, span), tokens in zip(spans(data).items(), data["responses"].unbind(), strict=True):
        state = STORE[row_id]
        assert state.support_ids.dtype == torch.int32 and state.student_log_probs.dtype == torch.float32
        assert state.support_ids.tolist() == expected[span].topk(TOPK).indices.tolist()
        torch.testing.assert_close(state.student_log_probs, sampled(expected[span], tokens))
        assert fields(row_id) == {"support_ids", "student_log_probs"}


def test_the_student_pass_leaves_no_ids_where_there_is_no_support(data: TensorDict) -> None:
    StudentPass(None).collect(Logits(divided(head(1))), data)
    assert fields(10) == {"student_log_probs"}


def test_a_support_larger_than_the_vocabulary_is_the_vocabulary(data: TensorDict) -> None:
    StudentPass(100).collect(head(1), data)
    assert STORE[10].support_ids.shape == (3, VOCABULARY)


def test_a_forward_pass_answers_verls_second_call_with_a_zero_loss(data: TensorDict) -> None:
    for forward_pass in (StudentPass(4), TeacherPass("hidden_states"), TeacherPass("log_probs")):
        loss, metrics = forward_pass(model_output={}, data=data, dp_group=None)
        assert loss.shape == () and float(loss) == 0.0 and metrics == {}
    assert STORE.rows() == []


def test_a_row_of_one_response_token_and_a_batch_of_one_row_are_read() -> None:
    one = make_batch([1], [1], [3])
    StudentPass(2).collect(head(1, tokens=2), one)
    assert STORE[3].support_ids.shape == (1, 2) and STORE[3].student_log_probs.shape == (1,)


# ----------------------------------------------------------------------------------- teacher pass, log-probabilities


def given_ids(data: TensorDict) -> dict[int, torch.Tensor]:
    """The support a student pass would leave, of another model than the teacher."""
    StudentPass(TOPK).collect(head(1), data)
    return {row_id: STORE[row_id].support_ids for row_id in data[ROW_ID].tolist() if row_id >= 0}


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("inputs", ["logits", "hidden_states"])
def test_the_teacher_pass_leaves_log_probabilities_on_the_support_and_of_the_sampled_tokens(
    data: TensorDict, support: str, inputs: str
) -> None:
    ids = given_ids(data) if support == "given" else None
    teacher = head(2)
    source = {"logits": Logits(divided(teacher)), "hidden_states": teacher}[inputs]
    TeacherPass("log_probs", support=support, topk=TOPK).collect(source, data)
    log_probs = divided(teacher).log_softmax(-1)
    for (row_id, span), tokens in zip(spans(data).items(), data["responses"].unbind(), strict=True):
        state, expected = STORE[row_id], log_probs[span]
        torch.testing.assert_close(state.teacher_token_log_probs, sampled(expected, tokens))
        torch.testing.assert_close(state.teacher_entropy, -(expected.exp() * expected).sum(-1))
        assert state.teacher_hidden is None
        if support == "none":
            assert state.support_ids is None and state.teacher_log_probs is None
            continue
        chosen = student_topk(expected, TOPK) if support == "teacher_topk" else ids[row_id]
        assert state.support_ids.dtype == torch.int32 and state.support_ids.tolist() == chosen.tolist()
        assert state.teacher_log_probs.dtype == torch.float32
        torch.testing.assert_close(
            state.teacher_log_probs, support_log_probs(divided(teacher)[span], state.support_ids)
        )
    assert STORE.teacher_head is None


def test_the_teacher_s_support_replaces_none_and_the_given_one_stays(data: TensorDict) -> None:
    before = given_ids(data)
    TeacherPass("log_probs", support="given").collect(head(2), data)
    assert all(STORE[row_id].support_ids is ids for row_id, ids in before.items())


def test_rows_without_a_student_pass_are_refused_where_the_support_is_the_student_s(data: TensorDict) -> None:
    with pytest.raises(KeyError, match="row 10 was in no earlier pass"):
        TeacherPass("log_probs", support="given").collect(head(2), data)


@pytest.mark.parametrize("inputs", ["logits", "hidden_states"])
def test_the_teacher_may_have_other_prompts_and_another_row_order(data: TensorDict, inputs: str) -> None:
    """The teacher's pass packs longer prompts, its own rows in its own order; the responses meet by row id."""
    ids = given_ids(data)
    longer = TensorDict(
        {
            "input_ids": to_jagged(
                [torch.cat([torch.zeros(n, dtype=torch.int64), data["responses"][row]]) for n, row in ((7, 2), (3, 0))]
            ),
            "responses": to_jagged([data["responses"][2], data["responses"][0]]),
            "temperature": torch.full((2,), TEMPERATURE),
            ROW_ID: torch.tensor([12, 10]),
        },
        batch_size=2,
    )
    teacher = head(2, tokens=7 + 2 + 3 + 3)
    source = {"logits": Logits(divided(teacher)), "hidden_states": teacher}[inputs]
    TeacherPass("log_probs", support="given").collect(source, longer)
    TeacherPass("hidden_states").collect(teacher, longer)
    for row_id, span in {12: slice(6, 8), 10: slice(7 + 2 + 2, 7 + 2 + 2 + 3)}.items():
        torch.testing.assert_close(
            STORE[row_id].teacher_log_probs, support_log_probs(divided(teacher)[span], ids[row_id])
        )
        assert torch.equal(STORE[row_id].teacher_hidden, teacher.hidden[span])
    assert STORE[11].teacher_log_probs is None and STORE[11].teacher_hidden is None


# --------------------------------------------------------------------------------------- teacher pass, hidden states


def test_hidden_states_are_kept_at_the_response_positions_and_the_head_once_the_pass_is_over(data: TensorDict) -> None:
    teacher = head(2)
    forward_pass = TeacherPass("hidden_states")
    assert forward_pass(hidden_states=teacher, data=data) == {}
    assert STORE.teacher_head is None
    forward_pass.leave_head()
    for row_id, span in spans(data).items():
        assert fields(row_id) == {"teacher_hidden"}
        assert torch.equal(STORE[row_id].teacher_hidden, teacher.hidden[span])
    assert torch.equal(STORE.teacher_head, teacher.weight)


def test_the_head_is_a_copy_in_the_precision_of_the_hidden_states(data: TensorDict) -> None:
    """FSDP frees the gathered weight after the forward, and the student's moves on."""
    teacher = head(2)
    forward_pass = TeacherPass("hidden_states")
    forward_pass.collect(Head(teacher.hidden.bfloat16().requires_grad_(), teacher.weight.requires_grad_()), data)
    forward_pass.leave_head()
    assert STORE.teacher_head.dtype == STORE[10].teacher_hidden.dtype == torch.bfloat16
    assert not STORE.teacher_head.requires_grad and not STORE[10].teacher_hidden.requires_grad
    STORE.clear()
    same = TeacherPass("hidden_states")
    same.collect(teacher, data)
    same.leave_head()
    kept, kept_hidden = STORE.teacher_head.clone(), STORE[10].teacher_hidden.clone()
    teacher.weight.detach().zero_()
    teacher.hidden.detach().zero_()
    assert torch.equal(STORE.teacher_head, kept) and torch.equal(STORE[10].teacher_hidden, kept_hidden)


def test_the_head_is_left_once_and_several_micro_batches_share_it(data: TensorDict) -> None:
    teacher = head(2)
    forward_pass = TeacherPass("hidden_states")
    forward_pass.collect(teacher, data)
    forward_pass.collect(Head(head(3).hidden, teacher.weight), make_batch(PROMPTS, RESPONSES, [20, 21, 22]))
    forward_pass.leave_head()
    forward_pass.leave_head()
    assert STORE.teacher_head.shape == (VOCABULARY, WIDTH) and len(STORE.rows()) == 6
    TeacherPass("log_probs").leave_head()
    assert STORE.teacher_head.shape == (VOCABULARY, WIDTH)


def left_by_two_parts(data: TensorDict, share: float) -> tuple[Head, Head]:
    parts = head(2), head(3)
    for part, factor in zip(parts, (1 - share, share), strict=True):
        forward_pass = TeacherPass("hidden_states", share=factor)
        forward_pass.collect(part, data)
        forward_pass.leave_head()
    return parts


def test_two_parts_with_shares_are_one_teacher_whose_logits_are_the_weighted_sum(data: TensorDict) -> None:
    frozen, student = left_by_two_parts(data, 0.3)
    expected = 0.7 * divided(frozen, 1.0) + 0.3 * divided(student, 1.0)
    whole = concatenated([frozen, student], [0.7, 0.3])
    assert torch.equal(STORE.teacher_head, whole.weight)
    for row_id, span in spans(data).items():
        assert torch.equal(STORE[row_id].teacher_hidden, whole.hidden[span])
        logits = STORE[row_id].teacher_hidden @ STORE.teacher_head.t()
        torch.testing.assert_close(logits, expected[span])


def test_states_kept_on_the_host_are_sent_there_and_the_head_is_not(
    data: TensorDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: sent.append(tuple(tensor.shape)) or real(tensor))
    TeacherPass("hidden_states").collect(head(2), data)
    assert sent == []
    STORE.clear()
    forward_pass = TeacherPass("hidden_states", on_host=True)
    forward_pass.collect(head(2), data)
    forward_pass.leave_head()
    assert sent == [(size, WIDTH) for size in RESPONSES]


@pytest.mark.parametrize(
    ("keep", "from_logits", "reads"),
    [
        ("hidden_states", False, True),
        ("hidden_states", True, True),
        ("log_probs", False, True),
        ("log_probs", True, False),
    ],
)
def test_logits_are_asked_for_only_where_log_probabilities_are_kept_of_a_model_that_changes_them(
    keep: str, from_logits: bool, reads: bool
) -> None:
    assert TeacherPass(keep, from_logits=from_logits).reads_hidden_states is reads


# ------------------------------------------------------------------------------------------------------ every pass


def passes_over(data: TensorDict) -> None:
    """Every kind of pass, one after another."""
    StudentPass(TOPK).collect(head(1), data)
    TeacherPass("log_probs", support="given").collect(head(2), data)
    TeacherPass("hidden_states").collect(head(2), data)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("support", ["given", "teacher_topk"])
def test_chunks_of_any_size_leave_the_same(
    data: TensorDict, monkeypatch: pytest.MonkeyPatch, rows: int, support: str
) -> None:
    def run() -> dict[int, dict[str, torch.Tensor]]:
        STORE.clear()
        StudentPass(TOPK).collect(Logits(divided(head(1))), data)
        TeacherPass("log_probs", support=support, topk=TOPK).collect(head(2), data)
        return snapshot()

    whole = run()
    # Three float32 working tensors of so many rows.
    monkeypatch.setattr(chunks, "WORK_BYTES", {"cpu": rows * VOCABULARY * 4 * 3, "other": 1 << 29})
    monkeypatch.setattr(chunks, "HEAD_ROWS", {"cpu": rows + 1, "other": rows + 1})
    cut = run()
    assert set(cut) == set(whole) == set(ROW_IDS)
    for row_id, state in whole.items():
        assert set(cut[row_id]) == set(state)
        for name, value in state.items():
            if name == "support_ids":
                assert torch.equal(cut[row_id][name], value)
            else:
                torch.testing.assert_close(cut[row_id][name], value)


def test_micro_batches_of_any_size_leave_the_same(data: TensorDict) -> None:
    passes_over(data)
    whole = snapshot()
    STORE.clear()
    student, teacher = head(1), head(2)
    start = 0
    for row, size in enumerate(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)):
        alone = TensorDict(
            {
                "input_ids": to_jagged([data["input_ids"][row]]),
                "responses": to_jagged([data["responses"][row]]),
                "temperature": data["temperature"][row : row + 1],
                ROW_ID: data[ROW_ID][row : row + 1],
            },
            batch_size=1,
        )
        part = slice(start, start + size)
        StudentPass(TOPK).collect(Head(student.hidden[part], student.weight), alone)
        TeacherPass("log_probs", support="given").collect(Head(teacher.hidden[part], teacher.weight), alone)
        TeacherPass("hidden_states").collect(Head(teacher.hidden[part], teacher.weight), alone)
        start += size
    for row_id, state in snapshot().items():
        for name, value in state.items():
            torch.testing.assert_close(value, whole[row_id][name])


def test_padding_rows_leave_nothing_and_change_nothing(data: TensorDict) -> None:
    passes_over(data)
    whole = snapshot()
    STORE.clear()
    passes_over(make_batch(PROMPTS, RESPONSES, [10, -1, 12]))
    assert set(STORE._rows) == {10, 12}
    for row_id, state in snapshot().items():
        assert set(state) == set(whole[row_id])
        for name, value in state.items():
            assert torch.equal(value, whole[row_id][name])


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_rank_with_padding_rows_alone_runs_its_teacher_pass_and_leaves_nothing(support: str) -> None:
    """One distilled row on two ranks: the other rank's student pass saw only padding, and so does its teacher's."""
    padding = make_batch([1], [1], [-1])
    StudentPass(TOPK).collect(head(1, tokens=2), padding)
    TeacherPass("log_probs", support=support, topk=TOPK).collect(head(2, tokens=2), padding)
    assert STORE.rows() == []


def test_a_rank_with_padding_rows_alone_still_has_the_teacher_s_head() -> None:
    forward_pass = TeacherPass("hidden_states")
    forward_pass.collect(head(2, tokens=2), make_batch([1], [1], [-1]))
    forward_pass.leave_head()
    assert STORE.rows() == [] and STORE.teacher_head.shape == (VOCABULARY, WIDTH)


def test_what_is_left_owns_its_memory_and_is_no_wider_than_it_must_be(data: TensorDict) -> None:
    """A view would keep the whole micro-batch's tensor alive until the end of the step."""
    passes_over(data)
    for row_id in ROW_IDS:
        for name in fields(row_id):
            value = getattr(STORE[row_id], name)
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name
            assert not value.requires_grad


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_positions_outside_the_responses_are_never_read(data: TensorDict, poison: float) -> None:
    passes_over(data)
    whole = snapshot()
    STORE.clear()
    outside = torch.ones(len(head(1)), dtype=torch.bool)
    for span in spans(data).values():
        outside[span] = False
    for name, source in (("student", head(1)), ("teacher", head(2))):
        source.hidden[outside] = poison
        if name == "student":
            StudentPass(TOPK).collect(source, data)
        else:
            TeacherPass("log_probs", support="given").collect(source, data)
            TeacherPass("hidden_states").collect(source, data)
    for row_id, state in snapshot().items():
        for name, value in state.items():
            assert torch.equal(value, whole[row_id][name])


# ------------------------------------------------------------------------------------------------- the mixed teacher


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_mixed_teacher_settles_to_what_one_teacher_of_the_summed_logits_leaves(
    data: TensorDict, support: str
) -> None:
    if support == "given":
        given_ids(data)
    parts = left_by_two_parts(data, 0.3)
    tokens = dict(zip(ROW_IDS, data["responses"].unbind(), strict=True))
    settle_mixed_teacher(support=support, topk=TOPK, temperature=TEMPERATURE, tokens=tokens)
    assert STORE.teacher_head is None
    settled = snapshot()
    STORE.clear()
    if support == "given":
        given_ids(data)
    TeacherPass("log_probs", support=support, topk=TOPK).collect(concatenated(list(parts), [0.7, 0.3]), data)
    for row_id, state in snapshot().items():
        assert set(settled[row_id]) == set(state) and "teacher_hidden" not in state
        for name, value in state.items():
            torch.testing.assert_close(settled[row_id][name], value)


def test_the_settled_log_probabilities_are_those_of_the_shared_logits(data: TensorDict) -> None:
    frozen, student = left_by_two_parts(data, 0.25)
    tokens = dict(zip(ROW_IDS, data["responses"].unbind(), strict=True))
    settle_mixed_teacher(support="none", topk=0, temperature=TEMPERATURE, tokens=tokens)
    expected = (0.75 * divided(frozen) + 0.25 * divided(student)).log_softmax(-1)
    for row_id, span in spans(data).items():
        torch.testing.assert_close(STORE[row_id].teacher_token_log_probs, sampled(expected[span], tokens[row_id]))


def test_a_row_that_the_mixed_teacher_did_not_see_cannot_be_settled(data: TensorDict) -> None:
    left_by_two_parts(data, 0.5)
    with pytest.raises(KeyError, match="row 99 was in no earlier pass"):
        settle_mixed_teacher(support="none", topk=0, temperature=1.0, tokens={99: data["responses"][0]})
