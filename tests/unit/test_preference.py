"""PBSD's loss in a tabular softmax: gradients, fixed points, the Jeffreys identity; oracles in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.preference import (
    PAIR_FILTERS,
    bradley_terry_labels,
    kept_pairs,
    margins,
    pair_coefficients,
    pair_loss,
    reweighted_target,
)

T = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LOG_PROBS = st.floats(-80, 0)
BETAS = st.sampled_from([0.01, 0.1, 0.5, 2.0])


def all_pairs(teacher: torch.Tensor, policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every (y+, y-) with its probability: y+ of the teacher, y- of the (detached) policy."""
    size = len(teacher)
    pos = torch.arange(size).repeat_interleave(size)
    neg = torch.arange(size).repeat(size)
    return pos, neg, teacher[pos] * policy.detach()[neg]


def expected(logits: torch.Tensor, teacher: torch.Tensor, beta: float, **options: torch.Tensor) -> torch.Tensor:
    """E[L] over all pairs, y- a detached sample."""
    log_pi, log_t = logits.log_softmax(-1), teacher.log()
    pos, neg, weight = all_pairs(teacher, log_pi.exp())
    loss = pair_loss(margins(log_pi[pos], log_pi[neg], log_t[pos], log_t[neg], beta=beta), **options)
    return (weight * loss).sum()


def fixed_point(teacher: torch.Tensor, beta: float, labels=None, keep=None, steps: int = 4000, rate: float = 1.0):
    """Where the detached coefficients lead: plain gradient descent on -sum coefficient * log pi."""
    logits = torch.zeros(len(teacher), dtype=torch.float64)
    for _ in range(steps):
        logits.requires_grad_(True)
        log_pi = logits.log_softmax(-1)
        pos, neg, weight = all_pairs(teacher, log_pi.exp())
        weight = weight if keep is None else weight * keep[pos]
        k_pos, k_neg = pair_coefficients(
            log_pi[pos], log_pi[neg], teacher.log()[pos], teacher.log()[neg], beta=beta,
            labels_P=None if labels is None else labels(pos, neg),
        )  # fmt: skip
        loss = -(weight * (k_pos * log_pi[pos] + k_neg * log_pi[neg])).sum() / beta**2
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - rate * gradient).detach()
    return logits.softmax(-1)


def test_the_example_of_the_specification() -> None:
    pos, neg, weight = all_pairs(T, PI)
    m = margins(PI.log()[pos], PI.log()[neg], T.log()[pos], T.log()[neg], beta=0.1)
    assert float((weight * m).sum()) == pytest.approx(-0.017716, abs=1e-6)
    assert float((weight * pair_loss(m)).sum()) == pytest.approx(0.702477, abs=1e-6)


@given(st.lists(st.floats(-4, 4), min_size=3, max_size=6), st.lists(st.floats(-4, 4), min_size=6, max_size=6), BETAS)
def test_the_mean_margin_is_minus_beta_times_jeffreys_and_the_loss_at_least_log_2(a, b, beta) -> None:
    policy = torch.tensor(a, dtype=torch.float64).softmax(-1)
    teacher = torch.tensor(b[: len(a)], dtype=torch.float64).softmax(-1)
    pos, neg, weight = all_pairs(teacher, policy)
    m = margins(policy.log()[pos], policy.log()[neg], teacher.log()[pos], teacher.log()[neg], beta=beta)
    jeffreys = ((teacher - policy) * (teacher.log() - policy.log())).sum()
    assert float((weight * m).sum()) == pytest.approx(-beta * float(jeffreys), abs=1e-9)
    assert float((weight * pair_loss(m)).sum()) >= math.log(2) - 1e-12


def test_source_labels_lead_to_the_teacher() -> None:
    assert torch.allclose(fixed_point(T, 0.5), T, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_bradley_terry_labels_lead_to_the_reward_reweighted_teacher(beta: float) -> None:
    reward = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    found = fixed_point(T, beta, labels=lambda pos, neg: bradley_terry_labels(reward[pos], reward[neg]))
    target = T * (reward / beta).exp()
    target = target / target.sum()
    assert torch.allclose(found, target, atol=1e-5)
    told = reweighted_target(
        reward[torch.multinomial(T, 200_000, True, generator=torch.Generator().manual_seed(0))], beta=beta
    )
    assert told["reward"] == pytest.approx(float((target * reward).sum()), abs=5e-3)
    assert told["objective"] == pytest.approx(float(beta * (T * (reward / beta).exp()).sum().log()), abs=5e-3)
    assert told["teacher"] <= told["objective"]


def test_right_teacher_samples_alone_drift_past_the_teacher() -> None:
    right = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    rates = [float((fixed_point(T, 0.5, keep=right, steps=steps) * right).sum()) for steps in (200, 1000, 4000)]
    assert float((T * right).sum()) < rates[0] < rates[1] < rates[2] and rates[2] > 0.97


@given(st.tuples(LOG_PROBS, LOG_PROBS, LOG_PROBS, LOG_PROBS), BETAS, st.one_of(st.none(), st.floats(0, 1)))
@settings(max_examples=60)
def test_the_coefficients_are_the_gradient_of_the_paired_loss(values, beta, label) -> None:
    pos, neg, teacher_pos, teacher_neg = (torch.tensor([value], dtype=torch.float64) for value in values)
    labels = None if label is None else torch.tensor([label], dtype=torch.float64)
    pos.requires_grad_(True)
    neg.requires_grad_(True)
    loss = pair_loss(margins(pos, neg, teacher_pos, teacher_neg, beta=beta), labels).sum()
    gradients = torch.autograd.grad(loss, (pos, neg))
    found = pair_coefficients(pos, neg, teacher_pos, teacher_neg, beta=beta, labels_P=labels)
    for gradient, coefficient in zip(gradients, found, strict=True):
        assert not coefficient.requires_grad
        assert float(gradient) == pytest.approx(-float(coefficient), rel=1e-9, abs=1e-12)


def test_the_gradient_equals_finite_differences() -> None:
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    log_pi = logits.log_softmax(-1)
    pos, neg = torch.tensor([0, 2]), torch.tensor([1, 0])
    k_pos, k_neg = pair_coefficients(log_pi[pos], log_pi[neg], T.log()[pos], T.log()[neg], beta=0.3)
    (found,) = torch.autograd.grad(-(k_pos * log_pi[pos] + k_neg * log_pi[neg]).sum(), logits)

    def loss(values: torch.Tensor) -> float:
        log_p = values.log_softmax(-1)
        return float(pair_loss(margins(log_p[pos], log_p[neg], T.log()[pos], T.log()[neg], beta=0.3)).sum())

    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 1e-6
        numeric = (loss(logits.detach() + step) - loss(logits.detach() - step)) / 2e-6
        assert float(found[i]) == pytest.approx(numeric, abs=1e-8)


def test_large_margins_keep_their_digits() -> None:
    zero = torch.zeros(2)
    k, _ = pair_coefficients(torch.tensor([60.0, -60.0]), zero, zero, zero, beta=1.0)
    assert float(k[0]) == pytest.approx(math.exp(-60), rel=1e-5) and float(k[1]) == pytest.approx(1.0)
    half = [column.half() for column in (torch.tensor([-900.0]), torch.tensor([-890.0]), zero[:1], zero[:1])]
    assert margins(*half, beta=0.1).dtype == torch.float32


def test_filters_keep_pairs_by_outcome() -> None:
    pos, neg = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0])
    kept = {name: kept_pairs(name, pos, neg).tolist() for name in PAIR_FILTERS}
    assert kept["none"] == kept["bt_reward"] == [True] * 4
    assert kept["correct_pos"] == [True, True, False, False]
    assert kept["correct_pos_wrong_neg"] == [False, True, False, False]


def test_bad_input_is_refused() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta is"):
            margins(one, one, one, one, beta=beta)
        with pytest.raises(ValueError, match="beta is"):
            reweighted_target(one, beta=beta)
    with pytest.raises(ValueError, match="shapes"):
        margins(one, two, one, one, beta=0.1)
    with pytest.raises(ValueError, match="allowed: from 0 to 1"):
        pair_loss(two, torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="2 labels|labels for"):
        pair_loss(one, two)
    with pytest.raises(ValueError, match="pair_filter is 'best'"):
        kept_pairs("best", one, one)
    with pytest.raises(ValueError, match="no reward"):
        reweighted_target(torch.zeros(0), beta=0.1)
