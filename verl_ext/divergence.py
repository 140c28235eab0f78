"""Token divergences between a student and a teacher, on the full vocabulary or on a reduced support.

Directions: ``forward_kl`` is KL(teacher || student), ``reverse_kl`` is KL(student || teacher), ``jsd`` is the
generalised Jensen-Shannon divergence with M = (1 - alpha) student + alpha teacher,
D = (1 - alpha) KL(student || M) + alpha KL(teacher || M), the convention of SDPO (arXiv 2601.20802).

The gradient reaches the student only, for ``jsd`` through M as well (where its parts cancel as long as both sides sum
to 1). At alpha = 1/2 it is that of the implicit token advantage 1/2 log(M / student) (SC-SDPO, arXiv 2605.27765, eq.
20-21).

Everything here works on log-probabilities of *outcomes*: vocabulary entries, or the entries of a support plus one tail
bucket. A new kind is one function of two such tensors, see :func:`register_divergence`.

Returned values are per position and not reduced. Positions that do not count must be removed with ``torch.where``, not
by a zero weight (0 * inf is NaN); gradients stay finite, so that is safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

# log_student_NC, log_teacher_NC (detached), alpha -> loss_N; C outcomes in the last dimension.
DivergenceFn = Callable[[Tensor, Tensor, float], Tensor]

DIVERGENCES: Final[dict[str, DivergenceFn]] = {}

# Largest log mass a support may have. It leaves the tail at least 1e-7 (log tail >= -16.118096), which keeps log(tail)
# and its gradient finite in float32 once the mass on the support rounds to 1. The value is SDPO's.
MAX_LOG_MASS: Final[float] = -1e-7


def register_divergence(name: str) -> Callable[[DivergenceFn], DivergenceFn]:
    """Add a kind. The function gets log-probabilities of C outcomes (last dimension) and ``alpha``; returns [N]."""

    def decorator(function: DivergenceFn) -> DivergenceFn:
        DIVERGENCES[name] = function
        return function

    return decorator


def topk_divergence(
    student_logits_NV: Tensor,
    teacher_log_probs_NK: Tensor,
    support_ids_NK: Tensor,
    *,
    kind: str,
    alpha: float = 0.5,
    tail: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence on K token ids per position (SDPO, arXiv 2601.20802: student top-K plus tail).

    With ``tail`` each side gets one more outcome, the probability outside the support. That is a coarse-graining: never
    more than the full divergence, and equal to it at K = V, up to the 1e-7 floor of the tail. Without ``tail`` both
    sides are renormalised over the support, which has no order relation to the full value.

    Args:
        student_logits_NV: [N, V] logits; N may be several leading dimensions. No [N, V] log-softmax is formed.
        teacher_log_probs_NK: [N, K] teacher log-probabilities of the support, normalised over the full vocabulary and
            already at ``temperature``.
        support_ids_NK: [N, K] token ids, distinct within a position.
        kind: a key of ``DIVERGENCES``.
        alpha: weight of the teacher in M; only used by ``jsd``.
        tail: append the tail bucket, or renormalise.
        temperature: divides the student logits only. Pass 1 where they already are divided.

    Returns:
        [N] divergence; float64 if any input is, else float32.

    Raises:
        ValueError: for an unknown kind, alpha outside [0, 1], a temperature that is not positive, shapes that do not
            match, ids that are not integers or lie outside the vocabulary.
    """
    divergence = _divergence(kind, alpha)
    if teacher_log_probs_NK.shape != support_ids_NK.shape:
        raise ValueError(
            f"teacher_log_probs_NK {list(teacher_log_probs_NK.shape)} and support_ids_NK "
            f"{list(support_ids_NK.shape)} must have the same shape"
        )
    log_student_NK = support_log_probs(student_logits_NV, support_ids_NK, temperature=temperature)
    log_teacher_NK = _raised(teacher_log_probs_NK, "teacher_log_probs_NK").detach()
    close = _with_tail if tail else _renormalized
    return divergence(*_same_dtype(close(log_student_NK), close(log_teacher_NK)), alpha)


def full_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    kind: str,
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence over the whole vocabulary.

    Args:
        student_logits_NV: [N, V] logits; N may be several leading dimensions.
        teacher_logits_NV: [N, V] logits over the same vocabulary. An entry may be -inf; if it is on both sides it
            simply does not exist.
        kind: a key of ``DIVERGENCES``.
        alpha: weight of the teacher in M; only used by ``jsd``.
        temperature: divides both logits.

    Returns:
        [N] divergence; float64 if any input is, else float32.

    Raises:
        ValueError: for an unknown kind, alpha outside [0, 1], a temperature that is not positive, differing shapes.
    """
    divergence = _divergence(kind, alpha)
    if student_logits_NV.shape != teacher_logits_NV.shape or student_logits_NV.dim() == 0:
        raise ValueError(
            f"student_logits_NV {list(student_logits_NV.shape)} and teacher_logits_NV "
            f"{list(teacher_logits_NV.shape)} must have the same shape [N, V]"
        )
    student_NV = _scaled(_raised(student_logits_NV, "student_logits_NV"), temperature)
    teacher_NV = _scaled(_raised(teacher_logits_NV.detach(), "teacher_logits_NV"), temperature)
    return divergence(*_same_dtype(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)), alpha)


def sampled_token_loss(student_log_probs_N: Tensor, teacher_log_probs_N: Tensor) -> Tensor:
    """REINFORCE form of the reverse KL at the sampled token, stopgrad(log s - log t) * log s (SDPO's token mode).

    Its gradient, averaged over tokens drawn from the student, is that of the reverse KL; its value is not a KL.

    Args:
        student_log_probs_N: [N] log-probabilities of the sampled tokens, with gradient.
        teacher_log_probs_N: [N] log-probabilities of the same tokens.
    """
    if student_log_probs_N.shape != teacher_log_probs_N.shape:
        raise ValueError(
            f"student {list(student_log_probs_N.shape)} and teacher {list(teacher_log_probs_N.shape)} must match"
        )
    student_N = _raised(student_log_probs_N, "student_log_probs_N")
    teacher_N = _raised(teacher_log_probs_N, "teacher_log_probs_N").detach()
    return (student_N.detach() - teacher_N) * student_N


@torch.no_grad()
def student_topk(logits_NV: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Ids of the k most likely tokens: [N, V] -> [N, k] int64, most likely first.

    Raises:
        ValueError: if k is not between 1 and V, or the temperature (which does not change the order) is not positive.
    """
    _check_temperature(temperature)
    vocabulary = logits_NV.shape[-1] if logits_NV.dim() else 0
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocabulary:
        raise ValueError(f"k must be an integer between 1 and the vocabulary size {vocabulary}, found {k!r}")
    return logits_NV.topk(k, dim=-1).indices


def support_log_probs(logits_NV: Tensor, ids_NK: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of chosen ids, normalised over the whole vocabulary: log p = logit - logsumexp(logits).

    Only the [N, K] entries are formed; autograd keeps the logits, not a log-softmax of them.

    Args:
        logits_NV: [N, V] logits; N may be several leading dimensions.
        ids_NK: [N, K] integer ids.
        temperature: divides the logits.

    Returns:
        [N, K] log-probabilities, float32 or float64.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not match, ids that are not integers or lie
            outside the vocabulary.
    """
    if logits_NV.dim() == 0 or logits_NV.shape[:-1] != ids_NK.shape[:-1] or logits_NV.dim() != ids_NK.dim():
        raise ValueError(f"logits {list(logits_NV.shape)} and ids {list(ids_NK.shape)} must be [N, V] and [N, K]")
    if ids_NK.is_floating_point() or ids_NK.is_complex() or ids_NK.dtype == torch.bool:
        raise ValueError(f"ids must be integers, found {ids_NK.dtype}")
    if ids_NK.shape[-1] == 0:
        raise ValueError("the support is empty (K = 0)")
    vocabulary = logits_NV.shape[-1]
    if ids_NK.numel():
        lowest, highest = (int(bound) for bound in ids_NK.aminmax())
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(f"ids must lie in [0, {vocabulary}), found {lowest} to {highest}")
    scaled_NV = _scaled(_raised(logits_NV, "logits"), temperature)
    return scaled_NV.gather(-1, ids_NK.long()) - scaled_NV.logsumexp(-1, keepdim=True)


def log_tail_mass(log_probs_NK: Tensor) -> Tensor:
    """Log of the probability outside the support, at least log(1e-7): [N, K] -> [N]. For float32 or float64."""
    # expm1 keeps the digits that 1 - exp(...) would lose when little mass is left outside.
    return torch.log(-torch.expm1(_log_mass(log_probs_NK).clamp(max=MAX_LOG_MASS)))


def support_mass(log_probs_NK: Tensor) -> Tensor:
    """Probability on the support, a diagnostic of whether K is large enough: [N, K] -> [N], without gradient."""
    return _log_mass(_raised(log_probs_NK.detach(), "log_probs_NK")).exp()


@register_divergence("forward_kl")
def _forward_kl(log_student_NC: Tensor, log_teacher_NC: Tensor, alpha: float) -> Tensor:
    return _kl(log_teacher_NC, log_student_NC)


@register_divergence("reverse_kl")
def _reverse_kl(log_student_NC: Tensor, log_teacher_NC: Tensor, alpha: float) -> Tensor:
    return _kl(log_student_NC, log_teacher_NC)


@register_divergence("jsd")
def _jsd(log_student_NC: Tensor, log_teacher_NC: Tensor, alpha: float) -> Tensor:
    # The family itself vanishes at both ends; as in SDPO's code the end points stand for the full KLs.
    if alpha == 0.0:
        return _kl(log_teacher_NC, log_student_NC)
    if alpha == 1.0:
        return _kl(log_student_NC, log_teacher_NC)
    # Outcomes impossible on both sides are set aside: logaddexp(-inf, -inf) has a NaN gradient.
    absent_NC = log_student_NC.isneginf() & log_teacher_NC.isneginf()
    log_mixture_NC = torch.logaddexp(
        log_student_NC.masked_fill(absent_NC, 0.0) + math.log1p(-alpha),
        log_teacher_NC.masked_fill(absent_NC, 0.0) + math.log(alpha),
    )
    return (1.0 - alpha) * _kl(log_student_NC, log_mixture_NC) + alpha * _kl(log_teacher_NC, log_mixture_NC)


def _kl(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, with 0 log 0 = 0.

    Where p > 0 = q the value is +inf, as it should be, but the gradient is taken as if q were the smallest normal
    number: a step from it is finite and points the right way.
    """
    absent_NC = log_p_NC.isneginf()
    missing_NC = log_q_NC.isneginf()
    log_p_NC = log_p_NC.masked_fill(absent_NC, 0.0)
    log_q_NC = log_q_NC.masked_fill(missing_NC, math.log(torch.finfo(log_q_NC.dtype).tiny))
    loss_N = (log_p_NC.exp() * (log_p_NC - log_q_NC)).masked_fill(absent_NC, 0.0).sum(-1)
    infinite_N = (missing_NC & ~absent_NC).any(-1)
    return loss_N + torch.zeros_like(loss_N).masked_fill(infinite_N, math.inf)


def _with_tail(log_probs_NK: Tensor) -> Tensor:
    return torch.cat((log_probs_NK, log_tail_mass(log_probs_NK).unsqueeze(-1)), dim=-1)


def _renormalized(log_probs_NK: Tensor) -> Tensor:
    return log_probs_NK - _log_mass(log_probs_NK).unsqueeze(-1)


def _log_mass(log_probs_NK: Tensor) -> Tensor:
    # logsumexp of -inf only has a NaN gradient; a finite stand-in has the same value wherever there is any mass.
    return log_probs_NK.masked_fill(log_probs_NK.isneginf(), torch.finfo(log_probs_NK.dtype).min).logsumexp(-1)


def _divergence(kind: str, alpha: float) -> DivergenceFn:
    if kind not in DIVERGENCES:
        raise ValueError(f"kind {kind!r} is unknown; allowed: {', '.join(sorted(DIVERGENCES))}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], found {alpha}")
    return DIVERGENCES[kind]


def _raised(values: Tensor, name: str) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    if not values.is_floating_point():
        raise ValueError(f"{name} must be floating point, found {values.dtype}")
    return values if values.dtype in (torch.float32, torch.float64) else values.to(torch.float32)


def _same_dtype(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    _check_temperature(temperature)
    # Dividing by 1 would cost a copy of [N, V].
    return logits if temperature == 1.0 else logits / temperature


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")
