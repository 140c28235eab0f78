"""Divergences against an independent float64 oracle, the published examples, and the properties that must hold."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.divergence import (
    DIVERGENCES,
    full_divergence,
    log_tail_mass,
    register_divergence,
    sampled_token_loss,
    student_topk,
    support_log_probs,
    topk_divergence,
)

torch.set_num_threads(1)

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2), ("jsd", 0.9)]
SEEDS = st.integers(0, 2**32 - 1)
FIVE_TEACHER = np.array([0.4, 0.1, 0.3, 0.15, 0.05])
FIVE_STUDENT = np.array([0.5, 0.2, 0.15, 0.1, 0.05])


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def oracle(student, teacher, kind, alpha):
    """Divergence of two probability arrays (last dimension), by the textbook sums."""

    def kl(p, q):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(p > 0, p * np.log(p / q), 0.0).sum(-1)

    if kind == "forward_kl":
        return kl(teacher, student)
    if kind == "reverse_kl":
        return kl(student, teacher)
    mixture = (1 - alpha) * student + alpha * teacher
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)


def restricted(probabilities, ids, tail):
    chosen = np.take_along_axis(probabilities, ids, -1)
    if not tail:
        return chosen / chosen.sum(-1, keepdims=True)
    return np.concatenate([chosen, 1 - chosen.sum(-1, keepdims=True)], -1)


def logits_pair(seed, rows=4, vocabulary=11, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, vocabulary)) * scale, rng.normal(size=(rows, vocabulary)) * scale


def topk_of(student, teacher, ids, **options):
    """Calls the function under test with teacher log-probabilities made by numpy."""
    log_teacher = np.log(np.take_along_axis(softmax(teacher), ids, -1))
    return topk_divergence(torch.tensor(student), torch.tensor(log_teacher), torch.tensor(ids), **options)


def top_ids(logits, k):
    return np.argsort(-logits, axis=-1)[..., :k].copy()


def log_rows(*probabilities):
    return torch.tensor(np.log(np.array(probabilities)))


@pytest.mark.parametrize(
    ("teacher", "student", "kind", "alpha", "expected"),
    [
        ((0.9, 0.1), (0.5, 0.5), "forward_kl", 0.5, 0.368064),
        ((0.9, 0.1), (0.5, 0.5), "reverse_kl", 0.5, 0.510826),
        ((0.9, 0.1), (0.5, 0.5), "jsd", 0.5, 0.101749),
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), "forward_kl", 0.5, 0.085123),
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), "reverse_kl", 0.5, 0.092033),
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), "jsd", 0.25, 0.016156),
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), "jsd", 0.5, 0.021901),
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), "jsd", 0.75, 0.016784),
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), "jsd", 0.0, 0.085123),
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), "jsd", 1.0, 0.092033),
    ],
)
def test_small_examples_have_their_published_values(teacher, student, kind, alpha, expected):
    found = full_divergence(log_rows(student), log_rows(teacher), kind=kind, alpha=alpha)
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("alpha", "expected"), [(0.001, 0.085126), (0.999, 0.092021)])
def test_jsd_divided_by_alpha_times_its_complement_approaches_the_full_kls(alpha, expected):
    found = full_divergence(log_rows((0.5, 0.3, 0.2)), log_rows((0.7, 0.2, 0.1)), kind="jsd", alpha=alpha)
    assert found.item() / (alpha * (1 - alpha)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("ids", "tail", "expected"),
    [
        ([0, 1], True, (0.096841, 0.096954, 0.023912)),
        ([0, 1], False, (0.019328, 0.020958, 0.005015)),
        ([0, 2], True, (0.072442, 0.061552, 0.016488)),
        ([0, 1, 2, 3, 4], False, (0.110192, 0.105683, 0.026538)),
    ],
)
def test_five_way_table_of_reduced_supports(ids, tail, expected):
    student, teacher = np.log(FIVE_STUDENT)[None], np.log(FIVE_TEACHER)[None]
    found = [
        topk_of(student, teacher, np.array([ids]), kind=kind, tail=tail).item()
        for kind in ("forward_kl", "reverse_kl", "jsd")
    ]
    assert found == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(KINDS), st.sampled_from([0.5, 1.0, 1.7]))
def test_full_divergence_equals_the_definition(seed, kind_alpha, temperature):
    kind, alpha = kind_alpha
    student, teacher = logits_pair(seed)
    found = full_divergence(
        torch.tensor(student), torch.tensor(teacher), kind=kind, alpha=alpha, temperature=temperature
    )
    expected = oracle(softmax(student / temperature), softmax(teacher / temperature), kind, alpha)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(KINDS), st.integers(1, 10), st.booleans(), st.sampled_from([0.7, 1.0]))
def test_topk_divergence_equals_the_definition_with_the_student_alone_scaled(seed, kind_alpha, k, tail, temperature):
    kind, alpha = kind_alpha
    student, teacher = logits_pair(seed)
    ids = top_ids(student, k)
    found = topk_of(student, teacher, ids, kind=kind, alpha=alpha, tail=tail, temperature=temperature)
    probabilities = softmax(student / temperature), softmax(teacher)
    expected = oracle(*(restricted(p, ids, tail) for p in probabilities), kind, alpha)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(KINDS), st.integers(1, 11), st.floats(0.1, 8.0))
def test_top_k_with_tail_lies_between_zero_and_the_full_divergence(seed, kind_alpha, k, scale):
    kind, alpha = kind_alpha
    student, teacher = logits_pair(seed, scale=scale)
    full = full_divergence(torch.tensor(student), torch.tensor(teacher), kind=kind, alpha=alpha)
    reduced = topk_of(student, teacher, top_ids(student, k), kind=kind, alpha=alpha)
    # The floor of 1e-7 under the tail makes both distributions sum to at most 1 + 1e-7.
    assert (full >= 0).all() and (reduced >= -2e-7).all()
    assert (reduced <= full + 2e-6).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(KINDS))
def test_top_k_with_tail_grows_with_a_nested_support_and_reaches_the_full_value(seed, kind_alpha):
    kind, alpha = kind_alpha
    student, teacher = logits_pair(seed, scale=1.0)
    full = full_divergence(torch.tensor(student), torch.tensor(teacher), kind=kind, alpha=alpha)
    values = [topk_of(student, teacher, top_ids(student, k), kind=kind, alpha=alpha) for k in range(1, 12)]
    for smaller, larger in zip(values, values[1:], strict=False):
        assert (smaller <= larger + 1e-9).all()
    torch.testing.assert_close(values[-1], full, rtol=0, atol=1e-9)


def test_renormalised_support_has_no_order_relation_to_the_full_value():
    signs = set()
    for seed in range(40):
        student, teacher = logits_pair(seed, rows=1)
        full = full_divergence(torch.tensor(student), torch.tensor(teacher), kind="forward_kl")
        reduced = topk_of(student, teacher, top_ids(student, 3), kind="forward_kl", tail=False)
        signs.add(bool(reduced > full))
    assert signs == {True, False}


@pytest.mark.parametrize(("kind", "alpha"), [*KINDS, ("jsd", 0.0), ("jsd", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_and_gradient_vanish_where_teacher_equals_student(kind, alpha, dtype):
    logits = torch.tensor(logits_pair(3)[0], dtype=dtype, requires_grad=True)
    ids = student_topk(logits, 4)
    teacher = support_log_probs(logits, ids).detach()
    for loss in (
        full_divergence(logits, logits.detach(), kind=kind, alpha=alpha),
        topk_divergence(logits, teacher, ids, kind=kind, alpha=alpha),
        topk_divergence(logits, teacher, ids, kind=kind, alpha=alpha, tail=False),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def test_jsd_at_one_half_is_symmetric_and_bounded_by_log_two():
    student, teacher = (torch.tensor(x) for x in logits_pair(5, rows=50, scale=30.0))
    forward = full_divergence(student, teacher, kind="jsd")
    torch.testing.assert_close(forward, full_divergence(teacher, student, kind="jsd"), rtol=1e-9, atol=1e-12)
    assert forward.max() <= math.log(2) + 1e-12 and forward.max() > 0.6


@pytest.mark.parametrize(("kind", "alpha"), [*KINDS, ("jsd", 0.0), ("jsd", 1.0)])
@pytest.mark.parametrize("form", ["full", "tail", "renormalised"])
def test_gradient_agrees_with_finite_differences(kind, alpha, form):
    student, teacher = (torch.tensor(x) for x in logits_pair(11, rows=2, vocabulary=6, scale=1.0))
    ids = student_topk(student, 3)
    student.requires_grad_(True)

    def loss(logits):
        if form == "full":
            return full_divergence(logits, teacher, kind=kind, alpha=alpha, temperature=1.3)
        log_teacher = support_log_probs(teacher, ids, temperature=1.3)
        tail = form == "tail"
        return topk_divergence(logits, log_teacher, ids, kind=kind, alpha=alpha, tail=tail, temperature=1.3)

    assert torch.autograd.gradcheck(loss, (student,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_teacher_receives_no_gradient(kind, alpha):
    student, teacher = (torch.tensor(x, requires_grad=True) for x in logits_pair(2))
    ids = student_topk(student, 3)
    loss = full_divergence(student, teacher, kind=kind, alpha=alpha)
    loss = loss + topk_divergence(student, support_log_probs(teacher, ids), ids, kind=kind, alpha=alpha)
    loss.sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_jsd_gradient_is_that_of_half_the_log_ratio_of_student_to_mixture(seed):
    student, teacher = logits_pair(seed, rows=1, vocabulary=7)
    logits = torch.tensor(student, requires_grad=True)
    (gradient,) = torch.autograd.grad(full_divergence(logits, torch.tensor(teacher), kind="jsd").sum(), logits)
    s, t = softmax(student)[0], softmax(teacher)[0]
    scores = np.eye(7) - s  # row v: gradient of log s_v with respect to the logits
    advantage = 0.5 * np.log(s / (0.5 * (s + t)))
    np.testing.assert_allclose(gradient[0].numpy(), (s * advantage) @ scores, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_token_form_has_the_gradient_of_reverse_kl_on_average_over_the_student(seed):
    student, teacher = logits_pair(seed, rows=1, vocabulary=7)
    logits = torch.tensor(student, requires_grad=True)
    every_token = torch.arange(7).unsqueeze(0)
    log_s = support_log_probs(logits, every_token)[0]
    log_t = support_log_probs(torch.tensor(teacher), every_token)[0]
    expectation = (log_s.detach().exp() * sampled_token_loss(log_s, log_t)).sum()
    (sampled,) = torch.autograd.grad(expectation, logits)
    logits_again = torch.tensor(student, requires_grad=True)
    full = full_divergence(logits_again, torch.tensor(teacher), kind="reverse_kl").sum()
    (exact,) = torch.autograd.grad(full, logits_again)
    torch.testing.assert_close(sampled, exact, rtol=1e-9, atol=1e-11)


def test_forward_kl_to_the_success_conditional_teacher_has_a_gradient_proportional_to_the_failure_rate():
    right = np.array([0.5, 0.3, 0.2, 0, 0, 0])
    wrong = np.array([0, 0, 0, 0.6, 0.3, 0.1])
    norms = []
    for p in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98):
        logits = torch.tensor(np.log(p * right + (1 - p) * wrong), requires_grad=True)
        with np.errstate(divide="ignore"):
            teacher = torch.tensor(np.log(right))
        loss = full_divergence(logits, teacher, kind="forward_kl")
        (gradient,) = torch.autograd.grad(loss, logits)
        norms.append(gradient.norm().item() / (1 - p))
    np.testing.assert_allclose(norms, norms[0], rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(KINDS), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans())
def test_values_do_not_depend_on_how_positions_are_split(seed, kind_alpha, sizes, tail):
    kind, alpha = kind_alpha
    student, teacher = (torch.tensor(x) for x in logits_pair(seed, rows=sum(sizes)))
    ids = student_topk(student, 4)
    log_teacher = support_log_probs(teacher, ids)
    options = {"kind": kind, "alpha": alpha, "tail": tail}
    whole = topk_divergence(student, log_teacher, ids, **options)
    pieces = zip(student.split(sizes), log_teacher.split(sizes), ids.split(sizes), strict=True)
    parts = torch.cat([topk_divergence(*piece, **options) for piece in pieces])
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-15)


def test_leading_dimensions_may_be_several():
    student, teacher = (torch.tensor(x) for x in logits_pair(8, rows=6))
    ids = student_topk(student, 4)
    flat = topk_divergence(student, support_log_probs(teacher, ids), ids, kind="jsd")
    shaped = student.view(1, 6, -1), support_log_probs(teacher, ids).view(1, 6, 4), ids.view(1, 6, 4)
    assert torch.equal(topk_divergence(*shaped, kind="jsd"), flat.view(1, 6))


def test_tail_is_at_least_one_ten_millionth():
    for dtype in (torch.float32, torch.float64):
        log_probs = torch.tensor([[0.0, -40.0]], dtype=dtype, requires_grad=True)
        tail = log_tail_mass(log_probs)
        assert tail.item() == pytest.approx(-16.118096, abs=1e-6)
        tail.sum().backward()
        assert torch.equal(log_probs.grad, torch.zeros_like(log_probs))


@pytest.mark.parametrize("gap", [5.0, 10.0, 15.0, 30.0, 100.0])
@pytest.mark.parametrize(("kind", "alpha"), [*KINDS, ("jsd", 0.0), ("jsd", 1.0)])
@pytest.mark.parametrize("tail", [True, False])
def test_no_nan_when_the_support_holds_all_the_mass(gap, kind, alpha, tail):
    logits = torch.zeros(3, 50, dtype=torch.float32)
    logits[:, 0] = gap
    logits.requires_grad_(True)
    ids = torch.arange(2).repeat(3, 1)
    peaked, elsewhere = torch.zeros(50), torch.zeros(50)
    peaked[0], elsewhere[30] = gap, gap
    log_teacher = support_log_probs(torch.stack([peaked, elsewhere, torch.zeros(50)]), ids)
    loss = topk_divergence(logits, log_teacher, ids, kind=kind, alpha=alpha, tail=tail)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    assert (loss >= -1e-6).all()


@pytest.mark.parametrize("gap", [5.0, 10.0, 12.0])
def test_clamped_tail_agrees_with_the_direct_tail_at_moderate_gaps(gap):
    logits = torch.zeros(1, 50)
    logits[0, 0] = gap
    found = log_tail_mass(support_log_probs(logits, torch.arange(3).unsqueeze(0)))
    direct = logits[0, 3:].double().logsumexp(0) - logits[0].double().logsumexp(0)
    assert found.item() == pytest.approx(direct.item(), abs=0.01)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_entries_impossible_on_both_sides_do_not_exist(kind):
    student, teacher = (torch.tensor(x) for x in logits_pair(4))
    masked = [torch.cat([x, torch.full((4, 3), -math.inf, dtype=x.dtype)], -1) for x in (student, teacher)]
    masked[0].requires_grad_(True)
    loss = full_divergence(*masked, kind=kind)
    torch.testing.assert_close(loss, full_divergence(student, teacher, kind=kind), rtol=1e-12, atol=0)
    ids = torch.tensor([[0, 5, 11, 13]]).repeat(4, 1)
    for tail in (True, False):
        reduced = topk_divergence(masked[0], support_log_probs(masked[1], ids), ids, kind=kind, tail=tail)
        shorter = topk_divergence(student, support_log_probs(teacher, ids[:, :2]), ids[:, :2], kind=kind, tail=tail)
        torch.testing.assert_close(reduced, shorter, rtol=1e-9, atol=1e-12)
        loss = loss + reduced
    (gradient,) = torch.autograd.grad(loss.sum(), masked[0])
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient[:, 11:], torch.zeros(4, 3, dtype=gradient.dtype))


@pytest.mark.parametrize(
    ("kind", "hole", "expected"),
    [
        ("forward_kl", "teacher", math.log(2)),
        ("forward_kl", "student", math.inf),
        ("reverse_kl", "teacher", math.inf),
        ("reverse_kl", "student", math.log(2)),
        ("jsd", "teacher", 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)),
        ("jsd", "student", 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)),
    ],
)
def test_entry_impossible_on_one_side_gives_the_exact_value_and_a_finite_gradient(kind, hole, expected):
    uniform, pointed = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
    student, teacher = (pointed, uniform) if hole == "student" else (uniform, pointed)
    student = student.clone().requires_grad_(True)
    loss = full_divergence(student, teacher, kind=kind)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(gradient).all()
    if hole == "teacher" and kind != "jsd":
        assert gradient[0, 1] > 0  # descent takes probability from what the teacher rules out


@pytest.mark.parametrize("tail", [True, False])
def test_position_that_is_selected_away_leaves_no_nan_behind(tail):
    student = torch.tensor(logits_pair(4, rows=2)[0], dtype=torch.float32, requires_grad=True)
    ids = torch.tensor([[0, 1, 2], [0, 0, 0]])
    log_teacher = torch.tensor([[-1.0, -2.0, -3.0], [-math.inf] * 3])
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        loss = topk_divergence(student, log_teacher, ids, kind=kind, tail=tail)
        total = torch.where(torch.tensor([True, False]), loss, 0.0).sum()
        (gradient,) = torch.autograd.grad(total, student)
        assert torch.isfinite(total) and torch.isfinite(gradient).all()
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_half_precision_is_computed_in_float32(dtype, kind):
    student, teacher = (torch.tensor(x).to(dtype) for x in logits_pair(6))
    ids = student_topk(student, 4)
    log_teacher = support_log_probs(teacher, ids)
    assert log_teacher.dtype == torch.float32
    found = topk_divergence(student, log_teacher, ids, kind=kind)
    assert found.dtype == torch.float32
    assert torch.equal(found, topk_divergence(student.float(), log_teacher, ids, kind=kind))
    assert torch.equal(
        full_divergence(student, teacher, kind=kind), full_divergence(student.float(), teacher.float(), kind=kind)
    )
    student.requires_grad_(True)
    (gradient,) = torch.autograd.grad(topk_divergence(student, log_teacher, ids, kind=kind).sum(), student)
    assert gradient.dtype == dtype and torch.isfinite(gradient).all()


def test_float64_stays_float64_and_mixed_precision_takes_the_wider():
    student, teacher = (torch.tensor(x) for x in logits_pair(6))
    ids = student_topk(student, 4).to(torch.int32)
    log_teacher = support_log_probs(teacher, ids)
    assert topk_divergence(student, log_teacher, ids, kind="jsd").dtype == torch.float64
    assert topk_divergence(student.float(), log_teacher, ids, kind="jsd").dtype == torch.float64
    assert topk_divergence(student.float(), log_teacher.half(), ids, kind="jsd").dtype == torch.float32
    assert full_divergence(student, teacher.half(), kind="jsd").dtype == torch.float64


def test_topk_path_keeps_no_second_tensor_of_vocabulary_size():
    student = torch.randn(8, 4096, requires_grad=True)
    ids = student_topk(student, 16)
    log_teacher = support_log_probs(torch.randn(8, 4096), ids)
    kept = []

    def remember(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        topk_divergence(student, log_teacher, ids, kind="jsd")
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= student.numel()}
    assert large <= {student.data_ptr()}
    assert kept  # the hooks did see the graph


def test_student_topk_lists_the_most_likely_ids_first_and_carries_no_gradient():
    logits = torch.tensor([[0.1, 3.0, -1.0, 2.0]], requires_grad=True)
    assert student_topk(logits, 3, temperature=0.5).tolist() == [[1, 3, 0]]


def test_support_log_probs_are_normalised_over_the_whole_vocabulary():
    logits, _ = logits_pair(9)
    ids = top_ids(logits, 3)
    expected = np.log(np.take_along_axis(softmax(logits / 0.8), ids, -1))
    found = support_log_probs(torch.tensor(logits), torch.tensor(ids), temperature=0.8)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_new_kind_is_one_registered_function():
    @register_divergence("total_variation_for_a_test")
    def _total_variation(log_student, log_teacher, alpha):
        return 0.5 * (log_student.exp() - log_teacher.exp()).abs()

    try:
        found = full_divergence(log_rows((0.5, 0.5)), log_rows((0.9, 0.1)), kind="total_variation_for_a_test")
        assert found.item() == pytest.approx(0.4)
    finally:
        del DIVERGENCES["total_variation_for_a_test"]


LOGITS = torch.zeros(2, 5)
IDS = torch.tensor([[0, 1], [0, 1]])
LOG_PROBS = torch.full((2, 2), -2.0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGITS, LOG_PROBS, IDS), {"kind": "kl"}, "allowed: .*forward_kl.*jsd.*reverse_kl"),
        ((LOGITS, LOG_PROBS, IDS), {"alpha": 1.1}, "alpha"),
        ((LOGITS, LOG_PROBS, IDS), {"alpha": math.nan}, "alpha"),
        ((LOGITS, LOG_PROBS, IDS), {"temperature": 0.0}, "temperature"),
        ((LOGITS, LOG_PROBS[:, :1], IDS), {}, "same shape"),
        ((LOGITS[:1], LOG_PROBS, IDS), {}, "must be"),
        ((LOGITS, LOG_PROBS, IDS + 4), {}, r"\[0, 5\)"),
        ((LOGITS, LOG_PROBS, IDS - 1), {}, r"\[0, 5\)"),
        ((LOGITS, LOG_PROBS, IDS.float()), {}, "integers"),
        ((LOGITS, LOG_PROBS.long(), IDS), {}, "floating"),
        ((LOGITS.long(), LOG_PROBS, IDS), {}, "floating"),
        ((LOGITS, LOG_PROBS[:, :0], IDS[:, :0]), {}, "empty"),
    ],
)
def test_topk_divergence_refuses_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        topk_divergence(*arguments, **{"kind": "jsd", **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: full_divergence(LOGITS, LOGITS[:, :4], kind="jsd"), "same shape"),
        (lambda: full_divergence(LOGITS, LOGITS, kind="nope"), "allowed"),
        (lambda: full_divergence(LOGITS, LOGITS, kind="jsd", temperature=-1.0), "temperature"),
        (lambda: student_topk(LOGITS, 6), "vocabulary size 5"),
        (lambda: student_topk(LOGITS, 0), "k must be"),
        (lambda: student_topk(LOGITS, 2, temperature=math.inf), "temperature"),
        (lambda: sampled_token_loss(torch.zeros(2), torch.zeros(3)), "match"),
    ],
)
def test_other_functions_refuse_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
