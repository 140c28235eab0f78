"""The student's side of a micro-batch against formulas on whole logits: values, details, gradients, what is skipped."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from verl_ext.chunks import Head, Logits
from verl_ext.config import DistillConfig, distill_config
from verl_ext.divergence import full_divergence, sampled_token_loss, student_topk, support_log_probs, topk_divergence
from verl_ext.divergence_kinds import DIVERGENCES
from verl_ext.packing import to_jagged
from verl_ext.passes import ROW_ID, StudentPass, TeacherPass
from verl_ext.row_store import STORE
from verl_ext.student_values import DETAILS, Discrepancy, measure_of, student_values

PROMPTS, RESPONSES, ROW_IDS = [2, 1, 4], [3, 5, 2], [10, 11, 12]
TOKENS = sum(PROMPTS) + sum(RESPONSES)
VOCABULARY, WIDTH, TOPK, TEMPERATURE = 11, 6, 4, 1.7
SPANS = [slice(1, 4), slice(5, 10), slice(14, 16)]
POSITIONS = [1, 2, 3, 5, 6, 7, 8, 9, 14, 15]
ALL, SOME, NONE = torch.tensor([True] * 3), torch.tensor([True, False, True]), torch.tensor([False] * 3)

FORMS = {
    "student_topk, hidden states": {"support": "student_topk"},
    "student_topk, log-probabilities": {"support": "student_topk", "states": "log_probs"},
    "teacher_topk, log-probabilities": {"support": "teacher_topk"},
    "teacher_topk, hidden states": {"support": "teacher_topk", "states": "hidden_states"},
    "full": {"support": "full"},
}
each_form = pytest.mark.parametrize("form", FORMS)
each_input = pytest.mark.parametrize("inputs", ["logits", "hidden_states"])


@pytest.fixture(autouse=True)
def empty_store():
    STORE.clear()
    yield
    STORE.clear()


def make_config(support: str = "student_topk", states: str = "auto", tail: bool = True, **divergence) -> DistillConfig:
    block = {"support": support, "topk": TOPK, "tail": tail and support != "full", "kind": "jsd", "alpha": 0.3}
    return distill_config({"divergence": block | divergence, "teacher": {"states": states}})


@pytest.fixture
def data() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY, (p + r,), generator=generator) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return TensorDict(
        {
            "input_ids": to_jagged(rows),
            "responses": to_jagged([row[p:] for row, p in zip(rows, PROMPTS, strict=True)]),
            "temperature": torch.full((3,), TEMPERATURE),
            ROW_ID: torch.tensor(ROW_IDS),
        },
        batch_size=3,
    )


def head(seed: int, scale: float = 0.7) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return Head(
        torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(VOCABULARY, WIDTH, generator=generator) * scale
    )


def divided(source: Head) -> torch.Tensor:
    """Logits at the rollout temperature, as verl's logits processor gets them."""
    return source.hidden @ source.weight.t() / TEMPERATURE


def student_source(inputs: str, seed: int = 1) -> tuple[Head | Logits, torch.Tensor]:
    """The student, and the tensor that takes the gradient."""
    states = head(seed)
    if inputs == "hidden_states":
        return states, states.hidden.requires_grad_()
    logits = divided(states).requires_grad_()
    return Logits(logits), logits


def teach(data: TensorDict, config: DistillConfig, teacher: Head | None = None, student: Head | None = None) -> None:
    """What the worker does before the update."""
    if config.support_pass:
        StudentPass(TOPK).collect(student or head(1), data)
    support = {"student_topk": "given"}.get(config.divergence.support, config.divergence.support)
    forward_pass = TeacherPass(config.teacher_states, support="none" if config.one_token else support, topk=TOPK)
    forward_pass.collect(teacher or head(2), data)
    forward_pass.leave_head()


def formula(student_logits: torch.Tensor, teacher_logits: torch.Tensor, config: DistillConfig) -> torch.Tensor:
    """The divergence at every position, from logits at the temperature."""
    block = config.divergence
    settings = {"kind": block.kind, "alpha": block.alpha, "clip": block.clip, "clip_level": block.clip_level}
    if block.support == "full":
        return full_divergence(student_logits, teacher_logits, **settings)
    ids = student_topk(student_logits if block.support == "student_topk" else teacher_logits, TOPK)
    return topk_divergence(
        student_logits, support_log_probs(teacher_logits, ids), ids, tail=block.tail, temperature=1.0, **settings
    )


def elsewhere(values: torch.Tensor, spans: list[slice] = SPANS) -> torch.Tensor:
    outside = torch.ones(len(values), dtype=torch.bool)
    for span in spans:
        outside[span] = False
    return values[outside]


# --------------------------------------------------------------------------------------------------------- divergence


@each_form
@each_input
@pytest.mark.parametrize("tail", [True, False])
def test_the_divergence_is_the_formula_s_at_response_positions_and_zero_elsewhere(
    data: TensorDict, form: str, inputs: str, tail: bool
) -> None:
    config = make_config(**FORMS[form], tail=tail)
    teach(data, config)
    source, _ = student_source(inputs)
    divergence = student_values(source, data, ALL, config)["divergence"]
    assert divergence.shape == (TOKENS,) and divergence.dtype == torch.float32
    expected = formula(divided(head(1)), divided(head(2)), config)
    torch.testing.assert_close(divergence[POSITIONS], expected[POSITIONS])
    assert (elsewhere(divergence) == 0).all() and (divergence[POSITIONS] > 1e-3).all()


@each_form
@each_input
def test_the_gradient_is_the_formula_s_with_one_weight_per_token(data: TensorDict, form: str, inputs: str) -> None:
    config = make_config(**FORMS[form])
    teach(data, config)
    weights = torch.linspace(0.5, 2.0, TOKENS)
    source, leaf = student_source(inputs)
    (student_values(source, data, ALL, config)["divergence"] * weights).sum().backward()
    reference = head(1).hidden if inputs == "hidden_states" else divided(head(1))
    reference.requires_grad_()
    logits = reference @ head(1).weight.t() / TEMPERATURE if inputs == "hidden_states" else reference
    expected = formula(logits, divided(head(2)), config)
    (expected[POSITIONS] * weights[POSITIONS]).sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad)
    assert (elsewhere(leaf.grad) == 0).all()


def test_the_head_gets_its_gradient_too(data: TensorDict) -> None:
    config = make_config("full")
    teach(data, config)
    source = head(1)
    source.weight.requires_grad_()
    student_values(source, data, ALL, config)["divergence"].sum().backward()
    weight = head(1).weight.requires_grad_()
    formula(head(1).hidden @ weight.t() / TEMPERATURE, divided(head(2)), config)[POSITIONS].sum().backward()
    torch.testing.assert_close(source.weight.grad, weight.grad)


@each_form
@pytest.mark.parametrize("kind", [*DIVERGENCES, "sampled_token"])
def test_a_teacher_that_equals_the_student_gives_zero(data: TensorDict, form: str, kind: str) -> None:
    settings = FORMS[form] if kind != "sampled_token" else FORMS[form] | {"states": "auto"}
    config = make_config(**settings, kind=kind)
    teach(data, config, teacher=head(1))
    divergence = student_values(head(1), data, ALL, config)["divergence"]
    torch.testing.assert_close(divergence, torch.zeros(TOKENS), atol=1e-6, rtol=0)


@each_input
def test_the_temperature_divides_hidden_states_and_the_teacher_but_not_logits_that_are_divided_already(
    data: TensorDict, inputs: str
) -> None:
    """A teacher that equals the student tells: at one temperature too many or too few the divergence is not zero."""
    for form in FORMS.values():
        STORE.clear()
        config = make_config(**form)
        teach(data, config, teacher=head(1))
        divergence = student_values(student_source(inputs)[0], data, ALL, config)["divergence"]
        assert float(divergence.detach().abs().max()) < 1e-5
        undivided = Logits(divided(head(1)) * TEMPERATURE)
        assert float(student_values(undivided, data, ALL, config)["divergence"].detach().max()) > 1e-3


def test_clip_kind_and_support_of_the_block_reach_the_measure(data: TensorDict) -> None:
    config = make_config("teacher_topk", kind="forward_kl", tail=False, clip=0.05, clip_level="token")
    measure = measure_of(config)
    assert (measure.kind, measure.alpha, measure.support) == ("forward_kl", 0.3, "teacher_topk")
    assert (measure.topk, measure.tail, measure.clip, measure.clip_level) == (TOPK, False, 0.05, "token")
    teach(data, config)
    divergence = student_values(head(1), data, ALL, config)["divergence"]
    assert float(divergence.max()) == pytest.approx(0.05)
    torch.testing.assert_close(divergence[POSITIONS], formula(divided(head(1)), divided(head(2)), config)[POSITIONS])


def squared_distance(log_student: torch.Tensor, log_teacher: torch.Tensor, alpha: float) -> torch.Tensor:
    return (log_student.exp() - log_teacher.exp()).square()


def test_a_kind_of_one_s_own_is_used(data: TensorDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_ext.packing.squared_distance", squared_distance, raising=False)
    config = make_config("full", kind="verl_ext.packing:squared_distance")
    teach(data, config)
    try:
        divergence = student_values(head(1), data, ALL, config)["divergence"]
    finally:
        DIVERGENCES.pop("verl_ext.packing:squared_distance", None)
    expected = (divided(head(1)).softmax(-1) - divided(head(2)).softmax(-1)).square().sum(-1)
    torch.testing.assert_close(divergence[POSITIONS], expected[POSITIONS])


# ---------------------------------------------------------------------------------------------------- rows not chosen


@each_form
@each_input
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_not_chosen_are_not_read_and_get_no_gradient(
    data: TensorDict, form: str, inputs: str, poison: float
) -> None:
    config = make_config(**FORMS[form])
    teach(data, config)
    clean = student_values(student_source(inputs)[0], data, SOME, config)
    states = head(1)
    spoilt = states.hidden if inputs == "hidden_states" else divided(states)
    spoilt[4:10] = poison  # the second row
    spoilt.requires_grad_()
    source = Head(spoilt, states.weight.requires_grad_()) if inputs == "hidden_states" else Logits(spoilt)
    values = student_values(source, data, SOME, config)
    for name, value in values.items():
        assert torch.equal(value.detach(), clean[name].detach()), name
        assert (value[4:10] == 0).all(), name
    values["divergence"].sum().backward()
    assert torch.isfinite(spoilt.grad).all()
    assert (spoilt.grad[4:10] == 0).all() and (spoilt.grad[1:4] != 0).any()
    if inputs == "hidden_states":
        assert torch.isfinite(states.weight.grad).all() and (states.weight.grad != 0).any()


def test_rows_not_chosen_need_no_teacher(data: TensorDict) -> None:
    """Every row was forwarded by the student, only the distilled ones by the teacher."""
    for form in FORMS.values():
        STORE.clear()
        config = make_config(**form)
        teach(data, config)
        whole = student_values(head(1), data, SOME, config)["divergence"]
        del STORE._rows[11]
        assert torch.equal(student_values(head(1), data, SOME, config)["divergence"], whole)


@each_form
@each_input
@pytest.mark.parametrize("log_probs_of_all", [True, False])
def test_a_micro_batch_without_chosen_rows_is_zero_but_stays_in_the_graph(
    data: TensorDict, form: str, inputs: str, log_probs_of_all: bool
) -> None:
    config = make_config(**FORMS[form])
    teach(data, config)
    source, leaf = student_source(inputs)
    if not log_probs_of_all:
        leaf.detach().fill_(math.nan)
    values = student_values(source, data, NONE, config, log_probs_of_all=log_probs_of_all)
    for name in ("divergence", *DETAILS):
        assert values[name].shape == (TOKENS,) and (values[name] == 0).all()
    assert values["divergence"].requires_grad
    values["divergence"].sum().backward()
    assert (leaf.grad == 0).all()


def test_a_micro_batch_of_padding_rows_is_zero_and_looks_up_nothing(data: TensorDict) -> None:
    data[ROW_ID] = torch.tensor([-1, -1, -1])
    for form in ("teacher_topk, log-probabilities", "student_topk, log-probabilities"):
        values = student_values(head(1), data, NONE, make_config(**FORMS[form]))
        assert all((value == 0).all() for value in values.values())


# ------------------------------------------------------------------------------------------------------- missing rows


@each_form
def test_a_row_that_no_pass_saw_is_an_error_not_a_zero(data: TensorDict, form: str) -> None:
    config = make_config(**FORMS[form])
    teach(data, config)
    del STORE._rows[11]
    with pytest.raises(KeyError, match="row 11 was in no earlier pass on this rank"):
        student_values(head(1), data, ALL, config)


@each_form
def test_a_chosen_row_that_only_the_student_pass_saw_is_an_error_not_another_row_s_teacher(
    data: TensorDict, form: str
) -> None:
    """Without a check the rows after it would silently be compared with the teacher of the row before."""
    config = make_config(**FORMS[form])
    teach(data, config)
    state = STORE[10]
    state.teacher_hidden = state.teacher_log_probs = None
    state.teacher_token_log_probs = state.teacher_entropy = None
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        student_values(head(1), data, ALL, config)


def test_a_sampled_token_without_the_teacher_s_probability_is_an_error_not_a_zero(data: TensorDict) -> None:
    StudentPass(None).collect(head(1), data)
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        student_values(head(1), data, ALL, make_config(kind="sampled_token"))


# ------------------------------------------------------------------------------------------------------------ details


def token_log_probs(logits: torch.Tensor, data: TensorDict) -> torch.Tensor:
    return logits.log_softmax(-1)[POSITIONS].gather(-1, data["responses"].values().unsqueeze(-1)).squeeze(-1)


@each_form
@each_input
def test_the_details_are_those_of_both_sides_without_gradient(data: TensorDict, form: str, inputs: str) -> None:
    config = make_config(**FORMS[form])
    teach(data, config)
    values = student_values(student_source(inputs)[0], data, ALL, config)
    assert set(values) == {"divergence", *DETAILS}
    student, teacher = divided(head(1)), divided(head(2))
    log_t = teacher.log_softmax(-1)
    expected = {
        "student_log_probs": token_log_probs(student, data),
        "teacher_log_probs": token_log_probs(teacher, data),
        "teacher_entropy": -(log_t.exp() * log_t).sum(-1)[POSITIONS],
        "student_mass": torch.zeros(len(POSITIONS)),
        "teacher_mass": torch.zeros(len(POSITIONS)),
    }
    if config.divergence.support != "full":
        ids = student_topk(student if config.divergence.support == "student_topk" else teacher, TOPK)
        for name, logits in (("student_mass", student), ("teacher_mass", teacher)):
            expected[name] = logits.softmax(-1).gather(-1, ids).sum(-1)[POSITIONS]
    for name, value in expected.items():
        torch.testing.assert_close(values[name][POSITIONS], value, msg=lambda text, name=name: f"{name}: {text}")
        assert (elsewhere(values[name]) == 0).all() and not values[name].requires_grad


@each_input
def test_the_sampled_token_s_loss_is_the_product_of_its_log_ratio_and_its_log_probability(
    data: TensorDict, inputs: str
) -> None:
    config = make_config(kind="sampled_token")
    teach(data, config)
    assert STORE[10].teacher_log_probs is None
    source, leaf = student_source(inputs)
    values = student_values(source, data, SOME, config)
    student, teacher = token_log_probs(divided(head(1)), data), token_log_probs(divided(head(2)), data)
    chosen = [0, 1, 2, 8, 9]
    where = [POSITIONS[i] for i in chosen]
    torch.testing.assert_close(values["divergence"][where], ((student - teacher) * student)[chosen])
    torch.testing.assert_close(values["teacher_log_probs"][where], teacher[chosen])
    torch.testing.assert_close(values["student_log_probs"][where], student[chosen])
    assert (values["teacher_entropy"][where] > 0).all()
    assert (values["student_mass"] == 0).all() and (values["teacher_mass"] == 0).all()
    assert (elsewhere(values["divergence"], [SPANS[0], SPANS[2]]) == 0).all()
    values["divergence"].sum().backward()
    reference = (head(1).hidden if inputs == "hidden_states" else divided(head(1))).requires_grad_()
    logits = reference @ head(1).weight.t() / TEMPERATURE if inputs == "hidden_states" else reference
    sampled_token_loss(token_log_probs(logits, data)[chosen], teacher[chosen]).sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad)


@pytest.mark.parametrize("kind", ["jsd", "sampled_token"])
@pytest.mark.parametrize("rows", [ALL, SOME, NONE], ids=["all", "some", "none"])
@each_input
def test_log_probabilities_and_entropy_of_every_row_are_those_of_a_log_softmax_with_gradient(
    data: TensorDict, kind: str, rows: torch.Tensor, inputs: str
) -> None:
    config = make_config(kind=kind)
    teach(data, config)
    source, leaf = student_source(inputs)
    values = student_values(source, data, rows, config, log_probs_of_all=True, entropy=True)
    assert set(values) == {"divergence", *DETAILS, "log_probs", "entropy"}
    reference = (head(1).hidden if inputs == "hidden_states" else divided(head(1))).requires_grad_()
    logits = reference @ head(1).weight.t() / TEMPERATURE if inputs == "hidden_states" else reference
    log_s = logits.log_softmax(-1)
    expected, entropy = token_log_probs(logits, data), -(log_s.exp() * log_s).sum(-1)[POSITIONS]
    torch.testing.assert_close(values["log_probs"][POSITIONS], expected)
    torch.testing.assert_close(values["entropy"][POSITIONS], entropy)
    assert (elsewhere(values["log_probs"]) == 0).all() and (elsewhere(values["entropy"]) == 0).all()
    weights = torch.linspace(0.5, 2.0, TOKENS)
    (values["log_probs"] * weights - 0.3 * values["entropy"] * weights).sum().backward()
    ((expected - 0.3 * entropy) * weights[POSITIONS]).sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad)


def test_log_probabilities_of_every_row_do_not_change_the_divergence_nor_the_details(data: TensorDict) -> None:
    for form in FORMS.values():
        STORE.clear()
        config = make_config(**form)
        teach(data, config)
        source, leaf = student_source("hidden_states")
        alone = student_values(source, data, SOME, config)
        alone["divergence"].sum().backward()
        gradient, leaf.grad = leaf.grad, None
        beside = student_values(source, data, SOME, config, log_probs_of_all=True)
        assert "entropy" not in beside
        beside["divergence"].sum().backward()
        for name in ("divergence", *DETAILS):
            torch.testing.assert_close(beside[name], alone[name])
        torch.testing.assert_close(leaf.grad, gradient)


# --------------------------------------------------------------------------------------------------------- self-check


@each_form
def test_the_self_check_counts_tokens_and_keeps_the_largest(data: TensorDict, form: str) -> None:
    config = make_config(**FORMS[form])
    teach(data, config)
    check = Discrepancy(config)
    assert check.reads_hidden_states == (config.divergence.support == "full")
    if check.reads_hidden_states:
        assert check(hidden_states=head(1), data=data) == {}
    else:
        assert check(student_logits=divided(head(1))[None], data=data) == {}
    expected = formula(divided(head(1)), divided(head(2)), config)[POSITIONS]
    assert check.tokens == sum(RESPONSES)
    assert check.total == pytest.approx(float(expected.sum()), rel=1e-5)
    assert check.largest == pytest.approx(float(expected.max()), rel=1e-5)


def test_the_self_check_leaves_padding_rows_out_and_adds_up_over_micro_batches(data: TensorDict) -> None:
    config = make_config()
    teach(data, config)
    data[ROW_ID] = torch.tensor([10, -1, 12])
    check = Discrepancy(config)
    for _ in range(2):
        check.collect(head(1), data)
    expected = formula(divided(head(1)), divided(head(2)), config)
    assert check.tokens == 2 * (RESPONSES[0] + RESPONSES[2])
    assert check.total == pytest.approx(2 * float(expected[1:4].sum() + expected[14:16].sum()), rel=1e-5)


def test_a_student_that_is_not_a_number_does_not_pass_the_self_check(data: TensorDict) -> None:
    config = make_config()
    teach(data, config)
    spoilt = head(1)
    spoilt.hidden[2] = math.nan
    check = Discrepancy(config)
    check.collect(spoilt, data)
    assert math.isnan(check.total) and check.tokens == sum(RESPONSES)
