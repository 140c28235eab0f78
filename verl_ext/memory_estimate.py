"""Memory of one rank in each phase of a step, term by term, before anything is started.

Exact: weights, gradients, optimiser and teacher, as FSDP2 shards them (each parameter along its first dimension, padded
to equal parts). Counted from the modules and held to measured tensors within 10%: activations, and what the losses of
:mod:`verl_ext.token_losses` keep. Estimates without a measurement are marked ``assumed``: gathered weights, working
tensors, what vLLM and the libraries take beside.

A step's phases never overlap on a rank: rollout, teacher pass, update (forward and backward), optimiser step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, prod

from verl_ext.architecture import Architecture, Shape, elements
from verl_ext.chunk_sizes import HEAD_ROWS, WORK_BYTES
from verl_ext.memory_activations import FLOAT, Forward, kept_bytes, passing_bytes, rerun_bytes

GIB = 1 << 30
ROLLOUT, TEACHER, UPDATE, OPTIMISER = "rollout", "teacher pass", "update", "optimiser step"
PHASES = (ROLLOUT, TEACHER, UPDATE, OPTIMISER)
LIBRARIES = 2 * GIB
"""CUDA context, NCCL's buffers and what a sleeping vLLM keeps (assumed)."""
FRAGMENTS = 0.05
"""Of a phase's tensors, what the allocator cannot use between them (assumed)."""


@dataclass(frozen=True)
class Copy:
    """A copy of a model's weights on the ranks.

    Attributes:
        itemsize: bytes of a stored number. offloaded: in host memory between the phases that need it.
        streamed: in host memory always (FSDP2's CPU offload policy).
    """

    model: Architecture
    itemsize: int = FLOAT
    offloaded: bool = False
    streamed: bool = False


@dataclass(frozen=True)
class LossSettings:
    """What the update's loss reads and keeps.

    Attributes:
        divergence: whether there is a divergence in the loss. full: on the whole vocabulary.
        topk: K of the support; 0 for none.
        inputs: ``logits`` or ``hidden_states`` of the student.
        teacher_states: ``hidden_states`` or ``log_probs``, what a row keeps of its teacher.
        policy_gradient: whether verl's own log-probabilities are part of the loss as well.
        scaled: whether the rollout temperature is not 1 (verl then makes a second tensor of logits).
        parts: models whose hidden states stand side by side (2 for a trust region).
    """

    divergence: bool
    full: bool = False
    topk: int = 0
    inputs: str = "logits"
    teacher_states: str = "log_probs"
    policy_gradient: bool = False
    scaled: bool = False
    parts: int = 1


@dataclass(frozen=True)
class Rollout:
    """vLLM on the same device.

    Attributes:
        share: ``gpu_memory_utilization``. sleeps: gives its memory back between rollouts.
        parallel: tensor parallelism. bucket: bytes of one package of new weights.
    """

    share: float
    itemsize: int
    parallel: int = 1
    sleeps: bool = True
    length: int = 0
    bucket: int = 0


@dataclass(frozen=True)
class Plan:
    """One rank's work.

    Attributes:
        ranks: that share one copy of the weights (``fsdp_size``, or all).
        optimizer_offload: the moments are in host memory outside the update.
        compute, reduce: bytes of a number of gathered weights, and of gradients on their way.
        accumulate: verl's ``use_no_sync_for_gradient_accumulation``: whole gradients stay between micro-batches.
        student_tokens, teacher_tokens: of the largest micro-batch of either pass.
        taught_tokens: response tokens of a step on this rank whose teacher states are kept.
        adapter: shapes of LoRA's matrices; None for full fine-tuning.
        device_bytes: of one device, or None where the host's memory is meant (CPU).
    """

    student: Copy
    teacher: Copy | None
    teacher_model: Architecture | None
    forward: Forward
    loss: LossSettings
    ranks: int
    student_tokens: int
    teacher_tokens: int
    taught_tokens: int
    rollout: Rollout | None
    device_bytes: int
    optimizer_offload: bool = False
    states_offloaded: bool = False
    compute: int = 2
    reduce: int = FLOAT
    accumulate: bool = False
    micro_batches: int = 1
    adapter: Mapping[str, Shape] | None = None
    cuda: bool = True


@dataclass(frozen=True)
class Term:
    """One line of the estimate; ``bytes`` in each of ``phases`` on the device, or on the host where that is empty."""

    name: str
    bytes: int
    phases: tuple[str, ...]
    assumed: bool = False
    host: bool = False


@dataclass(frozen=True)
class Estimate:
    """What one rank holds."""

    terms: list[Term]
    plan: Plan = field(repr=False)

    def of(self, name: str) -> int:
        """Bytes of a term on the device, 0 where there is none."""
        return sum(term.bytes for term in self.terms if term.name == name and term.phases)

    def phase(self, name: str) -> int:
        """Bytes on the device in one phase, fragments included."""
        tensors = sum(term.bytes for term in self.terms if name in term.phases)
        fixed = sum(term.bytes for term in self.terms if name in term.phases and term.name in _FIXED)
        return int(fixed + (1 + (FRAGMENTS if self.plan.cuda else 0)) * (tensors - fixed))

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and its bytes."""
        return max(((name, self.phase(name)) for name in PHASES), key=lambda found: found[1])

    @property
    def host(self) -> int:
        """Bytes of host memory for what is offloaded, of this rank."""
        return sum(term.bytes for term in self.terms if term.host)

    @property
    def sequences(self) -> float | None:
        """Full-length sequences whose keys and values one vLLM replica holds at once; None without a device's share."""
        rollout, model = self.plan.rollout, self.plan.student.model
        if rollout is None or not self.plan.cuda or not rollout.length:
            return None
        weights = rollout.itemsize * elements(model.parameters()) / rollout.parallel
        # Keys and values of a group are on one device at least.
        groups = max(1, ceil(model.groups / rollout.parallel))
        token = 2 * model.layers * groups * model.head_dim * rollout.itemsize
        free = rollout.share * self.plan.device_bytes - weights - LIBRARIES
        return free / (token * rollout.length)


_FIXED = ("vLLM's share", "libraries (assumed)")


def shard_bytes(shapes: Mapping[str, Shape], ranks: int, itemsize: int) -> int:
    """Of one rank: FSDP2 cuts the first dimension into equal parts and pads the last one."""
    return itemsize * sum(ceil(shape[0] / ranks) * prod(shape[1:]) for shape in shapes.values())


def optimiser_bytes(shapes: Mapping[str, Shape], ranks: int, itemsize: int) -> int:
    """AdamW: two moments in the parameter's type, and a step counter of 4 bytes a parameter."""
    return 2 * shard_bytes(shapes, ranks, itemsize) + FLOAT * len(shapes)


def estimate(plan: Plan) -> Estimate:
    """Every term of one rank."""
    terms = [*_states(plan), *_gathered(plan), *_teacher_pass(plan), *_update(plan), *_beside(plan)]
    return Estimate([term for term in terms if term.bytes > 0], plan)


def saved_per_position(loss: LossSettings) -> int:
    """Bytes that a support's divergence keeps for its backward pass per response token: ids and slopes."""
    return 8 * loss.topk if loss.divergence and not loss.full else 0


def state_per_position(loss: LossSettings, width: int, itemsize: int) -> int:
    """Bytes that a response token keeps of its teacher until the update; ``width`` of the teacher's hidden states."""
    if loss.teacher_states == "hidden_states":
        return loss.parts * itemsize * width
    return 8 * loss.topk + 2 * FLOAT


def logits_bytes(loss: LossSettings, vocabulary: int, itemsize: int) -> tuple[int, int]:
    """Of one packed token: the logits that are kept, and the gradient by them."""
    if loss.inputs != "logits":
        return 0, 0
    losses = int(loss.divergence) + int(loss.policy_gradient)
    kept = (2 if loss.scaled else 1) * itemsize * vocabulary
    return kept, max(1, losses) * itemsize * vocabulary


# ------------------------------------------------------------------------------------------------------------- terms


def _states(plan: Plan) -> list[Term]:
    student, ranks = plan.student, plan.ranks
    base = student.model.parameters()
    trained = base if plan.adapter is None else plan.adapter
    weights = shard_bytes(base if plan.adapter is None else {**base, **plan.adapter}, ranks, student.itemsize)
    gradients = shard_bytes(trained, ranks, student.itemsize)
    moments = optimiser_bytes(trained, ranks, student.itemsize)
    reads_student = (TEACHER,) if plan.teacher is None or plan.loss.parts > 1 else ()
    used = (*reads_student, UPDATE, OPTIMISER)
    terms = []
    if student.streamed:
        for name, size in (("weights", weights), ("gradients", gradients), ("optimiser", moments)):
            terms.append(Term(f"{name}, on the host", size, (), host=True))
    else:
        terms.append(Term("weights", weights, used if student.offloaded else PHASES))
        terms.append(Term("gradients", gradients, (UPDATE, OPTIMISER)))
        terms.append(Term("optimiser", moments, (UPDATE, OPTIMISER) if plan.optimizer_offload else PHASES))
        # AdamW over many tensors at once makes one more of each while it steps.
        terms.append(Term("optimiser's working copy (assumed)", gradients, (OPTIMISER,), assumed=True))
        if student.offloaded:
            terms.append(Term("weights, on the host", weights, (), host=True))
        if plan.optimizer_offload:
            terms.append(Term("optimiser, on the host", moments, (), host=True))
    if plan.teacher is not None:
        size = shard_bytes(plan.teacher.model.parameters(), ranks, plan.teacher.itemsize)
        terms.append(Term("teacher", size, (TEACHER,) if plan.teacher.offloaded else PHASES))
        if plan.teacher.offloaded:
            terms.append(Term("teacher, on the host", size, (), host=True))
    return terms


def _gathered(plan: Plan) -> list[Term]:
    """Whole weights of the layer at work and the next one, and of the unit that holds the head."""
    model = plan.student.model
    layer, head = elements(model.layer()), model.vocabulary * model.hidden
    forward = plan.compute * (2 * layer + head)
    trained = layer if plan.adapter is None else 0
    # The gradient of a unit in both precisions, one unit at a time; the head's is the largest where it is trained.
    unit = max(trained, head) if plan.adapter is None else 0
    terms = [Term("gathered weights (assumed)", forward, (UPDATE,), assumed=True)]
    terms.append(Term("gathered gradients (assumed)", (plan.compute + plan.reduce) * unit, (UPDATE,), assumed=True))
    if plan.accumulate and plan.micro_batches > 1 and plan.adapter is None:
        whole = plan.reduce * elements(model.parameters())
        terms.append(Term("whole gradients between micro-batches", whole, (UPDATE,)))
    if plan.teacher_model is not None:
        other = plan.teacher_model
        size = plan.compute * (2 * elements(other.layer()) + other.vocabulary * other.hidden)
        terms.append(Term("teacher's gathered weights (assumed)", size, (TEACHER,), assumed=True))
    return terms


def _teacher_pass(plan: Plan) -> list[Term]:
    """No graph: one layer's tensors at a time, and what is left behind until the update."""
    model, loss, e = plan.teacher_model, plan.loss, plan.forward.itemsize
    if model is None:
        return []
    one_layer = rerun_bytes(model, Forward(e, True, plan.forward.padded_length))
    terms = [Term("teacher's activations (assumed)", plan.teacher_tokens * one_layer, (TEACHER,), assumed=True)]
    kept = plan.taught_tokens * state_per_position(loss, model.hidden, e)
    head = e * loss.parts * model.vocabulary * model.hidden if loss.teacher_states == "hidden_states" else 0
    phases = () if plan.states_offloaded else (TEACHER, UPDATE)
    terms.append(Term("teacher states", kept, phases, host=plan.states_offloaded))
    terms.append(Term("teacher's head", head, (TEACHER, UPDATE)))
    if loss.teacher_states == "log_probs":
        terms.append(Term("working tensors of the teacher pass (assumed)", _work(plan, 1), (TEACHER,), assumed=True))
    return terms


def _update(plan: Plan) -> list[Term]:
    model, forward, loss, tokens = plan.student.model, plan.forward, plan.loss, plan.student_tokens
    kept, gradient = logits_bytes(loss, model.vocabulary, forward.itemsize)
    terms = [
        Term("activations", tokens * (kept_bytes(model, forward) + rerun_bytes(model, forward)), (UPDATE,)),
        Term("gradients of activations (assumed)", tokens * passing_bytes(model, forward), (UPDATE,), assumed=True),
        Term("logits", tokens * kept, (UPDATE,)),
        Term("gradient by the logits", tokens * gradient, (UPDATE,)),
        # No more positions than tokens; a prompt has none.
        Term("saved by the divergence", tokens * saved_per_position(loss), (UPDATE,)),
    ]
    if loss.inputs == "hidden_states":
        head = model.vocabulary * model.hidden
        terms.append(Term("gradient by hidden states", tokens * forward.itemsize * model.hidden, (UPDATE,)))
        if plan.adapter is None:
            terms.append(Term("float32 gradient of the head", FLOAT * head, (UPDATE,)))
    if loss.divergence:
        sides = (loss.inputs == "hidden_states") + (loss.teacher_states == "hidden_states")
        terms.append(Term("working tensors of the loss (assumed)", _work(plan, sides), (UPDATE,), assumed=True))
    return terms


def _work(plan: Plan, sides: int) -> int:
    """Blocks of logits made at once, and the tensors of the chunks."""
    kind = "other" if plan.cuda else "cpu"
    block = HEAD_ROWS[kind] * plan.student.model.vocabulary * plan.forward.itemsize
    return WORK_BYTES[kind] + sides * block


def _beside(plan: Plan) -> list[Term]:
    terms = []
    if plan.rollout is not None and plan.cuda:
        share = int(plan.rollout.share * plan.device_bytes)
        terms.append(Term("vLLM's share", share, (ROLLOUT,) if plan.rollout.sleeps else PHASES))
        terms.append(Term("package of new weights", plan.rollout.bucket, (ROLLOUT,)))
    if plan.cuda:
        terms.append(Term("libraries (assumed)", LIBRARIES, PHASES, assumed=True))
    return terms
