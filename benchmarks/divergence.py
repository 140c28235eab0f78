"""Time and memory of the divergences, side by side with what else computes them on the same work.

    python benchmarks/divergence.py [--tokens 512 2048] [--device cuda] [--only REGEX] [--out FILE]
    python benchmarks/divergence.py --sweep [--tokens 256]

Against the dense PyTorch form in float32 (``log_softmax`` of both sides, autograd), verl's ``forward_kl_topk`` with and
without its chunks, TRL's SDPO losses and, on CUDA, Liger's fused linear JSD; the last two where they are installed.
Their own functions are called. A case is one piece of work for all its variants:

* ``topk``: from both sides' logits; the student's K most likely tokens, the teacher's values there, JSD with tail.
* ``given ids``: forward KL on the teacher's K ids, its log-probabilities being given. verl's loss leaves the outside of
  the support out, without a tail or renormalising, and is compared with the dense form of just that.
* ``given ids, overlap``: the same and how many of the student's K most likely tokens are among the ids, which verl's
  function computes with it.
* ``full``: all of the vocabulary, from logits. ``linear``: from hidden states and heads, gradient by both.

Time: variants take turns within a repetition, the order changes with the repetition; medians, and the median of the
ratios to ours. The loss is the sum over tokens.

Peak memory is what a forward and backward pass needs on top of its inputs, the gradient included, which is the same for
all. On CUDA it is the allocator's. On a CPU it is the rise of the resident set: a process of its own sets the kernel's
high-water mark back (/proc/self/clear_refs) before every variant, and has the C library return every block of 64 KiB
and more at once when freed, so that none is reused unseen. That slows allocation, hence no time is taken there.

Kept: bytes a token that autograd and our ``grad_fn.task`` hold between the passes, inputs excluded.

Errors: largest difference of a value, and of a gradient relative to the largest one, to the dense float32 form.

``--sweep`` tries the rows of a chunk instead (``WORK_BYTES`` in verl_ext/chunks.py).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from verl_ext.chunks import Logits
from verl_ext.divergence import full_divergence, linear_divergence, student_topk, topk_divergence
from verl_ext.token_losses import Measure, token_losses
from verl_ext.token_reading import read

ALPHA = 0.5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Standard deviation of the student's logits, and of the teacher's difference to them.
SPREAD, GAP = 3.0, 0.7
# Elements of a chunk, as powers of two.
SWEEP = {"cpu": range(18, 24), "other": range(24, 30)}
# Tokens of the reference at once: from logits, where they stay in the cache, and with a head to read each time.
REFERENCE_ROWS = (16, 128)
OURS = "ours"

# ------------------------------------------------------------------------------------------------------- the inputs


@dataclass
class Inputs:
    """Tensors of one case; the gradient is taken by ``leaves``, and a variant reads the rest as it likes."""

    leaves: list[Tensor]
    teacher: list[Tensor]
    ids: Tensor | None = None
    log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids is not None:
            self.nested_ids, self.nested_log_probs = (
                torch.nested.nested_tensor([values], layout=torch.jagged) for values in (self.ids, self.log_probs)
            )

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.leaves[0])

    @property
    def storages(self) -> set[int]:
        """Addresses of the memory that is there before the call."""
        own = [*self.leaves, *self.teacher, self.ids, self.log_probs]
        nested = [] if self.ids is None else [self.nested_ids.values(), self.nested_log_probs.values()]
        return {tensor.untyped_storage().data_ptr() for tensor in [*own, *nested] if tensor is not None}

    def rows(self, part: slice) -> Inputs:
        """The same for some tokens, in float32."""

        def cut(tensor: Tensor, index: int) -> Tensor:
            return (tensor[part] if index == 0 else tensor).detach().float()  # a head is not by token

        return Inputs(
            [cut(leaf, index).requires_grad_() for index, leaf in enumerate(self.leaves)],
            [cut(tensor, index) for index, tensor in enumerate(self.teacher)],
            None if self.ids is None else self.ids[part],
            None if self.log_probs is None else self.log_probs[part],
        )


@lru_cache(maxsize=2)
def both_logits(setting: Setting) -> tuple[Tensor, Tensor]:
    """Logits [N, V] of student and teacher."""
    shape = (setting.tokens, setting.vocabulary)
    random = torch.Generator(setting.device).manual_seed(0)
    student = torch.randn(shape, generator=random, device=setting.device).mul_(SPREAD)
    teacher = torch.randn(shape, generator=random, device=setting.device).mul_(GAP).add_(student)
    return student.to(setting.dtype), teacher.to(setting.dtype)


def logit_inputs(setting: Setting, topk: int | None = None, given: bool = False) -> Inputs:
    """Logits of both sides, and the teacher's K ids where they are given."""
    student, teacher = both_logits(setting)
    student = student.clone()
    ids, log_probs = None, None
    if topk is not None:
        # Equal logits at the edge of the support would leave its choice to the implementation.
        best = student.topk(min(2 * topk + 64, setting.vocabulary), dim=-1)
        tied = (best.values == best.values[:, topk - 1 : topk]).logical_and_(
            torch.arange(best.values.shape[-1], device=setting.device) >= topk
        )
        student.scatter_(-1, best.indices, best.values.masked_fill(tied, 0.0))
    if given:
        support = read(Logits(teacher), topk=topk)
        ids, log_probs = support.ids.long(), support.log_probs
    return Inputs([student.requires_grad_()], [] if given else [teacher], ids, log_probs)


def linear_inputs(setting: Setting) -> Inputs:
    """Hidden states and heads of both sides."""
    random = torch.Generator(setting.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=setting.device)

    hidden = normal(setting.tokens, setting.hidden)
    head = normal(setting.vocabulary, setting.hidden).mul_(SPREAD / math.sqrt(setting.hidden))
    teacher_hidden = hidden + normal(*hidden.shape).mul_(GAP / SPREAD)
    student, teacher = [hidden, head], [teacher_hidden, head.clone()]
    return Inputs(
        [tensor.to(setting.dtype).requires_grad_() for tensor in student],
        [tensor.to(setting.dtype) for tensor in teacher],
    )


# ------------------------------------------------------------------------------------------------------ the variants

Form = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work: values [N] or their sum. ``reference``: its own dense form, where it has one."""

    name: str
    run: Form
    reference: Form | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work. The first variant is ours, and what the others are divided by."""

    name: str
    make: Callable[[Setting], Inputs]
    dense: Form
    variants: list[Variant]


@dataclass(frozen=True)
class Setting:
    """Sizes of a case."""

    device: str
    tokens: int
    vocabulary: int
    hidden: int
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""
        return DTYPES[self.precision]


def dense_jsd(log_s: Tensor, log_t: Tensor) -> Tensor:
    """JSD of log-probabilities, summed over the last dimension."""
    log_m = torch.logaddexp(log_s + math.log1p(-ALPHA), log_t + math.log(ALPHA))
    return ((1.0 - ALPHA) * log_s.exp() * (log_s - log_m) + ALPHA * log_t.exp() * (log_t - log_m)).sum(-1)


def dense_forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(teacher || student)."""
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def dense_reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(student || teacher)."""
    return (log_s.exp() * (log_s - log_t)).sum(-1)


def dense_tail(log_probs: Tensor) -> Tensor:
    """Appends the rest."""
    rest = torch.log(-torch.expm1(log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)))
    return torch.cat((log_probs, rest), dim=-1)


def dense_topk(topk: int) -> Form:
    """JSD on the student's K tokens and the tail."""

    def run(inputs: Inputs) -> Tensor:
        log_s, log_t = inputs.leaves[0].float().log_softmax(-1), inputs.teacher[0].float().log_softmax(-1)
        ids = log_s.topk(topk, dim=-1).indices
        return dense_jsd(dense_tail(log_s.gather(-1, ids)), dense_tail(log_t.gather(-1, ids)))

    return run


def dense_given(inputs: Inputs, tail: bool = True) -> Tensor:
    """Forward KL on the given ids."""
    log_s = inputs.leaves[0].float().log_softmax(-1).gather(-1, inputs.ids)
    if not tail:
        return dense_forward_kl(log_s, inputs.log_probs)
    return dense_forward_kl(dense_tail(log_s), dense_tail(inputs.log_probs))


def dense_full(divergence: Callable[[Tensor, Tensor], Tensor]) -> Form:
    """Over the vocabulary."""

    def run(inputs: Inputs) -> Tensor:
        return divergence(inputs.leaves[0].float().log_softmax(-1), inputs.teacher[0].float().log_softmax(-1))

    return run


def dense_linear(inputs: Inputs) -> Tensor:
    """JSD of the logits that hidden states and heads give."""
    student, teacher = (hidden @ head.t() for hidden, head in (inputs.leaves, inputs.teacher))
    return dense_jsd(student.float().log_softmax(-1), teacher.float().log_softmax(-1))


def verl_form(chunked: bool) -> Form:
    """verl's whole function, overlap included."""
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.workers.config import DistillationLossConfig

    config = SimpleNamespace(
        distillation_loss=DistillationLossConfig(
            loss_mode="forward_kl_topk", use_chunked_topk=chunked, log_prob_min_clamp=None
        )
    )

    def run(inputs: Inputs) -> Tensor:
        return compute_forward_kl_topk(
            inputs.leaves[0].unsqueeze(0), inputs.nested_log_probs, inputs.nested_ids, config, "thd"
        )["distillation_losses"].squeeze(0)

    return run


def verl_chunked_parts(inputs: Inputs) -> Tensor:
    """The two functions verl's loss is made of where it is chunked, without the overlap."""
    from verl.trainer.distillation.fsdp.losses import _chunked_topk_log_probs, kl_divergence

    log_s = _chunked_topk_log_probs(inputs.leaves[0].unsqueeze(0), inputs.ids.unsqueeze(0))
    return kl_divergence(log_q=log_s, log_p=inputs.log_probs.unsqueeze(0)).squeeze(0)


def topk_case(topk: int) -> Case:
    """JSD with tail, from logits."""
    measure = Measure("jsd", ALPHA, "student_topk", topk)

    def in_one(inputs: Inputs) -> Tensor:
        return token_losses(inputs.leaves[0], measure=measure, teacher=Logits(inputs.teacher[0])).divergence

    def in_parts(inputs: Inputs) -> Tensor:
        ids = student_topk(inputs.leaves[0], topk)
        log_t = read(Logits(inputs.teacher[0]), ids=ids).log_probs
        return topk_divergence(inputs.leaves[0], log_t, ids, kind="jsd", alpha=ALPHA)

    dense = dense_topk(topk)
    variants = [Variant(OURS, in_one), Variant("ours, topk_divergence", in_parts), Variant("dense float32", dense)]
    if installed("trl"):
        from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

        def trl(inputs: Inputs) -> Tensor:
            return compute_topk_self_distillation_loss(
                inputs.leaves[0],
                inputs.teacher[0],
                distillation_topk=topk,
                distillation_alpha=ALPHA,
                distillation_add_tail=True,
            )

        variants.append(Variant("TRL SDPO", trl))
    return Case(f"topk jsd K={topk}", lambda setting: logit_inputs(setting, topk), dense, variants)


def given_case(topk: int, overlap: bool) -> Case:
    """Forward KL on the teacher's ids."""

    def ours(inputs: Inputs) -> Tensor:
        return topk_divergence(inputs.leaves[0], inputs.log_probs, inputs.ids, kind="forward_kl")

    def and_overlap(form: Form) -> Form:
        def run(inputs: Inputs) -> Tensor:
            values = form(inputs)
            common = inputs.ids.unsqueeze(-1) == student_topk(inputs.leaves[0], topk).unsqueeze(-2)
            common.any(-1).sum(-1)
            return values

        return run if overlap else form

    def without_tail(inputs: Inputs) -> Tensor:
        return dense_given(inputs, tail=False)

    variants = [Variant(OURS, and_overlap(ours)), Variant("dense float32", and_overlap(dense_given))]
    if overlap:
        variants += [
            Variant("verl", verl_form(False), without_tail),
            Variant("verl, use_chunked_topk", verl_form(True), without_tail),
        ]
    else:
        variants.append(Variant("verl, chunked parts", verl_chunked_parts, without_tail))
    name = f"given ids{', overlap' if overlap else ''} forward_kl K={topk}"
    return Case(name, lambda setting: logit_inputs(setting, topk, given=True), dense_given, variants)


def full_case(kind: str) -> Case:
    """The whole vocabulary, from logits."""
    dense = dense_full({"jsd": dense_jsd, "reverse_kl": dense_reverse_kl}[kind])

    def ours(inputs: Inputs) -> Tensor:
        return full_divergence(inputs.leaves[0], inputs.teacher[0], kind=kind, alpha=ALPHA)

    variants = [Variant(OURS, ours), Variant("dense float32", dense)]
    if installed("trl"):
        from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

        alpha = {"jsd": ALPHA, "reverse_kl": 1.0}[kind]

        def trl(inputs: Inputs) -> Tensor:
            return compute_full_logit_self_distillation_loss(
                inputs.leaves[0], inputs.teacher[0], distillation_alpha=alpha
            )

        variants.append(Variant("TRL SDPO", trl))
    return Case(f"full {kind}", logit_inputs, dense, variants)


def linear_case(device: str) -> Case:
    """The whole vocabulary, from hidden states."""

    def ours(inputs: Inputs) -> Tensor:
        return linear_divergence(*inputs.leaves, *inputs.teacher, kind="jsd", alpha=ALPHA)

    variants = [Variant(OURS, ours), Variant("dense float32", dense_linear)]
    if device == "cuda" and installed("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=ALPHA)
        chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=ALPHA)

        # Both return a mean. They take the gradient in the forward pass, and the second computes a cross-entropy too.
        def liger(inputs: Inputs) -> Tensor:
            return fused(*inputs.leaves, *inputs.teacher, None) * inputs.tokens

        def liger_chunked(inputs: Inputs) -> Tensor:
            labels = torch.zeros(inputs.tokens, dtype=torch.long, device=device)
            return chunked(*inputs.leaves, *inputs.teacher, labels) * inputs.tokens

        variants += [Variant("Liger fused_linear_jsd", liger), Variant("Liger chunked JSD loss", liger_chunked)]
    return Case("linear jsd", linear_inputs, dense_linear, variants)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """All work."""
    return [
        *[topk_case(topk) for topk in arguments.topk],
        *[given_case(topk, overlap) for topk in arguments.topk for overlap in (False, True)],
        full_case("jsd"),
        full_case("reverse_kl"),
        linear_case(arguments.device),
    ]


def work(arguments: argparse.Namespace) -> Iterator[tuple[str, Setting, Case]]:
    """Every case in every size that --only lets through, with its label."""
    known = cases(arguments)
    for tokens in arguments.tokens:
        for precision in arguments.precisions:
            setting = Setting(arguments.device, tokens, arguments.vocabulary, arguments.hidden, precision)
            for case in known:
                label = f"{case.name} {precision} N={tokens}"
                if re.search(arguments.only, label):
                    yield label, setting, case


# --------------------------------------------------------------------------------------------------- what is measured


@dataclass
class Record:
    """Measurements of one variant of one case."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    errors: tuple[float, float] = (math.nan, math.nan)
    kept_bytes: float = math.nan
    peak_bytes: float = math.nan
    failure: str | None = None

    @property
    def total(self) -> list[float]:
        """Seconds of both passes."""
        return [sum(pair) for pair in zip(self.forward, self.backward, strict=True)]


def synchronize(device: str) -> None:
    """Until a device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def step(variant: Variant, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...], float, float]:
    """Values, gradients and the seconds of both passes."""
    device = inputs.leaves[0].device.type
    synchronize(device)
    start = time.perf_counter()
    values = variant.run(inputs)
    total = values.sum()
    synchronize(device)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(total, inputs.leaves)
    synchronize(device)
    return values.detach(), gradients, middle - start, time.perf_counter() - middle


class Saved:
    """A tensor that autograd saves, as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(variant: Variant, inputs: Inputs) -> int:
    """What is held between the passes, inputs excluded."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def save(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        values = variant.run(inputs)
    gc.collect()
    tensors = [saved.tensor for saved in alive]
    pending, seen = [values.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [parent for parent, _ in node.next_functions]
        if hasattr(node, "task"):
            held = [*vars(node.task).values(), *vars(node.task.teacher).values()]
            tensors += [value for value in held if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    known = inputs.storages
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


def reference(form: Form, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Values and gradients of a dense form in float32, a few tokens at a time."""
    values, by_token, shared = [], [], None
    rows = REFERENCE_ROWS[len(inputs.leaves) - 1]
    for start in range(0, inputs.tokens, rows):
        part = inputs.rows(slice(start, start + rows))
        values.append(form(part))
        first, *others = torch.autograd.grad(values[-1].sum(), part.leaves)
        values[-1] = values[-1].detach()
        by_token.append(first)
        shared = others if shared is None else [old.add_(new) for old, new in zip(shared, others, strict=True)]
    return torch.cat(values), [torch.cat(by_token), *shared]


def largest_difference(values: Tensor, expected: Tensor) -> float:
    """A few rows at a time, which needs no further tensor of the size."""
    rows = max(1, (1 << 21) // values[:1].numel())
    pairs = zip(values.split(rows), expected.split(rows), strict=True)
    return max(float((value.float() - wanted).abs().max()) for value, wanted in pairs)


def errors(
    values: Tensor, gradients: tuple[Tensor, ...], expected: Tensor, wanted: list[Tensor]
) -> tuple[float, float]:
    """Largest difference of a value, and of a gradient relative to the largest. A sum counts per token."""
    if values.dim() == 0:
        off = abs(float(values) - float(expected.sum())) / len(expected)
    else:
        off = largest_difference(values, expected)
    relative = [
        largest_difference(gradient, right) / max(float(right.abs().max()), 1e-30)
        for gradient, right in zip(gradients, wanted, strict=True)
    ]
    return off, max(relative)


def high_water(field_name: str) -> int:
    """Bytes, a line of /proc/self/status."""
    match = re.search(rf"^{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024


def peak_bytes(variant: Variant, inputs: Inputs) -> int:
    """Peak of a step on top of what is there before it. On a CPU for the process started for it only."""
    gc.collect()
    if inputs.leaves[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(variant, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water("VmRSS")
    step(variant, inputs)
    return high_water("VmHWM") - before


def peaks(arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Peaks of every variant, by label and name, in this process."""
    found: dict[str, dict[str, int]] = {}
    for label, setting, case in work(arguments):
        small = case.make(Setting(setting.device, 2, setting.vocabulary, setting.hidden, setting.precision))
        for variant in case.variants:
            step(variant, small)  # what is set up once is not a variant's need
        del small
        inputs = case.make(setting)
        found[label] = {}
        for variant in case.variants:
            try:
                found[label][variant.name] = peak_bytes(variant, inputs)
            except torch.OutOfMemoryError:
                continue
    return found


def peaks_elsewhere(arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """The same from a fresh process whose allocator hides nothing; nothing where the system cannot tell."""
    if not Path("/proc/self/clear_refs").exists():
        print("peak memory: only measured on Linux", file=sys.stderr)
        return {}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_MMAP_MAX_": str(1 << 30)}
    command = [sys.executable, __file__, *arguments.given, "--peaks-only"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, setting: Setting, repeats: int) -> dict[str, Record]:
    """Errors and kept bytes once, which also warms up, then times in turns."""
    inputs = case.make(setting)
    records = {variant.name: Record() for variant in case.variants}
    expected: dict[Form, tuple[Tensor, list[Tensor]]] = {}
    for variant in case.variants:
        form = variant.reference or case.dense
        if form not in expected:
            expected = {form: reference(form, inputs)}
        record = records[variant.name]
        try:
            values, gradients, *_ = step(variant, inputs)
            record.errors = errors(values, gradients, *expected[form])
            del values, gradients
            record.kept_bytes = kept_bytes(variant, inputs)
        except torch.OutOfMemoryError:
            record.failure = "out of memory"
    expected.clear()
    for repeat in range(repeats):
        for index in range(len(case.variants)):
            variant = case.variants[(index + repeat) % len(case.variants)]
            record = records[variant.name]
            if record.failure is None:
                _, _, forward, backward = step(variant, inputs)
                record.forward.append(forward)
                record.backward.append(backward)
    return records


def row_of(label: str, setting: Setting, name: str, record: Record, ours: Record) -> dict[str, Any]:
    """What is printed and written of a variant."""
    row: dict[str, Any] = {"case": label, "variant": name, "tokens": setting.tokens, "precision": setting.precision}
    if record.failure:
        return row | {"failure": record.failure}
    ratios = [theirs / own for theirs, own in zip(record.total, ours.total, strict=False)]
    return row | {
        "forward_ms": 1e3 * statistics.median(record.forward),
        "backward_ms": 1e3 * statistics.median(record.backward),
        "total_ms": 1e3 * statistics.median(record.total),
        "time_to_ours": statistics.median(ratios) if ratios else math.nan,
        "peak_mib": record.peak_bytes / 2**20,
        "peak_to_ours": record.peak_bytes / ours.peak_bytes,
        "kept_kib_per_token": record.kept_bytes / setting.tokens / 1024,
        "value_error": record.errors[0],
        "gradient_error": record.errors[1],
    }


COLUMNS = {
    "forward_ms": ("fwd ms", "{:.1f}"),
    "backward_ms": ("bwd ms", "{:.1f}"),
    "total_ms": ("both ms", "{:.1f}"),
    "time_to_ours": ("x ours", "{:.2f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "peak_to_ours": ("x ours", "{:.2f}"),
    "kept_kib_per_token": ("kept KiB/tok", "{:.2f}"),
    "value_error": ("value err", "{:.1e}"),
    "gradient_error": ("grad err", "{:.1e}"),
}


def show(rows: list[dict[str, Any]]) -> None:
    """One case."""
    print(f"\n{rows[0]['case']}")
    print(f"  {'':24}" + "".join(f"{title:>13}" for title, _ in COLUMNS.values()))
    for row in rows:
        cells = [row["failure"]] if "failure" in row else [form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        print(f"  {row['variant']:24}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything side by side."""
    memory = peaks(arguments) if arguments.device == "cuda" else peaks_elsewhere(arguments)
    rows = []
    for label, setting, case in work(arguments):
        records = measure(case, setting, arguments.repeats)
        for name, record in records.items():
            record.peak_bytes = memory.get(label, {}).get(name, math.nan)
        found = [row_of(label, setting, name, record, records[OURS]) for name, record in records.items()]
        show(found)
        rows += found
    return rows


def sweep(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time by the rows of a chunk."""
    rows = []
    for tokens in arguments.tokens:
        for precision in arguments.precisions:
            setting = Setting(arguments.device, tokens, arguments.vocabulary, arguments.hidden, precision)
            topk = max(arguments.topk)
            for kind in (Measure("jsd", ALPHA, "student_topk", topk), Measure("jsd", ALPHA)):
                name = f"{kind.support} jsd{f' K={topk}' if kind.topk else ''} {precision} N={tokens}"
                if re.search(arguments.only, name):
                    rows += sweep_one(name, kind, setting, arguments.repeats)
    return rows


def sweep_one(name: str, kind: Measure, setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """One measure."""
    inputs = logit_inputs(setting, kind.topk or None)
    teacher = Logits(inputs.teacher[0])
    variants, by_power = {}, {}
    for power in SWEEP.get(setting.device, SWEEP["other"]):
        chunk = max(1, (1 << power) // setting.vocabulary)

        def run(inputs: Inputs, chunk: int = chunk) -> Tensor:
            return token_losses(inputs.leaves[0], measure=kind, teacher=teacher, row_chunk=chunk).divergence

        variants[power], by_power[power] = Variant(str(chunk), run), Record()
    powers = list(variants)
    step(variants[powers[0]], inputs)
    for repeat in range(repeats):
        for index in range(len(powers)):
            power = powers[(index + repeat) % len(powers)]
            _, _, forward, backward = step(variants[power], inputs)
            by_power[power].forward.append(forward)
            by_power[power].backward.append(backward)
    best = min(statistics.median(record.total) for record in by_power.values())
    print(f"\n{name}\n  {'elements':10}{'rows':>6}{'fwd ms':>10}{'bwd ms':>10}{'both ms':>10}{'x best':>8}")
    rows = []
    for power, record in by_power.items():
        row = {
            "case": name,
            "elements": 1 << power,
            "rows": int(variants[power].name),
            "forward_ms": 1e3 * statistics.median(record.forward),
            "backward_ms": 1e3 * statistics.median(record.backward),
            "total_ms": 1e3 * statistics.median(record.total),
            "to_best": statistics.median(record.total) / best,
        }
        rows.append(row)
        print(
            f"  2**{power:<7}{row['rows']:>6}{row['forward_ms']:>10.1f}{row['backward_ms']:>10.1f}"
            f"{row['total_ms']:>10.1f}{row['to_best']:>8.2f}",
            flush=True,
        )
    return rows


# ---------------------------------------------------------------------------------------------------------- the run


def installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None


def release(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str) -> str:
    """What it ran on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    named = (
        re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE) if information.exists() else None
    )
    return f"{named[1] if named else platform.processor()}, {platform.machine()}, {os.cpu_count()} cores"


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Four digits; what was not measured is null."""
    return {
        key: (float(f"{value:.4g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for key, value in row.items()
    }


def main() -> int:
    """Runs and prints; the result is also written to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, help="width for the linear case (1024 on a CPU, else 4096)")
    parser.add_argument("--topk", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="regular expression on a case's label")
    parser.add_argument("--sweep", action="store_true", help="time by the rows of a chunk instead")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peaks-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.given = sys.argv[1:]
    arguments.hidden = arguments.hidden or (1024 if arguments.device == "cpu" else 4096)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if arguments.peaks_only:
        print(json.dumps(peaks(arguments)))
        return 0
    if not arguments.sweep and not installed("trl"):
        print("TRL is not installed: pip install --no-deps trl (its SDPO losses are left out)")
    if not arguments.sweep and arguments.device == "cuda" and not installed("liger_kernel"):
        print("Liger is not installed: pip install --no-deps liger-kernel (its linear JSD is left out)")
    result = {
        "date": date.today().isoformat(),
        "machine": machine(arguments.device),
        "threads": torch.get_num_threads(),
        "versions": {package: release(package) for package in ("torch", "verl", "trl", "liger-kernel")},
        "vocabulary": arguments.vocabulary,
        "hidden": arguments.hidden,
        "repeats": arguments.repeats,
    }
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    rows = (sweep if arguments.sweep else compare)(arguments)
    result["sweep" if arguments.sweep else "rows"] = [rounded(row) for row in rows]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
