"""The kinds of divergence, entry by entry, and how a reduced support is closed to a distribution.

A kind maps the log-probabilities of C outcomes (vocabulary entries, or the entries of a support plus one tail bucket)
to C *entries* whose sum is the divergence of the position. Entries, not the sum, because OPSD (arXiv 2601.18734) clips
each of them.

``forward_kl`` is KL(teacher || student), ``reverse_kl`` is KL(student || teacher), ``jsd`` the generalised
Jensen-Shannon divergence with M = (1 - alpha) student + alpha teacher,
D = (1 - alpha) KL(student || M) + alpha KL(teacher || M) (SDPO, arXiv 2601.20802), ``mixed``
alpha forward + (1 - alpha) reverse, ``akl`` the adaptive KL of arXiv 2404.02657.

The gradient reaches the student only, for ``jsd`` through M as well (where its parts cancel as long as both sides sum
to 1). At alpha = 1/2 it is that of the implicit token advantage 1/2 log(M / student) (SC-SDPO, arXiv 2605.27765, eq.
20-21).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# log_student_NC, log_teacher_NC (detached), alpha -> entries_NC. Finite input; differentiable in the first argument.
Entries = Callable[[Tensor, Tensor, float], Tensor]
# The same, or its derivative by log_student_NC, without autograd: may overwrite its two arguments and three buffers
# of their shape, and returns one of the five.
InPlace = Callable[[Tensor, Tensor, float, Tensor, Tensor, Tensor], Tensor]

# Largest log mass a support may have. It leaves the tail at least 1e-7 (log tail >= -16.118096), which keeps log(tail)
# and its gradient finite in float32 once the mass on the support rounds to 1. The value is SDPO's.
MAX_LOG_MASS: Final[float] = -1e-7

# AKL's share of the teacher's probability that counts as its head.
AKL_HEAD: Final[float] = 0.5

CLIP_LEVELS: Final[tuple[str, ...]] = ("entry", "token")


@dataclass(frozen=True)
class Kind:
    """One divergence; the in-place pair is only there for speed on whole vocabularies."""

    entries: Entries
    entries_in_place: InPlace | None = None
    slope_in_place: InPlace | None = None


DIVERGENCES: Final[dict[str, Kind]] = {}


def register_divergence(
    name: str, *, entries_in_place: InPlace | None = None, slope_in_place: InPlace | None = None
) -> Callable[[Entries], Entries]:
    """Adds a kind: one function of the log-probabilities of C outcomes (last dimension) that returns C entries.

    ``slope_in_place`` is the derivative of each entry by the student's log-probability *of the same outcome*, without
    the normalisation; give both in-place forms or none.
    """

    def decorator(function: Entries) -> Entries:
        DIVERGENCES[name] = Kind(function, entries_in_place, slope_in_place)
        return function

    return decorator


def check_kind(kind: str, alpha: float) -> Kind:
    """The registered kind, or the user's own ``package.module:function`` (see :func:`register_divergence`).

    Raises ValueError for an unknown one or alpha outside [0, 1].
    """
    if kind not in DIVERGENCES and ":" in kind:
        module, _, function = kind.partition(":")
        register_divergence(kind)(getattr(importlib.import_module(module), function))
    if kind not in DIVERGENCES:
        raise ValueError(f"kind {kind!r} is unknown; allowed: {', '.join(sorted(DIVERGENCES))}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], found {alpha}")
    return DIVERGENCES[kind]


def check_clip(clip: float | None, clip_level: str) -> None:
    """Raises ValueError for a clip that is not positive or an unknown level."""
    if clip_level not in CLIP_LEVELS:
        raise ValueError(f"clip_level {clip_level!r} is unknown; allowed: {', '.join(CLIP_LEVELS)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, found {clip}")


def divergence_of(
    kind: Kind,
    log_student_NC: Tensor,
    log_teacher_NC: Tensor,
    alpha: float,
    *,
    clip: float | None = None,
    clip_level: str = "entry",
    slope: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Divergence [N] and its derivative [N, C] by the student's log-probabilities, for any input.

    0 log 0 = 0. Where the divergence is infinite (an outcome that only the left side of a KL has) the value is +inf,
    and the derivative is taken as if the missing probability were the smallest normal number: finite, and pointing the
    right way.
    """
    absent_s, absent_t = log_student_NC.isneginf(), log_teacher_NC.isneginf()
    neither = absent_s & absent_t

    def entries(log_student: Tensor, fill: float) -> Tensor:
        filled_s = log_student.masked_fill(absent_s, fill)
        return kind.entries(filled_s, log_teacher_NC.masked_fill(absent_t, fill), alpha).masked_fill(neither, 0.0)

    with torch.no_grad():
        # Far below any log-probability, but finite: 0 * log 0 stays 0, and a term that grows with the distance of the
        # stand-in is infinite.
        far = torch.finfo(log_student_NC.dtype).max / 4
        entries_NC = entries(log_student_NC, -far)
        entries_NC = entries_NC.masked_fill(entries_NC > entries(log_student_NC, -far / 2), math.inf)
        value_N = clipped_sum(entries_NC, clip, clip_level)
    if not slope:
        return value_N, None
    with torch.enable_grad():
        leaf = log_student_NC.detach().requires_grad_()
        total = clipped_sum(entries(leaf, math.log(torch.finfo(leaf.dtype).tiny)), clip, clip_level).sum()
        (slope_NC,) = torch.autograd.grad(total, leaf)
    return value_N, slope_NC


def clipped_sum(entries_NC: Tensor, clip: float | None, clip_level: str) -> Tensor:
    """Sum over the outcomes, with each entry or the sum limited to ``clip`` (OPSD's code limits the entries)."""
    if clip is None:
        return entries_NC.sum(-1)
    if clip_level == "entry":
        return entries_NC.clamp(max=clip).sum(-1)
    return entries_NC.sum(-1).clamp(max=clip)


# ------------------------------------------------------------------------------------------------------- the support


def with_tail(log_probs_NK: Tensor) -> Tensor:
    """Appends the log-probability outside the support: [N, K] -> [N, K + 1]."""
    return torch.cat((log_probs_NK, log_tail_mass(log_probs_NK).unsqueeze(-1)), dim=-1)


def renormalized(log_probs_NK: Tensor) -> Tensor:
    """Divides by the probability of the support."""
    return log_probs_NK - log_mass(log_probs_NK).unsqueeze(-1)


def log_mass(log_probs_NK: Tensor) -> Tensor:
    """Log of the probability on the support: [N, K] -> [N]."""
    # logsumexp of -inf only has a NaN gradient; a finite stand-in has the same value wherever there is any mass.
    return log_probs_NK.masked_fill(log_probs_NK.isneginf(), torch.finfo(log_probs_NK.dtype).min).logsumexp(-1)


def log_tail_mass(log_probs_NK: Tensor) -> Tensor:
    """Log of the probability outside the support, at least log(1e-7): [N, K] -> [N]. For float32 or float64."""
    # expm1 keeps the digits that 1 - exp(...) would lose when little mass is left outside.
    return torch.log(-torch.expm1(log_mass(log_probs_NK).clamp(max=MAX_LOG_MASS)))


# ------------------------------------------------------------------------------------------------------- the entries


def _forward_in_place(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    torch.exp(log_t, out=one)
    return one.mul_(log_t.sub_(log_s))


def _forward_slope(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    return log_t.exp_().neg_()


@register_divergence("forward_kl", entries_in_place=_forward_in_place, slope_in_place=_forward_slope)
def _forward_kl(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    return log_t.exp() * (log_t - log_s)


def _reverse_in_place(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    torch.exp(log_s, out=one)
    return one.mul_(log_s.sub_(log_t))


def _reverse_slope(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    torch.exp(log_s, out=one)
    return one.mul_(log_s.sub_(log_t).add_(1.0))


@register_divergence("reverse_kl", entries_in_place=_reverse_in_place, slope_in_place=_reverse_slope)
def _reverse_kl(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    return log_s.exp() * (log_s - log_t)


def _jsd_parts(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    """Leaves (1 - alpha) s and alpha t in two buffers; returns log M by one logarithm, cheaper than logaddexp."""
    torch.exp(log_s, out=one).mul_(1.0 - alpha)
    torch.exp(log_t, out=two).mul_(alpha)
    return torch.add(one, two, out=three).clamp_(min=torch.finfo(one.dtype).tiny).log_()


def _jsd_in_place(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    if alpha in (0.0, 1.0):
        return (_reverse_in_place if alpha else _forward_in_place)(log_s, log_t, alpha, one, two, three)
    log_m = _jsd_parts(log_s, log_t, alpha, one, two, three)
    return one.mul_(log_s.sub_(log_m)).add_(two.mul_(log_t.sub_(log_m)))


def _jsd_slope(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    if alpha in (0.0, 1.0):
        return (_reverse_slope if alpha else _forward_slope)(log_s, log_t, alpha, one, two, three)
    # What comes through M is (1 - alpha) s (1 - M / M) = 0 in every entry.
    log_m = _jsd_parts(log_s, log_t, alpha, one, two, three)
    return one.mul_(log_s.sub_(log_m))


@register_divergence("jsd", entries_in_place=_jsd_in_place, slope_in_place=_jsd_slope)
def _jsd(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    # The family itself vanishes at both ends; as in SDPO's code the end points stand for the full KLs.
    if alpha == 0.0:
        return _forward_kl(log_s, log_t, alpha)
    if alpha == 1.0:
        return _reverse_kl(log_s, log_t, alpha)
    log_m = torch.logaddexp(log_s + math.log1p(-alpha), log_t + math.log(alpha))
    return (1.0 - alpha) * log_s.exp() * (log_s - log_m) + alpha * log_t.exp() * (log_t - log_m)


def _mixed_in_place(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    torch.exp(log_s, out=one).mul_(1.0 - alpha)
    torch.exp(log_t, out=two).mul_(alpha)
    return one.sub_(two).mul_(log_s.sub_(log_t))


def _mixed_slope(log_s: Tensor, log_t: Tensor, alpha: float, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    torch.exp(log_s, out=one).mul_(1.0 - alpha)
    torch.exp(log_t, out=two).mul_(alpha)
    return one.mul_(log_s.sub_(log_t).add_(1.0)).sub_(two)


@register_divergence("mixed", entries_in_place=_mixed_in_place, slope_in_place=_mixed_slope)
def _mixed(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    return alpha * _forward_kl(log_s, log_t, alpha) + (1.0 - alpha) * _reverse_kl(log_s, log_t, alpha)


@register_divergence("akl")
def _akl(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    """g_h / (g_h + g_t) forward + g_t / (g_h + g_t) reverse; g: total |t - s| over the teacher's head and tail.

    The head is the teacher's most likely outcomes as long as their summed probability does not pass AKL_HEAD, and the
    first one always. At t = s the share is 0/0; both KLs are 0 there, so any share will do.
    """
    with torch.no_grad():
        teacher = log_t.exp()
        ordered, order = teacher.sort(dim=-1, descending=True, stable=True)
        in_head = ordered.cumsum(-1) <= AKL_HEAD
        in_head[..., 0] = True
        gap = (teacher - log_s.exp()).abs()
        head = (gap.gather(-1, order) * in_head).sum(-1, keepdim=True)
        total = gap.sum(-1, keepdim=True)
        share = torch.where(total > 0, head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    return share * _forward_kl(log_s, log_t, alpha) + (1.0 - share) * _reverse_kl(log_s, log_t, alpha)
