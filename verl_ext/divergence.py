"""Token divergences between a student and a teacher, on the full vocabulary or on a reduced support.

The kinds and their conventions are in :mod:`verl_ext.divergence_kinds`; how they are computed without keeping a second
tensor as wide as the vocabulary is in :mod:`verl_ext.token_losses`. These are the pure functions on tensors, on any
device; the trainer's passes use the same machinery.

Returned values are per position and not reduced. Positions that do not count must be removed with ``torch.where``, not
by a zero weight (0 * inf is NaN); gradients stay finite, so that is safe.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verl_ext.chunks import Head, Logits, OnSupport
from verl_ext.divergence_kinds import DIVERGENCES, log_tail_mass, register_divergence
from verl_ext.token_losses import Measure, token_losses

__all__ = [
    "DIVERGENCES",
    "full_divergence",
    "linear_divergence",
    "log_tail_mass",
    "register_divergence",
    "sampled_token_loss",
    "student_topk",
    "support_log_probs",
    "topk_divergence",
]


def topk_divergence(
    student_logits_NV: Tensor,
    teacher_log_probs_NK: Tensor,
    support_ids_NK: Tensor,
    *,
    kind: str,
    alpha: float = 0.5,
    tail: bool = True,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_level: str = "entry",
) -> Tensor:
    """Divergence on K token ids per position (SDPO, arXiv 2601.20802: student top-K plus tail).

    With ``tail`` each side gets one more outcome, the probability outside the support. For KL and JSD that is a
    coarse-graining: never more than the full divergence, and equal to it at K = V, up to the 1e-7 floor of the tail.
    Without ``tail`` both sides are renormalised over the support, which has no order relation to the full value.

    Args:
        student_logits_NV: [N, V] logits; N may be several leading dimensions.
        teacher_log_probs_NK: [N, K] teacher log-probabilities of the support, normalised over the full vocabulary and
            already at ``temperature``.
        support_ids_NK: [N, K] token ids, distinct within a position.
        kind: a key of ``DIVERGENCES``.
        alpha: weight of the teacher in M (``jsd``) or of the forward KL (``mixed``).
        tail: append the tail bucket, or renormalise.
        temperature: divides the student logits only. Pass 1 where they already are divided.
        clip: upper limit of every entry (``clip_level="entry"``, OPSD) or of the position (``"token"``).

    Returns:
        [N] divergence; float64 if any input is, else float32. Autograd keeps the logits and 8 K bytes a position.

    Raises:
        ValueError: for an unknown kind, alpha outside [0, 1], a temperature or clip that is not positive, shapes that
            do not match, ids that are not integers or lie outside the vocabulary.
    """
    if teacher_log_probs_NK.shape != support_ids_NK.shape:
        raise ValueError(
            f"teacher_log_probs_NK {list(teacher_log_probs_NK.shape)} and support_ids_NK "
            f"{list(support_ids_NK.shape)} must have the same shape"
        )
    measure = Measure(kind, alpha, tail=tail, clip=clip, clip_level=clip_level)
    _check_ids(student_logits_NV, support_ids_NK)
    _check_temperature(temperature)
    _check_floating(student_logits_NV, "student_logits_NV")
    _check_floating(teacher_log_probs_NK, "teacher_log_probs_NK")
    width, vocabulary = support_ids_NK.shape[-1], student_logits_NV.shape[-1]
    values = token_losses(
        student_logits_NV.reshape(-1, vocabulary),
        measure=measure,
        teacher=OnSupport(support_ids_NK.reshape(-1, width), teacher_log_probs_NK.detach().reshape(-1, width)),
        temperature=temperature,
    )
    return values.divergence.view(student_logits_NV.shape[:-1])


def full_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    kind: str,
    alpha: float = 0.5,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_level: str = "entry",
) -> Tensor:
    """Divergence over the whole vocabulary.

    Args:
        student_logits_NV: [N, V] logits; N may be several leading dimensions.
        teacher_logits_NV: [N, V] logits over the same vocabulary. An entry may be -inf; if it is on both sides it
            simply does not exist.
        kind: a key of ``DIVERGENCES``.
        alpha: weight of the teacher in M (``jsd``) or of the forward KL (``mixed``).
        temperature: divides both logits.
        clip: upper limit of every entry (``clip_level="entry"``, OPSD) or of the position (``"token"``).

    Returns:
        [N] divergence; float64 if any input is, else float32. Autograd keeps both logits and nothing else.

    Raises:
        ValueError: for an unknown kind, alpha outside [0, 1], a temperature or clip that is not positive, differing
            shapes.
    """
    measure = Measure(kind, alpha, clip=clip, clip_level=clip_level)
    if student_logits_NV.shape != teacher_logits_NV.shape or student_logits_NV.dim() == 0:
        raise ValueError(
            f"student_logits_NV {list(student_logits_NV.shape)} and teacher_logits_NV "
            f"{list(teacher_logits_NV.shape)} must have the same shape [N, V]"
        )
    _check_temperature(temperature)
    _check_floating(student_logits_NV, "student_logits_NV")
    _check_floating(teacher_logits_NV, "teacher_logits_NV")
    vocabulary = student_logits_NV.shape[-1]
    values = token_losses(
        student_logits_NV.reshape(-1, vocabulary),
        measure=measure,
        teacher=Logits(teacher_logits_NV.detach().reshape(-1, vocabulary)),
        temperature=temperature,
    )
    return values.divergence.view(student_logits_NV.shape[:-1])


def linear_divergence(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    *,
    kind: str,
    alpha: float = 0.5,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
    clip: float | None = None,
    clip_level: str = "entry",
) -> Tensor:
    """Divergence over the whole vocabulary from hidden states and the two heads, without [N, V] logits.

    Logits exist for a block of rows at a time, forward and backward; autograd keeps the hidden states.

    Args:
        student_hidden_ND, student_head_VD: student, both with gradient.
        teacher_hidden_NE, teacher_head_VE: teacher over the same vocabulary; its width may differ.
        kind: a key of ``DIVERGENCES``.
        alpha: weight of the teacher in M (``jsd``) or of the forward KL (``mixed``).
        temperature: divides both logits.
        weights_N: [N] factors; rows of weight 0 are not read.
        clip: upper limit of every entry (``clip_level="entry"``, OPSD) or of the position (``"token"``).

    Returns:
        [N] divergence, or the weighted sum (a scalar) where ``weights_N`` is given; float64 if any input is, else
        float32.

    Raises:
        ValueError: for an unknown kind, alpha outside [0, 1], a temperature or clip that is not positive, shapes or
            vocabularies that do not match.
    """
    measure = Measure(kind, alpha, clip=clip, clip_level=clip_level)
    _check_temperature(temperature)
    for name, hidden, head in (
        ("student", student_hidden_ND, student_head_VD),
        ("teacher", teacher_hidden_NE, teacher_head_VE),
    ):
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"{name} hidden states {list(hidden.shape)} and head {list(head.shape)} must be [N, D] and [V, D]"
            )
        _check_floating(hidden, f"{name}_hidden")
        _check_floating(head, f"{name}_head")
    if len(student_hidden_ND) != len(teacher_hidden_NE) or len(student_head_VD) != len(teacher_head_VE):
        raise ValueError(
            f"student {len(student_hidden_ND)} positions over {len(student_head_VD)} tokens, teacher "
            f"{len(teacher_hidden_NE)} over {len(teacher_head_VE)}: both must agree"
        )
    positions = None
    if weights_N is not None:
        if weights_N.shape != student_hidden_ND.shape[:1]:
            raise ValueError(f"weights_N {list(weights_N.shape)} must be [{len(student_hidden_ND)}]")
        positions = torch.nonzero(weights_N).flatten()
        teacher_hidden_NE = teacher_hidden_NE[positions]
    values = token_losses(
        student_hidden_ND,
        student_head_VD,
        measure=measure,
        teacher=Head(teacher_hidden_NE.detach(), teacher_head_VE.detach()),
        positions=positions,
        temperature=temperature,
    )
    if weights_N is None:
        return values.divergence
    return (values.divergence * weights_N[positions].detach().to(values.divergence.dtype)).sum()


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

    What :func:`topk_divergence` wants of a teacher whose logits are at hand. The plain, differentiable form; the passes
    use :func:`verl_ext.token_reading.read`.

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
    _check_ids(logits_NV, ids_NK)
    _check_temperature(temperature)
    scaled_NV = _raised(logits_NV, "logits")
    scaled_NV = scaled_NV if temperature == 1.0 else scaled_NV / temperature
    return scaled_NV.gather(-1, ids_NK.long()) - scaled_NV.logsumexp(-1, keepdim=True)


def _check_ids(logits_NV: Tensor, ids_NK: Tensor) -> None:
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


def _check_floating(values: Tensor, name: str) -> None:
    if not values.is_floating_point():
        raise ValueError(f"{name} must be floating point, found {values.dtype}")


def _raised(values: Tensor, name: str) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    _check_floating(values, name)
    return values if values.dtype in (torch.float32, torch.float64) else values.to(torch.float32)


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")
