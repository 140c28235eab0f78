"""Chunked, recomputing losses against textbook formulas in float64, and what they keep, read and refuse."""

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext import chunks
from verl_ext.chunks import Head, Logits, OnSupport
from verl_ext.divergence import full_divergence, linear_divergence, topk_divergence
from verl_ext.divergence_kinds import DIVERGENCES, divergence_of, register_divergence
from verl_ext.token_losses import Measure, token_losses
from verl_ext.token_reading import read

torch.set_num_threads(1)

ALL_KINDS = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.0),
    ("jsd", 0.2),
    ("jsd", 0.5),
    ("jsd", 0.9),
    ("jsd", 1.0),
    ("mixed", 0.3),
    ("mixed", 1.0),
    ("akl", 0.5),
]
PROPER_KINDS = [pair for pair in ALL_KINDS if pair[0] != "akl"]
FORMS = [("full", True)] + [(support, tail) for support in ("student_topk", "teacher_topk", "given") for tail in (1, 0)]
TOPK = 3
SEEDS = st.integers(0, 2**32 - 1)
KIND_NAMES = [f"{kind}-{alpha}" for kind, alpha in ALL_KINDS]
FORM_NAMES = [f"{support}-{'tail' if tail else 'renormalised'}" for support, tail in FORMS]
each_kind = pytest.mark.parametrize(("kind", "alpha"), ALL_KINDS, ids=KIND_NAMES)
each_form = pytest.mark.parametrize(("support", "tail"), FORMS, ids=FORM_NAMES)
each_temperature = pytest.mark.parametrize("temperature", [1.0, 1.3])


# -------------------------------------------------------------------------------------------------------- the oracle


def kl_entries(p, q):
    """p log(p / q) with 0 log 0 = 0 and p log(p / 0) = inf."""
    return torch.special.xlogy(p, p) - torch.special.xlogy(p, q)


def head_share(s, t):
    """AKL's weight of the forward KL, row by row, as the paper's code states it."""
    shares = []
    for student, teacher in zip(s.tolist(), t.tolist(), strict=True):
        head, cumulated = set(), 0.0
        for place, outcome in enumerate(sorted(range(len(teacher)), key=lambda v: -teacher[v])):
            cumulated += teacher[outcome]
            if place == 0 or cumulated <= 0.5:
                head.add(outcome)
        gaps = [abs(a - b) for a, b in zip(student, teacher, strict=True)]
        total = sum(gaps)
        shares.append(sum(gaps[v] for v in head) / total if total else 0.5)
    return torch.tensor(shares, dtype=torch.float64).unsqueeze(-1)


def textbook_entries(s, t, kind, alpha):
    """The divergence of two arrays of probabilities, outcome by outcome."""
    forward, reverse = kl_entries(t, s), kl_entries(s, t)
    if kind == "forward_kl" or (kind == "jsd" and alpha == 0.0):
        return forward
    if kind == "reverse_kl" or (kind == "jsd" and alpha == 1.0):
        return reverse
    if kind == "jsd":
        m = (1 - alpha) * s + alpha * t
        return (1 - alpha) * kl_entries(s, m) + alpha * kl_entries(t, m)
    weight = alpha if kind == "mixed" else head_share(s.detach(), t)
    return weight * forward + (1 - weight) * reverse


def restricted(p, ids, tail):
    chosen = p.gather(-1, ids)
    if tail:
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)
    return chosen / chosen.sum(-1, keepdim=True)


def support_ids(student, teacher, support):
    """Ids [N, TOPK] by a full sort; None on the whole vocabulary."""
    if support == "full":
        return None
    if support == "given":
        vocabulary = student.shape[-1]
        return torch.tensor([[(3 * row + 2 * k) % vocabulary for k in range(TOPK)] for row in range(len(student))])
    chooser = student if support == "student_topk" else teacher
    return chooser.detach().sort(dim=-1, descending=True).indices[:, :TOPK]


def textbook(student, teacher, kind, alpha, support="full", tail=True, temperature=1.0):
    """Divergence [N] of float64 logits, differentiable by the student's."""
    ids = support_ids(student, teacher, support)
    s, t = torch.softmax(student / temperature, -1), torch.softmax(teacher.detach() / temperature, -1)
    if ids is not None:
        s, t = restricted(s, ids, tail), restricted(t, ids, tail)
    return textbook_entries(s, t, kind, alpha).sum(-1)


# ----------------------------------------------------------------------------------------------------------- the inputs


def sides(seed, rows=4, vocabulary=7, width=3, teacher_width=2, scale=1.2):
    """Hidden states and heads of a student and a teacher of another width, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    student = Head(normal(rows, width), normal(vocabulary, width))
    return student, Head(normal(rows, teacher_width), normal(vocabulary, teacher_width))


def logits_of(side):
    return side.hidden @ side.weight.t()


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def on_support(student, teacher, temperature=1.0):
    ids = support_ids(student, teacher, "given")
    return OnSupport(ids, torch.log(torch.softmax(teacher / temperature, -1).gather(-1, ids)))


def measure_of(kind, alpha, support="full", tail=True, **options):
    support = "full" if support == "given" else support
    return Measure(kind, alpha, support=support, topk=0 if support == "full" else TOPK, tail=bool(tail), **options)


def weighted_gradients(values, inputs, seed=0):
    """Gradients of a sum with uneven factors, so that no row can stand in for another."""
    factors = torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=values.dtype)
    return torch.autograd.grad((values * factors).sum(), inputs)


def assert_same(found, expected, atol=1e-11):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=atol)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(chunks.HEAD_ROWS, "cpu", 3)


# ----------------------------------------------------------------------------------- every kind, support and placement


@each_temperature
@each_form
@each_kind
def test_values_and_gradients_from_logits_are_those_of_the_definition(kind, alpha, support, tail, temperature):
    student, teacher = (logits_of(side) for side in sides(1))
    (student,) = leaves(student)
    other = on_support(student.detach(), teacher, temperature) if support == "given" else Logits(teacher)

    def loss(logits):
        options = {"measure": measure_of(kind, alpha, support, tail), "teacher": other}
        return token_losses(logits, temperature=temperature, row_chunk=2, **options).divergence

    expected = textbook(student, teacher, kind, alpha, support, tail, temperature)
    found = loss(student)
    assert_same([found], [expected])
    assert_same(weighted_gradients(found, [student]), weighted_gradients(expected, [student]))
    if kind != "akl":  # its shares count as constants
        assert torch.autograd.gradcheck(loss, (student,), fast_mode=True)


@each_temperature
@each_form
@each_kind
def test_values_and_gradients_from_hidden_states_are_those_of_the_definition(
    small_blocks, kind, alpha, support, tail, temperature
):
    student, teacher = sides(2)
    hidden, weight = leaves(student.hidden, student.weight)
    given_ids = support == "given"
    other = on_support(logits_of(student), logits_of(teacher), temperature) if given_ids else teacher

    def loss(hidden, weight):
        options = {"measure": measure_of(kind, alpha, support, tail), "teacher": other}
        return token_losses(hidden, weight, temperature=temperature, row_chunk=2, **options).divergence

    expected = textbook(hidden @ weight.t(), logits_of(teacher), kind, alpha, support, tail, temperature)
    found = loss(hidden, weight)
    assert_same([found], [expected])
    assert_same(weighted_gradients(found, [hidden, weight]), weighted_gradients(expected, [hidden, weight]))
    if kind != "akl":
        assert torch.autograd.gradcheck(loss, (hidden, weight), fast_mode=True)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("support", ["full", "student_topk"])
def test_every_element_of_the_jacobian_agrees_with_finite_differences(small_blocks, kind, support):
    student, teacher = sides(3, vocabulary=5)

    def loss(hidden, weight):
        return token_losses(
            hidden, weight, measure=measure_of(kind, 0.4, support), teacher=teacher, row_chunk=2
        ).divergence

    assert torch.autograd.gradcheck(loss, tuple(leaves(student.hidden, student.weight)))


@pytest.mark.parametrize(("support", "tail"), FORMS[:5])
def test_teacher_may_have_a_temperature_of_its_own(support, tail):
    assert support != "given"  # given log-probabilities already are at their temperature
    student, teacher = (logits_of(side) for side in sides(4))
    found = token_losses(
        student,
        measure=measure_of("mixed", 0.3, support, tail),
        teacher=Logits(teacher),
        temperature=1.3,
        teacher_temperature=0.7,
    ).divergence
    assert_same([found], [textbook(student / 1.3, teacher / 0.7, "mixed", 0.3, support, tail)])


@each_form
def test_masses_are_the_probability_on_the_support_and_carry_no_gradient(support, tail):
    student, teacher = (logits_of(side) for side in sides(5))
    other = on_support(student, teacher) if support == "given" else Logits(teacher)
    (student,) = leaves(student)
    values = token_losses(student, measure=measure_of("jsd", 0.5, support, tail), teacher=other)
    ids = support_ids(student, teacher, support)
    if ids is None:
        assert values.student_mass is None and values.teacher_mass is None
        return
    masses = [torch.softmax(side.detach(), -1).gather(-1, ids).sum(-1) for side in (student, teacher)]
    assert_same([values.student_mass, values.teacher_mass], masses)
    assert not values.student_mass.requires_grad and not values.teacher_mass.requires_grad


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_gradient_reaches_only_what_asks_for_it(small_blocks, wanted):
    student, teacher = sides(6)
    hidden, weight = leaves(student.hidden, student.weight)
    full = token_losses(hidden, weight, measure=measure_of("jsd", 0.5), teacher=teacher).divergence
    expected = dict(zip(["hidden", "weight"], weighted_gradients(full, [hidden, weight]), strict=True))
    (hidden if wanted == "weight" else weight).requires_grad_(False)
    one = hidden if wanted == "hidden" else weight
    for support in ("full", "student_topk"):
        values = token_losses(hidden, weight, measure=measure_of("jsd", 0.5, support), teacher=teacher).divergence
        (found,) = weighted_gradients(values, [one])
        if support == "full":
            assert_same([found], [expected[wanted]])


def test_teacher_receives_no_gradient():
    student, teacher = sides(7)
    hidden, other_hidden, other_weight = leaves(student.hidden, teacher.hidden, teacher.weight)
    (other_logits,) = leaves(logits_of(teacher))
    ids = support_ids(logits_of(student), other_logits, "given")
    teachers = [
        (Head(other_hidden, other_weight), "full"),
        (Head(other_hidden, other_weight), "teacher_topk"),
        (Logits(other_logits), "full"),
        (Logits(other_logits), "student_topk"),
        (OnSupport(ids, torch.log_softmax(other_logits, -1).gather(-1, ids)), "given"),
    ]
    for other, support in teachers:
        for kind in ("akl", "reverse_kl"):
            measure = measure_of(kind, 0.5, support)
            token_losses(hidden, student.weight, measure=measure, teacher=other).divergence.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert other_hidden.grad is None and other_weight.grad is None and other_logits.grad is None


# ------------------------------------------------------------------------------------------------- published examples


def log_row(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


THREE_TEACHER, THREE_STUDENT = log_row(0.7, 0.2, 0.1), log_row(0.5, 0.3, 0.2)


def test_adaptive_kl_has_its_published_value():
    assert full_divergence(THREE_STUDENT, THREE_TEACHER, kind="akl").item() == pytest.approx(0.088578, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_form
def test_adaptive_kl_and_its_gradient_are_zero_at_equality(support, tail, dtype):
    (student,) = leaves(logits_of(sides(8)[0]).to(dtype))
    other = on_support(student.detach(), student.detach()) if support == "given" else Logits(student.detach())
    values = token_losses(student, measure=measure_of("akl", 0.5, support, tail), teacher=other).divergence
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.05, 4.0))
def test_adaptive_kl_lies_between_the_forward_and_the_reverse_kl(seed, scale):
    student, teacher = (logits_of(side) for side in sides(seed, scale=scale))
    forward, reverse, adaptive = (
        full_divergence(student, teacher, kind=kind) for kind in ("forward_kl", "reverse_kl", "akl")
    )
    assert (adaptive >= torch.minimum(forward, reverse) - 1e-12).all()
    assert (adaptive <= torch.maximum(forward, reverse) + 1e-12).all()


def test_clipping_the_entries_has_the_published_value_and_no_gradient_through_the_clipped():
    (student,) = leaves(log_row(0.5, 0.5))
    value = full_divergence(student, log_row(0.9, 0.1), kind="forward_kl", clip=0.05)
    assert value.item() == pytest.approx(-0.110944, abs=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    # Only -0.1 log s of the second outcome is left.
    torch.testing.assert_close(gradient, torch.tensor([[0.05, -0.05]], dtype=torch.float64), rtol=0, atol=1e-12)


@each_form
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "mixed", "akl"])
@pytest.mark.parametrize("level", ["entry", "token"])
def test_clip_limits_every_entry_or_the_position(kind, support, tail, level):
    student, teacher = (logits_of(side) for side in sides(9))
    (student,) = leaves(student)
    ids = support_ids(student, teacher, support)
    s, t = torch.softmax(student, -1), torch.softmax(teacher, -1)
    if ids is not None:
        s, t = restricted(s, ids, tail), restricted(t, ids, tail)
    entries = textbook_entries(s, t, kind, 0.3)
    unlimited = (entries if level == "entry" else entries.sum(-1)).detach()
    clip = unlimited[unlimited > 0].median().item() + 1e-3
    limit = torch.tensor(clip, dtype=torch.float64)
    cut = torch.minimum(entries, limit).sum(-1) if level == "entry" else torch.minimum(entries.sum(-1), limit)
    assert (cut < entries.sum(-1)).any() and not (cut == limit).all()
    other = on_support(student.detach(), teacher) if support == "given" else Logits(teacher)
    measure = measure_of(kind, 0.3, support, tail, clip=clip, clip_level=level)
    found = token_losses(student, measure=measure, teacher=other, row_chunk=2).divergence
    assert_same([found], [cut])
    assert_same(weighted_gradients(found, [student]), weighted_gradients(cut, [student]))


def concatenated(parts, shares):
    """A head over hidden states side by side: its logits are the sum of ``share * logits`` (SDPO's trust region)."""
    hidden = torch.cat([part.hidden * share for part, share in zip(parts, shares, strict=True)], dim=-1)
    return Head(hidden, torch.cat([part.weight for part in parts], dim=-1))


def test_teacher_of_concatenated_heads_is_the_normalised_geometric_mean():
    eye = torch.eye(3, dtype=torch.float64)
    reference, student = Head(log_row(0.6, 0.3, 0.1), eye), Head(log_row(0.2, 0.3, 0.5), eye)
    both = concatenated([reference, student], [0.95, 0.05])
    expected = torch.tensor([[0.581711, 0.307279, 0.111010]], dtype=torch.float64)
    torch.testing.assert_close(torch.softmax(both.block(slice(0, 1)), -1), expected, rtol=0, atol=1e-6)


def test_teacher_of_concatenated_heads_mixes_the_logits(small_blocks):
    student, reference = sides(10)
    both = concatenated([reference, student], [0.7, 0.3])
    mixed = 0.7 * logits_of(reference) + 0.3 * logits_of(student)
    torch.testing.assert_close(both.block(slice(1, 3)), mixed[1:3])
    (hidden,) = leaves(student.hidden)
    found = token_losses(hidden, student.weight, measure=measure_of("jsd", 0.5), teacher=both).divergence
    expected = textbook(hidden @ student.weight.t(), mixed, "jsd", 0.5)
    assert_same([found], [expected])
    assert_same(weighted_gradients(found, [hidden]), weighted_gradients(expected, [hidden]))


# ---------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from(ALL_KINDS), st.sampled_from(FORMS), st.floats(0.1, 4.0))
def test_no_divergence_is_negative(seed, kind_alpha, form, scale):
    student, teacher = (logits_of(side) for side in sides(seed, scale=scale))
    other = on_support(student, teacher) if form[0] == "given" else Logits(teacher)
    values = token_losses(student, measure=measure_of(*kind_alpha, *form), teacher=other).divergence
    # The floor under the tail lets both sides sum to 1 + 1e-7.
    assert (values >= -2e-7).all()
    if form[0] == "full":
        assert (values >= -1e-12).all()


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from(ALL_KINDS), st.sampled_from(FORMS), st.sampled_from([1.0, 1.3]))
def test_divergence_and_gradient_vanish_at_equality(seed, kind_alpha, form, temperature):
    (student,) = leaves(logits_of(sides(seed)[0]))
    same = student.detach()
    other = on_support(same, same, temperature) if form[0] == "given" else Logits(same)
    measure = measure_of(*kind_alpha, *form)
    values = token_losses(student, measure=measure, teacher=other, temperature=temperature).divergence
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.abs().max() < 1e-9 and gradient.abs().max() < 1e-9


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(PROPER_KINDS), st.sampled_from(["student_topk", "teacher_topk"]), st.floats(0.1, 3.0))
def test_top_k_with_tail_stays_below_the_full_value_and_reaches_it(seed, kind_alpha, support, scale):
    student, teacher = (logits_of(side) for side in sides(seed, scale=scale))
    full = full_divergence(student, teacher, kind=kind_alpha[0], alpha=kind_alpha[1])
    for k in range(1, 8):
        measure = Measure(*kind_alpha, support=support, topk=k)
        reduced = token_losses(student, measure=measure, teacher=Logits(teacher)).divergence
        assert (reduced <= full + 2e-6).all()
    assert_same([reduced], [full], atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from(PROPER_KINDS), st.floats(0.1, 12.0), st.integers(1, 4), st.booleans())
def test_in_place_forms_agree_with_the_general_path(seed, kind_alpha, scale, row_chunk, holes):
    kind, alpha = kind_alpha
    student, teacher = (logits_of(side) for side in sides(seed, scale=scale))
    if holes:
        student[0, 1], teacher[2, 3] = -math.inf, -math.inf
        student[3, 5] = teacher[3, 5] = -math.inf
    (student,) = leaves(student)
    log_s, log_t = torch.log_softmax(student.detach(), -1), torch.log_softmax(teacher, -1)
    value, slope = divergence_of(DIVERGENCES[kind], log_s, log_t, alpha)
    measure = measure_of(kind, alpha)
    found = token_losses(student, measure=measure, teacher=Logits(teacher), row_chunk=row_chunk).divergence
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope - log_s.exp() * slope.sum(-1, keepdim=True), rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    SEEDS,
    st.sampled_from(ALL_KINDS),
    st.sampled_from(FORMS),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_neither_chunks_nor_blocks_nor_splits_of_rows_change_anything(seed, kind_alpha, form, sizes, chunk, block):
    rows = sum(sizes)
    student, teacher = sides(seed, rows=rows)
    tokens = torch.arange(rows) % 7
    on_ids = on_support(logits_of(student), logits_of(teacher))

    def outcome(slices, **options):
        hidden, weight = leaves(student.hidden, student.weight)
        divergences, total = [], 0.0
        for part in slices:
            cut = Head(teacher.hidden[part], teacher.weight)
            cut = OnSupport(on_ids.ids[part], on_ids.log_probs[part]) if form[0] == "given" else cut
            measure = measure_of(*kind_alpha, *form)
            values = token_losses(
                hidden[part], weight, measure=measure, teacher=cut, tokens=tokens[part], entropy=True, **options
            )
            divergences.append(values.divergence)
            total = total + values.divergence.sum() + 0.3 * values.log_prob.sum() - 0.2 * values.entropy.square().sum()
        return torch.cat(divergences), *torch.autograd.grad(total, [hidden, weight])

    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    splits = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    whole = outcome([slice(0, rows)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.HEAD_ROWS, "cpu", block)
        assert_same(outcome([slice(0, rows)], row_chunk=chunk), whole)
        assert_same(outcome(splits, row_chunk=chunk), whole)


@settings(max_examples=40, deadline=None)
@given(
    SEEDS,
    st.sampled_from(["akl", "jsd", "forward_kl"]),
    st.sampled_from(FORMS),
    st.permutations(range(6)),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_rows_not_listed_are_never_read(seed, kind, form, order, count, from_hidden, rubbish):
    student, teacher = sides(seed, rows=6)
    positions = torch.tensor(order[:count], dtype=torch.int64)
    unlisted = torch.tensor(order[count:], dtype=torch.int64)
    if form[0] == "given":
        ids = support_ids(logits_of(student), logits_of(teacher), "given")[:count]
        log_t = torch.log_softmax(logits_of(teacher), -1)[positions]
        other = OnSupport(ids, log_t.gather(-1, ids))
    else:
        other = Head(teacher.hidden[positions], teacher.weight)
    options = {"measure": measure_of(kind, 0.5, *form), "teacher": other, "entropy": True, "row_chunk": 2}
    options["tokens"] = torch.arange(count) % 7

    def outcome(source, weight, positions=None):
        source, weight = leaves(source, weight)
        head = (weight,) if from_hidden else ()
        values = token_losses(source, *head, positions=positions, **options)
        total = sum((value * torch.arange(1, count + 1)).sum() for value in values[:3])
        return values[:3], torch.autograd.grad(total, [source, *head])

    source = student.hidden if from_hidden else logits_of(student)
    broken = source.index_fill(0, unlisted, rubbish)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.HEAD_ROWS, "cpu", 2)
        values, gradients = outcome(broken, student.weight, positions)
        expected_values, expected = outcome(source[positions], student.weight)
    assert_same(values, expected_values)
    assert_same([gradients[0][positions], *gradients[1:]], expected)
    assert torch.equal(gradients[0][unlisted], torch.zeros_like(gradients[0][unlisted]))


def test_mixture_of_kls_is_the_forward_kl_at_one_and_the_reverse_kl_at_zero():
    for alpha, expected in ((1.0, 0.085123), (0.0, 0.092033), (0.25, 0.25 * 0.085123 + 0.75 * 0.092033)):
        found = full_divergence(THREE_STUDENT, THREE_TEACHER, kind="mixed", alpha=alpha)
        assert found.item() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------ impossible outcomes


@each_kind
@pytest.mark.parametrize("hole", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_outcomes_have_the_textbook_value_and_a_finite_gradient(kind, alpha, hole, dtype):
    student, teacher = (logits_of(side).to(dtype) for side in sides(11))
    if hole != "teacher":
        student[1, 2] = student[1, 6] = -math.inf
    if hole != "student":
        teacher[1, 2] = teacher[1, 6] = -math.inf
    (student,) = leaves(student)
    found = token_losses(student, measure=measure_of(kind, alpha), teacher=Logits(teacher), row_chunk=3).divergence
    s, t = (torch.softmax(side.detach().double(), -1) for side in (student, teacher))
    expected = textbook_entries(s, t, kind, alpha).sum(-1)
    if kind in ("mixed", "akl"):  # a KL that counts for nothing counts for nothing where it is infinite, too
        forward, reverse = kl_entries(t, s).sum(-1), kl_entries(s, t).sum(-1)
        share = torch.full((4,), alpha, dtype=torch.float64) if kind == "mixed" else head_share(s, t).squeeze(-1)
        expected = torch.where(share > 0, share * forward, 0.0) + torch.where(share < 1, (1 - share) * reverse, 0.0)
    assert expected[[0, 2, 3]].isfinite().all()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "alpha", "hole"),
    [
        ("forward_kl", 0.5, "teacher"),
        ("reverse_kl", 0.5, "student"),
        ("jsd", 0.3, "student"),
        ("jsd", 0.3, "teacher"),
        ("jsd", 0.0, "teacher"),
        ("jsd", 1.0, "student"),
        ("mixed", 1.0, "teacher"),
        ("mixed", 0.0, "student"),
    ],
)
def test_gradient_beside_an_impossible_outcome_is_that_of_the_textbook_where_the_value_is_finite(kind, alpha, hole):
    student, teacher = (logits_of(side) for side in sides(12))
    (student if hole == "student" else teacher)[:, 4] = -math.inf
    (student,) = leaves(student)
    (present,) = leaves(torch.cat([student.detach()[:, :4], student.detach()[:, 5:]], -1))
    if hole == "student":
        s = torch.softmax(present, -1)
        s = torch.cat([s[:, :4], torch.zeros(4, 1, dtype=torch.float64), s[:, 4:]], -1)
    else:
        s = torch.softmax(student, -1)
    t = torch.softmax(teacher, -1)
    if kind == "mixed":
        kind_alone = "forward_kl" if alpha == 1.0 else "reverse_kl"
        expected = textbook_entries(s, t, kind_alone, alpha).sum(-1)
    else:
        expected = textbook_entries(s, t, kind, alpha).sum(-1)
    found = token_losses(student, measure=measure_of(kind, alpha), teacher=Logits(teacher), row_chunk=3).divergence
    assert_same([found], [expected])
    (gradient,) = torch.autograd.grad(found.sum(), student)
    if hole == "teacher":
        (by_hand,) = torch.autograd.grad(expected.sum(), student)
        assert_same([gradient], [by_hand])
    else:
        (by_hand,) = torch.autograd.grad(expected.sum(), present)
        assert_same([torch.cat([gradient[:, :4], gradient[:, 5:]], -1)], [by_hand])
        assert torch.equal(gradient[:, 4], torch.zeros(4, dtype=torch.float64))


def test_impossible_outcomes_in_hidden_form_leave_other_rows_as_they_are(small_blocks):
    """A head row of -inf makes that token impossible wherever the hidden state is positive."""
    student, teacher = sides(13)
    hidden, weight = student.hidden.abs(), student.weight.clone()
    weight[2] = -math.inf
    logits = hidden @ weight.t()
    hidden.requires_grad_()
    for kind in ("reverse_kl", "jsd"):
        found = token_losses(hidden, weight, measure=measure_of(kind, 0.5), teacher=teacher, row_chunk=2).divergence
        s, t = torch.softmax(logits, -1), torch.softmax(logits_of(teacher), -1)
        assert_same([found], [textbook_entries(s, t, kind, 0.5).sum(-1)])


@pytest.mark.parametrize(("dtype", "log_probability"), [(torch.float64, -46.0), (torch.float32, -70.0)])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_divergence_is_infinite_however_small_the_probability_of_what_the_other_side_rules_out(
    kind, dtype, log_probability
):
    ruled_out, small = torch.zeros(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype)
    ruled_out[0, 2], small[0, 2] = -math.inf, log_probability
    student, teacher = (ruled_out, small) if kind == "forward_kl" else (small, ruled_out)
    assert full_divergence(student, teacher, kind=kind).item() == math.inf


@each_kind
@pytest.mark.parametrize("support", ["student_topk", "teacher_topk", "given"])
def test_support_whose_mass_rounds_to_one_has_a_finite_value_and_gradient(kind, alpha, support):
    student = torch.zeros(3, 50)
    student[:, 0] = 30.0
    teacher = torch.zeros(3, 50)
    teacher[0, 0], teacher[1, 30] = 30.0, 30.0
    other = Logits(teacher)
    if support == "given":
        ids = torch.arange(TOPK).repeat(3, 1)
        other = OnSupport(ids, torch.log_softmax(teacher, -1).gather(-1, ids))
    (student,) = leaves(student)
    values = token_losses(student, measure=measure_of(kind, alpha, support), teacher=other, entropy=True)
    assert values.student_mass.max() == 1.0
    (gradient,) = torch.autograd.grad(values.divergence.sum(), student)
    assert values.divergence.isfinite().all() and gradient.isfinite().all()
    assert (values.divergence >= -1e-6).all()


# ------------------------------------------------------------------------------- log-probabilities, entropy, divergence


def dense(student, teacher, tokens, taught, support, tail, temperature):
    """Divergence, log-probability and entropy by plain autograd over whole rows."""
    log_p = torch.log_softmax(student / temperature, -1)
    divergence = torch.zeros(len(student), dtype=torch.float64)
    if taught:
        known = textbook(student[:taught], teacher[:taught], "mixed", 0.3, support, tail, temperature)
        divergence = torch.cat([known, divergence[taught:]])
    return divergence, log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@each_form
@each_temperature
@pytest.mark.parametrize("taught", [1, 4, 7])
@pytest.mark.parametrize("from_hidden", [True, False])
def test_all_outputs_together_agree_with_dense_autograd_where_only_some_rows_have_a_teacher(
    small_blocks, support, tail, temperature, taught, from_hidden
):
    student, teacher = sides(14, rows=7)
    tokens = torch.tensor([0, 6, 2, 2, 5, 1, 3])
    cut = Head(teacher.hidden[:taught], teacher.weight)
    if support == "given":
        cut = on_support(logits_of(student)[:taught], logits_of(teacher)[:taught], temperature)
    inputs = leaves(student.hidden, student.weight) if from_hidden else leaves(logits_of(student))
    measure = measure_of("mixed", 0.3, support, tail)
    options = {"tokens": tokens, "entropy": True, "temperature": temperature, "row_chunk": 2}
    values = token_losses(*inputs, measure=measure, teacher=cut, **options)
    logits = inputs[0] @ inputs[1].t() if from_hidden else inputs[0]
    expected = dense(logits, logits_of(teacher), tokens, taught, support, tail, temperature)
    assert_same(values[:3], expected)
    assert torch.equal(values.divergence[taught:], torch.zeros(7 - taught, dtype=torch.float64))
    if support != "full":
        assert torch.equal(values.student_mass[taught:], torch.zeros(7 - taught, dtype=torch.float64))
    # Each output alone, then the three together with different factors.
    for factors in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.7, -1.1, 0.4)):
        rows = torch.linspace(-1, 2, 7, dtype=torch.float64)
        totals = [
            sum(f * (value * rows).sum() for f, value in zip(factors, outputs, strict=True) if f)
            for outputs in (values[:3], expected)
        ]
        found, wanted = (torch.autograd.grad(total, inputs, retain_graph=True) for total in totals)
        assert_same(found, wanted)


def test_log_prob_and_entropy_need_no_teacher():
    student, _ = sides(15)
    (logits,) = leaves(logits_of(student))
    tokens = torch.tensor([1, 0, 6, 3])
    values = token_losses(logits, tokens=tokens, entropy=True, temperature=1.3)
    assert values.divergence is None and values.student_mass is None
    expected = dense(logits, None, tokens, 0, "full", True, 1.3)[1:]
    assert_same(values[1:3], expected)
    found = torch.autograd.grad(values.log_prob.sum() + values.entropy.square().sum(), logits)
    assert_same(found, torch.autograd.grad(expected[0].sum() + expected[1].square().sum(), logits))


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_of_a_row_with_impossible_tokens_has_the_gradient_of_the_row_without_them(factor, dtype):
    (logits,) = leaves(torch.tensor([[1.0, -math.inf, 0.0, 0.5]], dtype=dtype))
    values = token_losses(logits, tokens=torch.tensor([2]), entropy=True)
    (shorter,) = leaves(torch.tensor([[1.0, 0.0, 0.5]], dtype=dtype))
    log_p = torch.log_softmax(shorter, -1)
    expected = -(log_p.exp() * log_p).sum()
    torch.testing.assert_close(values.entropy.sum(), expected)
    (found,) = torch.autograd.grad(factor * values.entropy.sum(), logits)
    (wanted,) = torch.autograd.grad(factor * expected, shorter)
    torch.testing.assert_close(found[:, [0, 2, 3]], wanted)
    assert found[0, 1] == 0


@pytest.mark.parametrize("support", ["full", "student_topk", "teacher_topk"])
@pytest.mark.parametrize("from_hidden", [True, False])
def test_log_prob_and_entropy_of_the_teacher_come_with_it_and_carry_no_gradient(small_blocks, support, from_hidden):
    student, teacher = sides(27, rows=6)
    inputs = leaves(student.hidden, student.weight) if from_hidden else leaves(logits_of(student))
    cut = Head(teacher.hidden[:4], teacher.weight)
    tokens = torch.tensor([6, 1, 0, 3, 3, 2])
    options = {"measure": measure_of("jsd", 0.5, support), "teacher": cut, "tokens": tokens, "row_chunk": 2}
    values = token_losses(*inputs, teacher_entropy=True, temperature=1.3, **options)
    log_t = torch.log_softmax(logits_of(cut) / 1.3, -1)
    assert_same([values.teacher_log_prob[:4]], [log_t.gather(-1, tokens[:4].unsqueeze(-1)).squeeze(-1)])
    assert_same([values.teacher_entropy[:4]], [-(log_t.exp() * log_t).sum(-1)])
    for value in (values.teacher_log_prob, values.teacher_entropy):
        assert not value.requires_grad and torch.equal(value[4:], torch.zeros(2, dtype=torch.float64))
    expected = textbook(logits_of(Head(student.hidden[:4], student.weight)), logits_of(cut), "jsd", 0.5, support)
    assert_same([token_losses(*inputs, teacher_entropy=True, **options).divergence[:4]], [expected])


def test_entropy_changed_in_place_does_not_change_its_gradient_silently():
    (logits,) = leaves(logits_of(sides(28)[0]))
    (expected,) = torch.autograd.grad(3.0 * token_losses(logits, entropy=True).entropy.sum(), logits)
    entropy = token_losses(logits, entropy=True).entropy
    entropy.mul_(3.0)
    try:
        (found,) = torch.autograd.grad(entropy.sum(), logits)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_same([found], [expected])


def test_nothing_is_recorded_without_gradient():
    student, teacher = sides(16)
    (hidden,) = leaves(student.hidden)
    options = {"measure": measure_of("jsd", 0.5, "student_topk"), "teacher": teacher, "entropy": True}
    recorded = token_losses(hidden, student.weight, **options)
    with torch.no_grad():
        silent = token_losses(hidden, student.weight, **options)
    plain = token_losses(student.hidden, student.weight, **options)
    assert recorded.divergence.requires_grad
    for values in (silent, plain):
        assert not values.divergence.requires_grad and not values.entropy.requires_grad
        assert torch.equal(values.divergence, recorded.divergence)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "come together"),
        ({"measure": None}, "come together"),
        ({"teacher": Logits(torch.zeros(5, 7))}, "5 positions, the student 4"),
        ({"teacher": Logits(torch.zeros(4, 6))}, "7 tokens, the teacher's 6"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "3 tokens for 4 positions"),
        ({"positions": torch.tensor([0, 1])}, "4 positions, the student 2"),
        ({"measure": Measure("jsd", support="student_topk", topk=8)}, "topk=8"),
    ],
)
def test_token_losses_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        token_losses(torch.zeros(4, 7), **{"measure": Measure("jsd"), "teacher": Logits(torch.zeros(4, 7)), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "allowed: .*akl.*mixed"),
        ({"alpha": -0.1}, "alpha"),
        ({"support": "top"}, "allowed: student_topk, teacher_topk, full"),
        ({"support": "teacher_topk"}, "at least 1"),
        ({"support": "student_topk", "topk": True}, "at least 1"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip": math.nan}, "clip must be positive"),
        ({"clip": 0.1, "clip_level": "row"}, "allowed|unknown"),
    ],
)
def test_measure_refuses_what_has_no_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        Measure(**{"kind": "jsd", **options})


# ----------------------------------------------------------------------------------------------------- from both heads


@each_kind
def test_divergence_of_hidden_states_equals_that_of_their_logits(small_blocks, kind, alpha):
    student, teacher = sides(17, rows=8)
    hidden, weight = leaves(student.hidden, student.weight)
    options = {"kind": kind, "alpha": alpha, "temperature": 1.3, "clip": 0.2, "clip_level": "entry"}
    found = linear_divergence(hidden, weight, teacher.hidden, teacher.weight, **options)
    expected = full_divergence(hidden @ weight.t(), logits_of(teacher), **options)
    assert_same([found], [expected])
    assert_same(weighted_gradients(found, [hidden, weight]), weighted_gradients(expected, [hidden, weight]))


@each_kind
def test_rows_of_weight_zero_count_for_nothing_even_where_they_are_broken(small_blocks, kind, alpha):
    student, teacher = sides(18, rows=8)
    weights = torch.tensor([0.5, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.25], dtype=torch.float64)
    zero = weights == 0
    hidden, weight = leaves(student.hidden.masked_fill(zero.unsqueeze(-1), math.nan), student.weight)
    other = teacher.hidden.masked_fill(zero.unsqueeze(-1), math.nan)
    found = linear_divergence(hidden, weight, other, teacher.weight, kind=kind, alpha=alpha, weights_N=weights)
    whole_hidden, whole_weight = leaves(student.hidden, student.weight)
    values = textbook(whole_hidden @ whole_weight.t(), logits_of(teacher), kind, alpha)
    expected = (values * weights).sum()
    assert_same([found], [expected])
    gradients = torch.autograd.grad(found, [hidden, weight])
    assert_same(gradients, torch.autograd.grad(expected, [whole_hidden, whole_weight]))
    assert torch.equal(gradients[0][zero], torch.zeros(4, 3, dtype=torch.float64))


def test_weight_one_equals_no_weight_and_all_zero_weights_give_exactly_zero():
    student, teacher = sides(19)
    hidden, weight = leaves(student.hidden, student.weight)
    arguments = (hidden, weight, teacher.hidden, teacher.weight)
    every = linear_divergence(*arguments, kind="jsd", weights_N=torch.ones(4, dtype=torch.float64))
    summed = linear_divergence(*arguments, kind="jsd").sum()
    assert_same([every], [summed])
    assert_same(torch.autograd.grad(every, [hidden, weight]), torch.autograd.grad(summed, [hidden, weight]))
    none = linear_divergence(*arguments, kind="jsd", weights_N=torch.zeros(4))
    assert none.item() == 0.0
    for gradient in torch.autograd.grad(none, [hidden, weight]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("wide", ["student_hidden", "student_head", "teacher_hidden", "teacher_head"])
def test_one_float64_input_makes_the_result_float64(wide):
    student, teacher = sides(20)
    names = ["student_hidden", "student_head", "teacher_hidden", "teacher_head"]
    tensors = [student.hidden, student.weight, teacher.hidden, teacher.weight]
    arguments = [t if name == wide else t.float() for name, t in zip(names, tensors, strict=True)]
    assert linear_divergence(*arguments, kind="jsd").dtype == torch.float64


HIDDEN, HEAD = torch.zeros(4, 3), torch.zeros(7, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((HIDDEN, HEAD[:, :2], HIDDEN, HEAD), {}, r"student hidden states \[4, 3\] and head \[7, 2\]"),
        ((HIDDEN, HEAD, HIDDEN, HEAD[:, :2]), {}, r"teacher hidden states \[4, 3\] and head \[7, 2\]"),
        ((HIDDEN[0], HEAD, HIDDEN, HEAD), {}, r"student hidden states \[3\] and head \[7, 3\]"),
        ((HIDDEN[:2], HEAD, HIDDEN, HEAD), {}, "student 2 positions over 7 tokens, teacher 4 over 7"),
        ((HIDDEN, HEAD[:5], HIDDEN, HEAD), {}, "student 4 positions over 5 tokens, teacher 4 over 7"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"weights_N": torch.ones(3)}, r"weights_N \[3\] must be \[4\]"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"weights_N": torch.ones(4, 1)}, r"weights_N \[4, 1\] must be \[4\]"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"kind": "kl"}, "allowed"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"alpha": 2.0}, "alpha"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"temperature": 0.0}, "temperature"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"clip": -1.0}, "clip"),
        ((HIDDEN.long(), HEAD, HIDDEN, HEAD), {}, "student_hidden must be floating"),
        ((HIDDEN, HEAD, HIDDEN, HEAD.long()), {}, "teacher_head must be floating"),
    ],
)
def test_linear_divergence_refuses_bad_input_and_names_the_shapes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(*arguments, **{"kind": "jsd", **options})


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 2), (2, 0)])
def test_functions_on_logits_take_any_number_of_leading_dimensions(leading):
    student, teacher = torch.randn(*leading, 7), torch.randn(*leading, 7)
    ids = torch.arange(3).expand(*leading, 3)
    log_t = torch.log_softmax(teacher, -1)[..., :3]
    assert full_divergence(student, teacher, kind="jsd").shape == leading
    assert topk_divergence(student, log_t, ids, kind="jsd").shape == leading


# -------------------------------------------------------------------------------------------------------------- memory


def tensors_within(thing):
    """Tensors a dataclass holds, at any depth."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if dataclasses.is_dataclass(thing):
        return [t for field in dataclasses.fields(thing) for t in tensors_within(getattr(thing, field.name))]
    if isinstance(thing, list | tuple):
        return [t for item in thing for t in tensors_within(item)]
    return []


def task_nodes(node):
    """Our own functions in a graph."""
    if node is None:
        return []
    found = [node] if hasattr(node, "task") else []
    return found + [one for following, _ in node.next_functions for one in task_nodes(following)]


def kept_bytes(function, *inputs):
    """Bytes autograd keeps until the backward pass, besides the storages of the inputs."""
    alive = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        result = function()
    (node,) = task_nodes(result.grad_fn)
    assert alive  # graphs of single chunks, made and dropped on the way, are not among them
    kept = [saved.tensor for saved in alive] + tensors_within(node.task)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


WIDE, WIDE_ROWS, WIDE_TOPK = 151_936, 16, 100


def wide_inputs():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(WIDE_ROWS, WIDE, generator=generator).to(torch.bfloat16) for _ in range(2))
    return student.requires_grad_(), teacher


def test_top_k_keeps_less_than_a_hundredth_of_the_logits():
    student, teacher = wide_inputs()
    ids = student.detach().topk(WIDE_TOPK, dim=-1).indices
    log_t = torch.log_softmax(teacher.float(), -1).gather(-1, ids)
    kept = kept_bytes(lambda: topk_divergence(student, log_t, ids, kind="jsd"), student)
    assert 0 < kept <= 0.01 * student.nbytes
    # Without what the caller holds as well: one int32 id and one float32 slope per entry of the support.
    kept = kept_bytes(lambda: topk_divergence(student, log_t, ids, kind="jsd"), student, ids, log_t)
    assert kept == 8 * WIDE_TOPK * WIDE_ROWS


@pytest.mark.parametrize("kind", ["forward_kl", "akl"])
def test_full_support_keeps_nothing_beyond_its_two_inputs(kind):
    student, teacher = (logits[:4] for logits in wide_inputs())
    (student,) = leaves(student)

    def function():
        return token_losses(student, measure=Measure(kind), teacher=Logits(teacher)).divergence

    assert kept_bytes(function, student, teacher) == 0


@pytest.mark.parametrize("support", ["full", "student_topk"])
def test_hidden_form_keeps_hidden_states_and_heads_and_the_support_alone(support):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = leaves(torch.randn(64, 8, generator=generator), torch.randn(5000, 8, generator=generator))
    teacher = Head(torch.randn(64, 8, generator=generator), torch.randn(5000, 8, generator=generator))

    def function():
        return token_losses(hidden, weight, measure=measure_of("jsd", 0.5, support), teacher=teacher).divergence

    kept = kept_bytes(function, hidden, weight, teacher.hidden, teacher.weight)
    assert kept == (0 if support == "full" else 8 * TOPK * 64)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("after_backward", [False, True])
def test_inputs_are_released_with_the_last_output(entropy, after_backward):
    student, teacher = torch.randn(4, 50), torch.randn(4, 50)
    (student,) = leaves(student)
    source = student * 1.0
    values = token_losses(source, measure=Measure("jsd"), teacher=Logits(teacher), entropy=entropy)
    if after_backward:
        (values.divergence.sum() + (values.entropy.sum() if entropy else 0.0)).backward()
    references = weakref.ref(source), weakref.ref(teacher)
    gc.collect()
    gc.disable()
    try:
        del source, teacher, values
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
        gc.collect()


# ------------------------------------------------------------------------------------------------------------- reading


def assert_reads(reading, logits, tokens, ids, temperature):
    log_p = torch.log_softmax(logits / temperature, -1)
    torch.testing.assert_close(reading.log_probs, log_p.gather(-1, ids))
    torch.testing.assert_close(reading.token_log_probs, log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(reading.entropy, -(log_p.exp() * log_p).sum(-1))
    assert not any(value.requires_grad for value in reading)


@each_temperature
@pytest.mark.parametrize("from_hidden", [True, False])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("row_chunk", [None, 2])
def test_reading_gathers_from_the_log_softmax(monkeypatch, temperature, from_hidden, listed, row_chunk):
    monkeypatch.setitem(chunks.HEAD_ROWS, "cpu", 256 if row_chunk is None else 3)
    side, _ = sides(21, rows=8)
    positions = torch.tensor([6, 0, 3, 7, 1]) if listed else None
    logits = logits_of(side)[positions] if listed else logits_of(side)
    tokens = torch.arange(len(logits)) % 7
    hidden, weight = leaves(side.hidden, side.weight)
    if listed:
        with torch.no_grad():
            hidden[2], hidden[4] = math.nan, math.inf
    source = Head(hidden, weight) if from_hidden else Logits(hidden @ weight.t())
    options = {"positions": positions, "tokens": tokens, "entropy": True, "row_chunk": row_chunk}
    options["temperature"] = temperature
    top = read(source, topk=3, **options)
    assert top.ids.dtype == torch.int32 and top.log_probs.dtype == torch.float64
    assert torch.equal(top.ids.long(), logits.sort(dim=-1, descending=True).indices[:, :3])
    assert_reads(top, logits, tokens, top.ids.long(), temperature)
    for dtype in (torch.int32, torch.int64):
        ids = support_ids(logits, logits, "given").to(dtype)
        chosen = read(source, ids=ids, **options)
        assert torch.equal(chosen.ids, ids)
        assert_reads(chosen, logits, tokens, ids.long(), temperature)


def test_reading_gives_only_what_was_asked_for():
    side, _ = sides(22)
    reading = read(Logits(logits_of(side)), entropy=True)
    assert reading.ids is None and reading.log_probs is None and reading.token_log_probs is None
    everything = read(side, topk=50)
    assert everything.ids.shape == (4, 7) and everything.entropy is None
    torch.testing.assert_close(everything.log_probs.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    assert read(side, topk=2, positions=torch.tensor([], dtype=torch.int64)).log_probs.shape == (0, 2)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_reading_does_not_depend_on_chunks(seed, rows, row_chunk, block):
    side, _ = sides(seed, rows=rows)
    options = {"topk": 3, "tokens": torch.arange(rows) % 7, "entropy": True}
    whole = read(side, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.HEAD_ROWS, "cpu", block)
        pieces = read(side, row_chunk=row_chunk, **options)
    assert_same(pieces, whole, atol=1e-13)


def test_what_is_read_of_a_teacher_serves_as_its_support():
    student, teacher = sides(23)
    reading = read(teacher, topk=TOPK, temperature=1.3)
    found = token_losses(
        logits_of(student),
        measure=Measure("mixed", 0.3),
        teacher=OnSupport(reading.ids, reading.log_probs),
        temperature=1.3,
    ).divergence
    expected = textbook(logits_of(student), logits_of(teacher), "mixed", 0.3, "teacher_topk", True, 1.3)
    assert_same([found], [expected])


# ----------------------------------------------------------------------------------------------------------- precision


@each_kind
@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(kind, alpha, support, tail, dtype):
    student, teacher = (logits_of(side).to(dtype) for side in sides(24))

    def outcome(student, teacher):
        other = on_support(student.float(), teacher.float()) if support == "given" else Logits(teacher)
        (student,) = leaves(student)
        measure = measure_of(kind, alpha, support, tail)
        values = token_losses(student, measure=measure, teacher=other, tokens=torch.arange(4), entropy=True)
        return values, *torch.autograd.grad(sum(value.sum() for value in values[:3]), student)

    values, gradient = outcome(student, teacher)
    expected, wanted = outcome(student.float(), teacher.float())
    for found, other in zip(values[:3], expected[:3], strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, other)
    assert gradient.dtype == dtype and torch.equal(gradient, wanted.to(dtype))


def autocast_inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 32, generator=generator), torch.randn(50, 32, generator=generator) * 0.3


def test_hidden_states_under_autocast_are_multiplied_as_by_a_linear_layer():
    hidden, weight = autocast_inputs()
    tokens = torch.arange(6)
    leaf, head = leaves(hidden, weight)
    dense_leaf, dense_head = leaves(hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = token_losses(leaf, head, tokens=tokens, entropy=True)
        logits = torch.nn.functional.linear(dense_leaf, dense_head)
        reading = read(Head(hidden, weight), tokens=tokens)
    assert logits.dtype == torch.bfloat16 and values.log_prob.dtype == torch.float32
    expected = torch.log_softmax(logits.float(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(values.log_prob, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(reading.token_log_probs, expected, rtol=0, atol=1e-5)
    exact = token_losses(hidden, weight, tokens=tokens).log_prob
    assert (exact - expected).abs().max() > 1e-4
    found = torch.autograd.grad(values.log_prob.sum(), [leaf, head])
    wanted = torch.autograd.grad(expected.sum(), [dense_leaf, dense_head])
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("support", ["full", "student_topk"])
def test_teacher_equal_to_the_student_has_no_divergence_under_autocast(support):
    hidden, weight = autocast_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = token_losses(hidden, weight, measure=measure_of("jsd", 0.5, support), teacher=Head(hidden, weight))
    assert values.divergence.abs().max() < 1e-6


def test_autocast_leaves_logits_that_exist_as_they_are():
    student, teacher = (logits_of(side) for side in sides(25))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = full_divergence(student, teacher, kind="jsd")
    assert_same([found], [full_divergence(student, teacher, kind="jsd")])


def test_backward_outside_autocast_repeats_the_product_of_the_forward_pass():
    hidden, weight = (tensor.bfloat16() for tensor in autocast_inputs())
    leaf, head = leaves(hidden.float(), weight.float())
    half_leaf, half_head = leaves(hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = token_losses(leaf, head, entropy=True)
    gradients = torch.autograd.grad(values.entropy.sum(), [leaf, head])
    half = torch.autograd.grad(token_losses(half_leaf, half_head, entropy=True).entropy.sum(), [half_leaf, half_head])
    for one, other in zip(gradients, half, strict=True):
        assert torch.equal(one.to(torch.bfloat16), other)


# ------------------------------------------------------------------------------------------------------ kinds of others


@pytest.fixture
def squared_hellinger():
    """A kind without in-place forms: sum (sqrt s - sqrt t)^2."""
    name = "squared_hellinger_for_a_test"

    @register_divergence(name)
    def _entries(log_s, log_t, alpha):
        return ((log_s / 2).exp() - (log_t / 2).exp()).square()

    yield name
    del DIVERGENCES[name]


@each_form
def test_a_registered_kind_needs_no_in_place_forms(small_blocks, squared_hellinger, support, tail):
    student, teacher = sides(26)
    hidden, weight = leaves(student.hidden, student.weight)
    other = on_support(logits_of(student), logits_of(teacher)) if support == "given" else teacher

    def loss(hidden, weight):
        measure = measure_of(squared_hellinger, 0.5, support, tail)
        return token_losses(hidden, weight, measure=measure, teacher=other, row_chunk=2).divergence

    ids = support_ids(logits_of(student), logits_of(teacher), support)
    s, t = torch.softmax(hidden @ weight.t(), -1), torch.softmax(logits_of(teacher), -1)
    if ids is not None:
        s, t = restricted(s, ids, tail), restricted(t, ids, tail)
    expected = (s.sqrt() - t.sqrt()).square().sum(-1)
    found = loss(hidden, weight)
    assert_same([found], [expected])
    assert_same(weighted_gradients(found, [hidden, weight]), weighted_gradients(expected, [hidden, weight]))
    assert torch.autograd.gradcheck(loss, (hidden, weight), fast_mode=True)
