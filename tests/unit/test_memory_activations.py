"""What a forward pass keeps, measured by hooks on saved tensors, against the formulas; and what the losses keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from verl_ext.architecture import architecture
from verl_ext.chunks import Head, Logits, OnSupport
from verl_ext.memory_activations import Forward, kept_bytes, layer_bytes, outside_bytes, rerun_bytes
from verl_ext.memory_estimate import LossSettings, logits_bytes, saved_per_position, state_per_position
from verl_ext.token_losses import Measure, token_losses

TOKENS = 128
WITHIN = 0.1
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def numbers(family: str, layers: int) -> dict[str, Any]:
    found = {
        "model_type": family,
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return found | ({"head_dim": 32} if family == "qwen3" else {})


class Held:
    """A saved tensor, held by the graph alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved(run: Callable[[], Any], others: set[int]) -> tuple[Any, int]:
    """What a call returns, and the bytes of the storages that its graph still keeps, each once.

    ``others``: addresses of storages that do not count (weights, inputs).
    """
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Held:
        one = Held(tensor)
        held.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        result = run()
    sizes = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in held}
    return result, sum(size for address, size in sizes.items() if address not in others)


def measured(family: str, layers: int, dtype: torch.dtype, *, checkpointing: bool = False, padded: bool = False) -> int:
    """Of the decoder on one row of TOKENS tokens."""
    given = numbers(family, layers)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inputs: dict[str, Any] = {"input_ids": torch.randint(64, (1, TOKENS))}
    if padded:
        inputs["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.int64).index_fill(1, torch.tensor([TOKENS - 1]), 0)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
        # The head or the loss keeps it.
        return hidden * torch.ones_like(hidden).requires_grad_()

    _, size = saved(run, weights)
    # The last line keeps both of its sides; the ones are the test's own.
    return size - TOKENS * 64 * dtype.itemsize


def forward(dtype: torch.dtype, *, checkpointing: bool = False, padded: bool = False) -> Forward:
    return Forward(dtype.itemsize, checkpointing, TOKENS if padded else 0)


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "olmo3"])
def test_a_layer_and_the_rest_keep_what_the_formulas_say(family: str, dtype: torch.dtype) -> None:
    one, three = measured(family, 1, dtype), measured(family, 3, dtype)
    model = architecture(numbers(family, 3))
    layer = (three - one) / 2 / TOKENS
    assert layer_bytes(model, forward(dtype)) == pytest.approx(layer, rel=1e-6)
    assert outside_bytes(model, forward(dtype)) == pytest.approx(one / TOKENS - layer, rel=WITHIN)
    assert TOKENS * kept_bytes(model, forward(dtype)) == pytest.approx(three, rel=WITHIN)


@pytest.mark.parametrize("family", ["qwen3", "llama", "olmo3"])
def test_padded_rows_keep_repeated_keys_and_a_mask(family: str) -> None:
    model, settings = architecture(numbers(family, 3)), forward(torch.float32, padded=True)
    found = measured(family, 3, torch.float32, padded=True)
    assert TOKENS * kept_bytes(model, settings) == pytest.approx(found, rel=WITHIN)
    assert kept_bytes(model, settings) > kept_bytes(model, forward(torch.float32))


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
def test_with_checkpointing_a_layer_keeps_its_input(family: str, dtype: torch.dtype) -> None:
    settings = forward(dtype, checkpointing=True)
    model = architecture(numbers(family, 4))
    # The rotation is an argument of every layer: checkpointing holds it without saving it.
    rotation = TOKENS * 2 * dtype.itemsize * model.head_dim
    found = measured(family, 4, dtype, checkpointing=True) + rotation
    assert TOKENS * kept_bytes(model, settings) == pytest.approx(found, rel=WITHIN)
    assert rerun_bytes(model, settings) == layer_bytes(model, forward(dtype))
    assert rerun_bytes(model, forward(dtype)) == 0


# ------------------------------------------------------------------------------------------------------------ losses

VOCABULARY, WIDTH, ROWS = 512, 32, 64


def head(seed: int, dtype: torch.dtype = torch.float32) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return Head(
        torch.randn(ROWS, WIDTH, generator=generator).to(dtype), torch.randn(VOCABULARY, WIDTH, generator=generator)
    )


def kept_by_the_loss(source: torch.Tensor, weight: torch.Tensor | None, teacher: Any, measure: Measure) -> int:
    """Bytes that the loss keeps beside its inputs: saved tensors, and what its own context holds."""
    given = [source, *([] if weight is None else [weight])]
    inputs = {tensor.untyped_storage().data_ptr() for tensor in given}
    values, size = saved(
        lambda: token_losses(source, weight, measure=measure, teacher=teacher, temperature=1.3), inputs
    )
    task = values.divergence.grad_fn.task
    own = [task.kept_ids, task.kept_slopes, task.kept_entropy]
    return size + sum(tensor.untyped_storage().nbytes() for tensor in own if tensor is not None)


@pytest.mark.parametrize("inputs", ["logits", "hidden_states"])
@pytest.mark.parametrize(
    ("kind", "support", "topk"),
    [("jsd", "student_topk", 20), ("forward_kl", "teacher_topk", 8), ("reverse_kl", "full", 0), ("jsd", "full", 0)],
)
def test_the_divergence_keeps_ids_and_slopes_on_a_support_and_nothing_on_the_vocabulary(
    inputs: str, kind: str, support: str, topk: int
) -> None:
    student, teacher = head(0), head(1)
    source = student.hidden if inputs == "hidden_states" else student.hidden @ student.weight.t()
    weight = student.weight.clone().requires_grad_() if inputs == "hidden_states" else None
    found = kept_by_the_loss(
        source.requires_grad_(), weight, teacher, Measure(kind, support=support, topk=topk, tail=support != "full")
    )
    settings = LossSettings(True, full=support == "full", topk=topk, inputs=inputs, teacher_states="hidden_states")
    assert found == ROWS * saved_per_position(settings)


def test_a_teacher_known_on_a_support_keeps_as_much() -> None:
    student = (head(0).hidden @ head(0).weight.t()).requires_grad_()
    ids = torch.arange(5, dtype=torch.int32).repeat(ROWS, 1)
    log_probs = torch.full((ROWS, 5), -3.0)
    found = kept_by_the_loss(student, None, OnSupport(ids, log_probs), Measure("jsd"))
    settings = LossSettings(True, topk=5)
    # The ids may be the teacher's own tensor; the estimate counts them as the loss's.
    assert found == ROWS * saved_per_position(settings)
    assert ids.nbytes + log_probs.nbytes + 2 * 4 * ROWS == ROWS * state_per_position(settings, WIDTH, 4)


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_logits_are_kept_once_and_their_gradient_is_as_large(dtype: torch.dtype) -> None:
    logits = (head(0).hidden @ head(0).weight.t()).to(dtype).requires_grad_()
    values = token_losses(
        logits, measure=Measure("jsd", support="student_topk", topk=4), teacher=Logits(logits.detach())
    )
    values.divergence.sum().backward()
    settings = LossSettings(True, topk=4)
    kept, gradient = logits_bytes(settings, VOCABULARY, dtype.itemsize)
    assert (kept * ROWS, gradient * ROWS) == (logits.nbytes, logits.grad.nbytes)
    assert logits_bytes(LossSettings(True, topk=4, scaled=True), VOCABULARY, 2)[0] == 2 * 2 * VOCABULARY
    assert logits_bytes(LossSettings(True, topk=4, inputs="hidden_states"), VOCABULARY, 2) == (0, 0)
