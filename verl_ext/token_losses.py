"""Losses and log-probabilities at the positions of a batch, in chunks, with a backward pass that recomputes.

One autograd function serves every kind, support and placement. Autograd keeps its inputs and, per position, at most the
support's ids and slopes (8 K bytes); no tensor as wide as the vocabulary survives a chunk, except the gradient by the
logits where the logits are the input. The student enters as logits, or as hidden states and head; the teacher as
logits, as hidden states and head, or as log-probabilities on ids it was asked for.

Shape suffixes: N rows of the input, M positions read, V vocabulary, D / E width of student / teacher, K support.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from verl_ext.chunks import Head, Logits, OnSupport, Rows, Teacher, Work, entropy_of, plain, product, product_dtype
from verl_ext.divergence_kinds import (
    CLIP_LEVELS,
    Kind,
    check_clip,
    check_kind,
    clipped_sum,
    divergence_of,
    log_mass,
    renormalized,
    with_tail,
)

SUPPORTS = ("student_topk", "teacher_topk", "full")

# Positions whose support is worked on at once: tensors of a few K numbers each, so many small calls would cost more.
SUPPORT_ROWS = 4096

# Stand-in for the log-probability of an impossible token beside p = 0; finite, also times a gradient.
IMPOSSIBLE = -1e4


@dataclass(frozen=True)
class Measure:
    """What is measured between two distributions at one position.

    Attributes:
        kind: a key of ``divergence_kinds.DIVERGENCES``.
        alpha: weight of the teacher in M (``jsd``) or of the forward KL (``mixed``).
        support: ``full``, or the ``topk`` most likely tokens of one side. Ignored where a teacher brings its own ids.
        tail: one more outcome for the probability outside the support; otherwise both sides are renormalised.
        clip, clip_level: upper limit of every entry, or of the position's sum (OPSD).
    """

    kind: str
    alpha: float = 0.5
    support: str = "full"
    topk: int = 0
    tail: bool = True
    clip: float | None = None
    clip_level: str = CLIP_LEVELS[0]

    def __post_init__(self) -> None:
        check_kind(self.kind, self.alpha)
        check_clip(self.clip, self.clip_level)
        if self.support not in SUPPORTS:
            raise ValueError(f"support {self.support!r} is unknown; allowed: {', '.join(SUPPORTS)}")
        if self.support != "full" and (isinstance(self.topk, bool) or self.topk < 1):
            raise ValueError(f"topk must be at least 1 with support {self.support}, found {self.topk}")

    @property
    def definition(self) -> Kind:
        """The kind's functions."""
        return check_kind(self.kind, self.alpha)


class Values(NamedTuple):
    """Per position, [M]; None where it was not asked for or does not exist."""

    divergence: Tensor | None
    log_prob: Tensor | None
    entropy: Tensor | None
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None
    teacher_log_prob: Tensor | None = None
    teacher_entropy: Tensor | None = None


@dataclass
class Task:
    """One call. ``kept_*`` is what the backward pass needs beside its inputs."""

    measure: Measure | None
    teacher: Teacher | None
    tokens: Tensor | None
    temperature: float
    teacher_temperature: float
    entropy: bool
    teacher_entropy: bool
    taught: int
    positions: Tensor | None
    chunk: int | None
    dtype: torch.dtype
    source_dtype: torch.dtype
    with_gradient: bool
    odd_rows: list[int] = field(default_factory=list)
    kept_ids: Tensor | None = None
    kept_slopes: Tensor | None = None
    kept_entropy: Tensor | None = None

    @property
    def reduced(self) -> bool:
        """Whether the divergence is on a support."""
        return self.measure is not None and (isinstance(self.teacher, OnSupport) or self.measure.support != "full")

    @property
    def has_teacher_logits(self) -> bool:
        """Whether the teacher is known on the whole vocabulary."""
        return self.teacher is not None and not isinstance(self.teacher, OnSupport)

    @property
    def full(self) -> bool:
        """Whether the divergence is on the whole vocabulary."""
        return self.measure is not None and not self.reduced

    def rows(self, source: Tensor, head: Tensor | None) -> Rows:
        """The student's side, in the precision of its product with the head."""
        head = None if head is None else head.detach().to(self.source_dtype)
        return Rows(source.detach().to(self.source_dtype), head, self.positions, self.chunk)

    def blocks(self, rows: Rows) -> Iterator[tuple[slice, Tensor | None]]:
        """Blocks of the positions with a teacher, then of the others."""
        yield from rows.blocks(0, self.taught)
        yield from rows.blocks(self.taught, len(rows))

    def teacher_block(self, block: slice) -> Tensor | None:
        """The teacher's logits, where there are any."""
        return self.teacher.block(block) if self.has_teacher_logits and block.start < self.taught else None


class _TokenLosses(torch.autograd.Function):
    """Divergence, log-probability of the token and entropy at M positions."""

    @staticmethod
    def forward(ctx, source: Tensor, head: Tensor | None, task: Task):
        ctx.set_materialize_grads(False)
        ctx.task = task
        ctx.save_for_backward(source, head)
        with plain(source.device):
            values = _forward(task, task.rows(source, head))
        ctx.mark_non_differentiable(*[value for value in values[3:] if value is not None])
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, divergence, log_prob, entropy, *_):
        source, head = ctx.saved_tensors
        with plain(source.device):
            grad_source, grad_head = _backward(
                ctx.task, ctx.task.rows(source, head), divergence, log_prob, entropy, ctx.needs_input_grad[:2]
            )
        return (
            None if grad_source is None else grad_source.to(source.dtype),
            None if grad_head is None else grad_head.to(head.dtype),
            None,
        )


def token_losses(
    source: Tensor,
    head: Tensor | None = None,
    *,
    measure: Measure | None = None,
    teacher: Teacher | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    entropy: bool = False,
    teacher_entropy: bool = False,
    row_chunk: int | None = None,
) -> Values:
    """Divergence to a teacher, log-probability of given tokens and entropy, with gradient to the student.

    Args:
        source: student logits [N, V], or hidden states [N, D] where ``head`` [V, D] is given.
        measure, teacher: the divergence and the teacher of the *first* ``len(teacher)`` positions; None for neither.
        positions: int64 [M], distinct rows of ``source`` to read; other rows are never touched. None: all, in order.
        tokens: int64 [M], tokens whose log-probability is wanted.
        temperature: divides the student's logits; ``teacher_temperature`` (the same if None) the teacher's.
        entropy, teacher_entropy: compute the entropy of that side. The teacher's has no gradient, like its
            log-probability of the tokens; both need a teacher with logits.
        row_chunk: positions worked on at once; None: by device.

    Returns:
        Values of shape [M], float64 if any input is, else float32. What is about the teacher is 0 beyond its positions
        and None where it does not exist (masses: on the full vocabulary).

    Raises:
        ValueError: shapes that do not fit, or a vocabulary that differs between student and teacher.
    """
    vocabulary = source.shape[-1] if head is None else head.shape[0]
    count = len(source) if positions is None else len(positions)
    taught = 0 if teacher is None else len(teacher)
    if (measure is None) != (teacher is None):
        raise ValueError("measure and teacher come together")
    if taught > count:
        raise ValueError(f"the teacher has {taught} positions, the student {count}")
    if tokens is not None and len(tokens) != count:
        raise ValueError(f"{len(tokens)} tokens for {count} positions")
    tensors = [source] if head is None else [source, head]
    if isinstance(teacher, OnSupport):
        tensors.append(teacher.log_probs)
    elif teacher is not None:
        if teacher.vocabulary != vocabulary:
            raise ValueError(f"the student's vocabulary has {vocabulary} tokens, the teacher's {teacher.vocabulary}")
        tensors += [teacher.values] if isinstance(teacher, Logits) else [teacher.hidden, teacher.weight]
        if measure.support != "full" and measure.topk > vocabulary:
            raise ValueError(f"topk={measure.topk} is larger than the vocabulary of {vocabulary} tokens")
    if isinstance(teacher, Head):
        # As the student's: what autocast asks of a linear layer.
        dtype = product_dtype(teacher.hidden, teacher.weight)
        teacher = Head(teacher.hidden.to(dtype), teacher.weight.to(dtype))
    task = Task(
        measure=measure,
        teacher=teacher,
        tokens=tokens,
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        entropy=entropy,
        teacher_entropy=teacher_entropy and taught > 0 and not isinstance(teacher, OnSupport),
        taught=taught,
        positions=positions,
        chunk=row_chunk,
        dtype=torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32,
        source_dtype=source.dtype if head is None else product_dtype(source, head),
        with_gradient=torch.is_grad_enabled() and any(t.requires_grad for t in tensors[: 1 if head is None else 2]),
    )
    return Values(*_TokenLosses.apply(source, head, task))


def _forward(task: Task, rows: Rows) -> Values:
    def zeros(wanted: bool) -> Tensor | None:
        return torch.zeros(len(rows), dtype=task.dtype, device=rows.device) if wanted else None

    out = Values(
        divergence=zeros(task.measure is not None),
        log_prob=zeros(task.tokens is not None),
        entropy=zeros(task.entropy),
        student_mass=zeros(task.reduced),
        teacher_mass=zeros(task.reduced),
        teacher_log_prob=zeros(task.tokens is not None and task.has_teacher_logits),
        teacher_entropy=zeros(task.teacher_entropy),
    )
    support = _Support(task, rows.device) if task.reduced else None
    work = Work(rows, task.dtype, 6 if task.full else 4)
    for block, made in task.blocks(rows):
        teacher = task.teacher_block(block)
        for part in work.chunks(block):
            logits = work.load(0, rows.logits(made, block, part), task.temperature)
            log_s = work.log_softmax(1, logits)
            if task.tokens is not None:
                out.log_prob[part] = log_s.gather(-1, task.tokens[part].unsqueeze(-1)).squeeze(-1)
            if task.entropy:
                out.entropy[part] = entropy_of(log_s, work.spare(2, rows=len(log_s))[0])
            if part.start >= task.taught:
                continue
            if teacher is None:
                support.put(part, task.teacher.ids[part].long(), log_s, task.teacher.log_probs[part])
                continue
            teacher_logits = work.load(
                3, teacher[part.start - block.start : part.stop - block.start], task.teacher_temperature
            )
            log_t = work.log_softmax(2, teacher_logits)
            if out.teacher_log_prob is not None:
                out.teacher_log_prob[part] = log_t.gather(-1, task.tokens[part].unsqueeze(-1)).squeeze(-1)
            if task.reduced:
                chooser = logits if task.measure.support == "student_topk" else teacher_logits
                ids = chooser.topk(task.measure.topk, dim=-1).indices
                support.put(part, ids, log_s, log_t.gather(-1, ids))
            if task.teacher_entropy:
                out.teacher_entropy[part] = entropy_of(log_t, work.spare(3, rows=len(log_t))[0])
            if task.full:
                out.divergence[part] = _full_value(task.measure, work, log_s, log_t)
    if task.full:
        _settle_odd_rows(task, rows, out.divergence)
    elif task.reduced:
        _reduced_divergence(task, support, out)
    # A copy: an output kept by its own node would be a cycle, and the caller may change it in place.
    task.kept_entropy = out.entropy.clone() if task.entropy and task.with_gradient else None
    return out


def _backward(
    task: Task,
    rows: Rows,
    divergence: Tensor | None,
    log_prob: Tensor | None,
    entropy: Tensor | None,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient by the source and by the head; ``divergence``, ``log_prob``, ``entropy``: gradients by the outputs."""
    head = rows.head
    grad_source = None
    if needed[0]:
        # Every row is written where all are read.
        grad_source = torch.empty_like(rows.source) if rows.positions is None else torch.zeros_like(rows.source)
    # Summed over blocks in the working precision, so that the result does not depend on how many there are.
    grad_head = torch.zeros_like(head, dtype=task.dtype) if head is not None and needed[1] else None
    work = Work(rows, task.dtype, 6 if task.full else 3)
    for block, made in task.blocks(rows):
        taught = block.start < task.taught and divergence is not None
        teacher = task.teacher_block(block) if task.full and taught else None
        for part in work.chunks(block):
            logits = work.load(0, rows.logits(made, block, part), task.temperature)
            slopes, on_support = None, None
            # d/dz of a log-probability is (one-hot - p): every slope is also taken away from all logits, times p.
            spread = torch.zeros(len(logits), dtype=task.dtype, device=rows.device)
            if taught and task.full:
                log_s = work.log_softmax(1, logits)
                teacher_logits = teacher[part.start - block.start : part.stop - block.start]
                log_t = work.log_softmax(2, work.load(3, teacher_logits, task.teacher_temperature))
                slopes = _full_slope(task, work, part, log_s, log_t).mul_(divergence[part].unsqueeze(-1))
                spread += slopes.sum(-1)
            elif taught:
                on_support = task.kept_slopes[part] * divergence[part].unsqueeze(-1)
                spread += on_support.sum(-1)
            if log_prob is not None:
                spread += log_prob[part]
            free = 1 if slopes is None or slopes.data_ptr() != work.buffers[1].data_ptr() else 2
            if entropy is None:
                grad = work.softmax(free, logits).mul_(spread.neg_().unsqueeze(-1))
            else:
                # dH/dz = -p (log p + H)
                surprise = torch.log_softmax(logits, -1).clamp_(min=IMPOSSIBLE)
                surprise.add_(task.kept_entropy[part].unsqueeze(-1)).mul_(entropy[part].unsqueeze(-1))
                grad = work.softmax(free, logits).mul_(surprise.add_(spread.unsqueeze(-1)).neg_())
            if slopes is not None:
                grad.add_(slopes)
            if on_support is not None:
                grad.scatter_add_(-1, task.kept_ids[part].long(), on_support)
            if log_prob is not None:
                grad.scatter_add_(-1, task.tokens[part].unsqueeze(-1), log_prob[part].unsqueeze(-1))
            if task.temperature != 1.0:
                grad.div_(task.temperature)
            if made is not None:
                # The logits of these rows have been read; their place takes the gradient.
                made[part.start - block.start : part.stop - block.start] = grad.to(made.dtype)
            elif grad_source is not None:
                grad_source[rows.index(part)] = grad.to(grad_source.dtype)
        if made is not None:
            index = rows.index(block)
            if grad_source is not None:
                grad_source[index] = made @ head
            if grad_head is not None:
                if grad_head.dtype == made.dtype:
                    grad_head.addmm_(made.t(), rows.source[index])
                else:
                    grad_head += made.t() @ rows.source[index]
    return grad_source, grad_head


# --------------------------------------------------------------------------------------------------- one chunk of rows


def _full_value(measure: Measure, work: Work, log_s: Tensor, log_t: Tensor) -> Tensor:
    kind = measure.definition
    if kind.entries_in_place is None:
        return divergence_of(
            kind, log_s, log_t, measure.alpha, clip=measure.clip, clip_level=measure.clip_level, slope=False
        )[0]
    entries = kind.entries_in_place(log_s, log_t, measure.alpha, *work.spare(3, 4, 5, rows=len(log_s)))
    return clipped_sum(entries, measure.clip, measure.clip_level)


def _full_slope(task: Task, work: Work, part: slice, log_s: Tensor, log_t: Tensor) -> Tensor:
    """Derivative of the divergence by the student's log-probabilities, [rows, V]."""
    measure, kind = task.measure, task.measure.definition
    general = {"clip": measure.clip, "clip_level": measure.clip_level}
    if kind.slope_in_place is None or measure.clip is not None:
        return divergence_of(kind, log_s, log_t, measure.alpha, **general)[1]
    odd = [row - part.start for row in task.odd_rows if part.start <= row < part.stop]
    repaired = divergence_of(kind, log_s[odd], log_t[odd], measure.alpha, **general)[1] if odd else None
    slopes = kind.slope_in_place(log_s, log_t, measure.alpha, *work.spare(3, 4, 5, rows=len(log_s)))
    if odd:
        slopes[odd] = repaired
    return slopes


def _settle_odd_rows(task: Task, rows: Rows, divergence: Tensor) -> None:
    """Rows whose fast value is not finite (an impossible token on a side, or broken logits) are done again, exactly."""
    task.odd_rows = torch.nonzero(~divergence[: task.taught].isfinite()).flatten().tolist()
    measure = task.measure
    for row in task.odd_rows:
        one = slice(row, row + 1)
        made = None if rows.head is None else product(rows.source[rows.index(one)], rows.head)
        student = rows.logits(made, one, one).to(task.dtype) / task.temperature
        teacher = task.teacher.block(one).to(task.dtype) / task.teacher_temperature
        divergence[one] = divergence_of(
            measure.definition,
            student.log_softmax(-1),
            teacher.log_softmax(-1),
            measure.alpha,
            clip=measure.clip,
            clip_level=measure.clip_level,
            slope=False,
        )[0]


class _Support:
    """Ids and log-probabilities of both sides on the support, [taught, K], filled chunk by chunk."""

    def __init__(self, task: Task, device: torch.device) -> None:
        width = task.teacher.ids.shape[-1] if isinstance(task.teacher, OnSupport) else task.measure.topk
        shape = (task.taught, width)
        self.ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.log_s, self.log_t = (torch.empty(shape, dtype=task.dtype, device=device) for _ in range(2))

    def put(self, part: slice, ids: Tensor, log_s: Tensor, log_t_NK: Tensor) -> None:
        """One chunk; ``log_s`` [rows, V] is the student's on the whole vocabulary."""
        self.ids[part], self.log_s[part], self.log_t[part] = ids, log_s.gather(-1, ids), log_t_NK


def _reduced_divergence(task: Task, support: _Support, out: Values) -> None:
    """Divergence and masses on the support; keeps ids and slopes for the backward pass."""
    measure = task.measure
    close = with_tail if measure.tail else renormalized
    general = {"clip": measure.clip, "clip_level": measure.clip_level, "slope": task.with_gradient}
    for start in range(0, task.taught, SUPPORT_ROWS):
        part = slice(start, min(start + SUPPORT_ROWS, task.taught))
        log_s, log_t = support.log_s[part], support.log_t[part]
        out.student_mass[part] = log_mass(log_s).exp()
        out.teacher_mass[part] = log_mass(log_t).exp()
        with torch.set_grad_enabled(task.with_gradient):
            leaf = log_s.detach().requires_grad_(task.with_gradient)
            closed = close(leaf)
            value, slope = divergence_of(measure.definition, closed.detach(), close(log_t), measure.alpha, **general)
        out.divergence[part] = value
        if slope is not None:
            # The slopes take the place of the log-probabilities they were made of.
            support.log_s[part] = torch.autograd.grad(closed, leaf, slope)[0]
    if task.with_gradient:
        task.kept_ids, task.kept_slopes = support.ids, support.log_s
