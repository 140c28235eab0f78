"""PBSD's preference loss between a sample of the privileged teacher and one of the student (arXiv 2605.05040, Eq. 10).

    m = beta [ log pi(y+|x) / T(y+|x, c)  -  log pi(y-|x) / T(y-|x, c) ],    L = -log sigma(m)

with y+ drawn from the teacher T and y- from the student pi. The gradient needs four numbers a pair, not both rows in
one forward: dL/dtheta = -k (grad log pi(y+) - grad log pi(y-)) with the detached coefficient k = beta (1 - sigma(m)),
so the rows of a pair may lie in different micro-batches and on different ranks.

A label l in [0, 1] says how much the pair prefers y+; the loss is then the cross entropy
-l log sigma(m) - (1 - l) log sigma(-m) and the coefficient beta (l - sigma(m)). l = 1 is the paper's loss, whose fixed
point is the teacher itself; the Bradley-Terry label sigma(r+ - r-) has the reward-reweighted teacher, pi* proportional
to T exp(r / beta), as its fixed point (derived here, checked in tests/unit/test_preference.py).

Sequence log-probabilities are sums over response tokens in nats, at the temperature that was sampled with.
Shape suffix: P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from verl_ext.config_axes import PAIR_FILTERS


def margins(
    policy_log_probs_pos: Tensor,
    policy_log_probs_neg: Tensor,
    teacher_log_probs_pos: Tensor,
    teacher_log_probs_neg: Tensor,
    *,
    beta: float,
) -> Tensor:
    """m [P]: beta times the gap of the two reference-corrected log-probabilities.

    Raises:
        ValueError: beta is not above 0, or the shapes differ.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta!r}; allowed: a number above 0")
    columns = (policy_log_probs_pos, policy_log_probs_neg, teacher_log_probs_pos, teacher_log_probs_neg)
    if len({column.shape for column in columns}) != 1:
        raise ValueError(f"the four columns of log-probabilities have shapes {[tuple(c.shape) for c in columns]}")
    pos, neg, teacher_pos, teacher_neg = (_raised(column) for column in columns)
    return beta * ((pos - teacher_pos) - (neg - teacher_neg))


def pair_loss(margins_P: Tensor, labels_P: Tensor | None = None) -> Tensor:
    """L [P]; without labels the paper's -log sigma(m). Raises ValueError for labels outside [0, 1]."""
    if labels_P is None:
        return -logsigmoid(margins_P)
    labels_P = _checked_labels(labels_P, margins_P)
    return -labels_P * logsigmoid(margins_P) - (1 - labels_P) * logsigmoid(-margins_P)


def pair_coefficients(
    policy_log_probs_pos: Tensor,
    policy_log_probs_neg: Tensor,
    teacher_log_probs_pos: Tensor,
    teacher_log_probs_neg: Tensor,
    *,
    beta: float,
    labels_P: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Detached coefficients (of y+, of y-), each [P]: the gradient of the loss is that of -sum coefficient * log pi.

    +beta (l - sigma(m)) and its negative; l = 1 without labels.

    Raises:
        ValueError: as :func:`margins` and :func:`pair_loss`.
    """
    m_P = margins(
        policy_log_probs_pos, policy_log_probs_neg, teacher_log_probs_pos, teacher_log_probs_neg, beta=beta
    ).detach()
    if labels_P is None:
        # 1 - sigma(m) without the loss of digits at large m.
        k_P = beta * torch.sigmoid(-m_P)
    else:
        k_P = beta * (_checked_labels(labels_P, m_P) - torch.sigmoid(m_P))
    return k_P, -k_P


def bradley_terry_labels(rewards_pos_P: Tensor, rewards_neg_P: Tensor) -> Tensor:
    """l [P] = sigma(r+ - r-), with rewards in the units of the objective E[r] - beta KL(pi || T)."""
    return torch.sigmoid(_raised(rewards_pos_P) - _raised(rewards_neg_P))


def kept_pairs(pair_filter: str, correct_pos_P: Tensor, correct_neg_P: Tensor) -> Tensor:
    """bool [P], the pairs that train. ``none`` and ``bt_reward`` keep all; the others are extensions of ours.

    ``correct_pos``: y+ is right. It has no finite optimum (the pass rate drifts to 1): beta and early stopping hold it.
    ``correct_pos_wrong_neg``: and y- is wrong.

    Raises:
        ValueError: an unknown filter.
    """
    if pair_filter not in PAIR_FILTERS:
        raise ValueError(f"pair_filter is {pair_filter!r}; allowed: {', '.join(PAIR_FILTERS)}")
    right, wrong = correct_pos_P.bool(), ~correct_neg_P.bool()
    if pair_filter == "correct_pos":
        return right
    if pair_filter == "correct_pos_wrong_neg":
        return right & wrong
    return torch.ones_like(right)


def reweighted_target(teacher_rewards_N: Tensor, *, beta: float) -> dict[str, float]:
    """What the optimum pi* of E[r] - beta KL(pi || T) would have, estimated from rewards of the teacher's samples.

    Returns:
        ``teacher``: E_T r, the teacher's objective; ``objective``: beta log E_T exp(r / beta), that of pi*, never lower
        (Jensen); ``reward``: E_pi* r.

    Raises:
        ValueError: beta is not above 0, or there is no reward.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta!r}; allowed: a number above 0")
    rewards_N = teacher_rewards_N.double()
    if not len(rewards_N):
        raise ValueError("no reward of a teacher's sample")
    scaled_N = rewards_N / beta
    weights_N = torch.softmax(scaled_N, dim=0)
    mean_log = torch.logsumexp(scaled_N, dim=0) - torch.log(torch.tensor(float(len(rewards_N)), dtype=torch.float64))
    return {
        "teacher": float(rewards_N.mean()),
        "objective": float(beta * mean_log),
        "reward": float((weights_N * rewards_N).sum()),
    }


def _checked_labels(labels_P: Tensor, margins_P: Tensor) -> Tensor:
    labels_P = _raised(labels_P).to(margins_P.dtype)
    if labels_P.shape != margins_P.shape:
        raise ValueError(f"{tuple(labels_P.shape)} labels for {tuple(margins_P.shape)} margins")
    if not bool(((labels_P >= 0) & (labels_P <= 1)).all()):
        raise ValueError(f"labels from {float(labels_P.min())} to {float(labels_P.max())}; allowed: from 0 to 1")
    return labels_P


def _raised(values: Tensor) -> Tensor:
    """Half precision has too few digits for sums over a response; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
