"""Gradient norms by pass rate, from the advantages, weights and divergences that training uses.

The policy is a softmax over seven answers, three of them right. How right answers share their probability, q⁺, and how
wrong ones do, q⁻, does not change with the pass rate p, so the expected gradient of every outcome method is a factor
of p (and of the group size G) times Δ = q⁺ - q⁻. Norms are given as multiples of |Δ| and have no unit.

Shapes: P pass rates, A answers, G rollouts of a question.
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from verl_ext.divergence import full_divergence
from verl_ext.weighting import question_weights

Estimator: TypeAlias = Literal["reinforce", "grpo_without_std", "grpo"]

RIGHT: Final = torch.tensor([0.5, 0.3, 0.2, 0, 0, 0, 0], dtype=torch.float64)
WRONG: Final = torch.tensor([0, 0, 0, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
SMOOTHING: Final = 0.02


def answer_probabilities(rates_P: Tensor) -> Tensor:
    """[P, A] p q⁺ + (1-p) q⁻ for [P] pass rates strictly between 0 and 1."""
    return rates_P[:, None] * RIGHT + (1 - rates_P[:, None]) * WRONG


def success_probabilities(rates_P: Tensor, size: int) -> Tensor:
    """[P, G + 1] probability of k = 0 … G successes among G independent rollouts."""
    k_K = torch.arange(size + 1, dtype=torch.float64)
    log_choices_K = math.lgamma(size + 1) - torch.lgamma(k_K + 1) - torch.lgamma(size - k_K + 1)
    return torch.exp(
        log_choices_K + torch.xlogy(k_K, rates_P[:, None]) + torch.special.xlog1py(size - k_K, -rates_P[:, None])
    )


def group_advantages(size: int, estimator: Estimator) -> Tensor:
    """[G + 1, G] advantages of the rows of a group with k = 0 … G successes, the right rows first.

    ``grpo`` and ``grpo_without_std`` are verl's estimator with and without division by the sample standard deviation,
    ``reinforce`` is the outcome itself, without a baseline.
    """
    outcomes_KG = (torch.arange(size) < torch.arange(size + 1)[:, None]).to(torch.float64)
    if estimator == "reinforce":
        return outcomes_KG
    rewards_N1 = outcomes_KG.reshape(-1, 1)
    groups_N = torch.arange(size + 1).repeat_interleave(size).numpy()
    advantages_N1, _ = compute_grpo_outcome_advantage(
        rewards_N1, torch.ones_like(rewards_N1), groups_N, norm_adv_by_std_in_grpo=estimator == "grpo"
    )
    return advantages_N1.view(size + 1, size)


def policy_gradient_norms(rates_P: Tensor, size: int, estimator: Estimator) -> Tensor:
    """[P] norm of the expected policy gradient of a question with G rollouts, E[(1/G) Σ A_i ∇ log π(y_i)], over |Δ|.

    As G grows: p(1-p) for ``reinforce`` and ``grpo_without_std``, √(p(1-p)) for ``grpo`` (SC-SDPO, arXiv 2605.27765,
    abstract). The expectation over groups is exact, a sum over the numbers of successes.
    """
    advantages_KG = group_advantages(size, estimator)
    right_KG = torch.arange(size) < torch.arange(size + 1)[:, None]
    chances_PK = success_probabilities(rates_P, size)
    right_P = chances_PK @ (advantages_KG * right_KG).sum(dim=1) / size
    wrong_P = chances_PK @ (advantages_KG * ~right_KG).sum(dim=1) / size
    logits_PA = answer_probabilities(rates_P).log().requires_grad_()
    # Given its outcome, an answer follows q⁺ or q⁻.
    objective = ((right_P[:, None] * RIGHT + wrong_P[:, None] * WRONG) * logits_PA.log_softmax(dim=-1)).sum()
    (gradients_PA,) = torch.autograd.grad(objective, logits_PA)
    return gradients_PA.norm(dim=1) / (RIGHT - WRONG).norm()


def distillation_norms(rates_P: Tensor, kind: str, *, exponent: float = 0.0) -> Tensor:
    """[P] norm of the gradient of a divergence to the teacher of successes, times [p(1-p)]^exponent, over |Δ|.

    The teacher is (1-ε) π(y | right) + ε π(y), ε = 0.02: the student's own distribution given success (the idea of
    SDPO, arXiv 2601.20802), smoothed so that the reverse KL exists. Exponent 1/2 is SC-SDPO's weight.

    Args:
        kind: of ``verl_ext.divergence_kinds``; ``jsd`` with equal weights.
    """
    probabilities_PA = answer_probabilities(rates_P)
    teacher_PA = (1 - SMOOTHING) * RIGHT + SMOOTHING * probabilities_PA
    logits_PA = probabilities_PA.log().requires_grad_()
    values_P = full_divergence(logits_PA, teacher_PA.log(), kind=kind)
    (gradients_PA,) = torch.autograd.grad(values_P.sum(), logits_PA)
    weights_P = question_weights(rates_P, alpha=exponent, beta=exponent, normalizer="none")
    return weights_P * gradients_PA.norm(dim=1) / (RIGHT - WRONG).norm()


def expected_weights(rates_P: Tensor, size: int, exponent: float) -> Tensor:
    """[P] E[(p̂(1-p̂))^exponent] over G rollouts, by the weights that training uses, without a normaliser.

    At exponent 1 it is (1 - 1/G) p(1-p), one factor for all questions; at 1/2 it is too low, most at the ends.
    """
    measured_K = torch.arange(size + 1, dtype=torch.float64) / size
    weights_K = question_weights(measured_K, alpha=exponent, beta=exponent, normalizer="none")
    return success_probabilities(rates_P, size) @ weights_K
