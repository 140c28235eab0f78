"""Bytes that a forward pass keeps for its backward pass, per token, term by term from the modules of transformers 5.

A tensor counts once however many operations keep it; weights do not count. ``tests/unit/test_memory_activations.py``
measures the same by hooks on saved tensors. Letters as in :mod:`verl_ext.architecture`; e bytes of the compute type.

What a layer keeps:

* a norm over w numbers: its input in float32, its inverse deviation, the normalised values, and its output where that
  is read again. Qwen and Llama normalise in float32 and multiply in e, OLMo does both in float32;
* attention: query, key, value, output, and the log of the sum of each head (4 bytes);
* the MLP: gate, SiLU(gate), up and their product;
* the inputs of its first matrices, where no norm stands before them (OLMo).
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_ext.architecture import Architecture

FLOAT = 4
"""Bytes of float32, in which norms and losses work."""


@dataclass(frozen=True)
class Forward:
    """How a model runs.

    Attributes:
        itemsize: e, of autocast's type, or of the weights without autocast.
        checkpointing: a layer keeps its input only and runs again in the backward pass.
        padded_length: T where rows are padded and torch's ``sdpa`` gets a mask: it repeats key and value for every
            head and keeps a mask [T, T] a row. 0: packed rows through flash-attention, or no mask.
    """

    itemsize: int
    checkpointing: bool
    padded_length: int = 0


def layer_bytes(model: Architecture, forward: Forward) -> int:
    """Of one layer that keeps everything, per token."""
    e, repeated = forward.itemsize, forward.padded_length > 0
    key = model.query if repeated else model.key
    attention = e * (2 * model.query + 2 * key) + FLOAT * model.heads + e * forward.padded_length
    mlp = 4 * e * model.intermediate
    if model.norms_after:
        # The outputs of its norms go into a sum; the inputs of its matrices are the sums.
        norms = 2 * _norm(model.hidden, 1, FLOAT) + 2 * e * model.hidden
        norms += _norm(model.query, 1, FLOAT) + _norm(model.key, 1, FLOAT)
    else:
        norms = 2 * (_norm(model.hidden, 1, e) + e * model.hidden)
        if model.family == "qwen3":
            norms += _norm(model.query, model.heads, e) + _norm(model.key, model.groups, e)
    return attention + mlp + norms


def outside_bytes(model: Architecture, forward: Forward) -> int:
    """Of what belongs to no layer, per token: the last norm, its output (which the head or the loss reads), ids and the
    rotation of a head."""
    e = forward.itemsize
    return _norm(model.hidden, 1, FLOAT if model.norms_after else e) + e * model.hidden + 8 + 2 * e * model.head_dim


def kept_bytes(model: Architecture, forward: Forward) -> int:
    """Of the whole model at the end of its forward pass, per token; without logits."""
    layer = forward.itemsize * model.hidden if forward.checkpointing else layer_bytes(model, forward)
    return model.layers * layer + outside_bytes(model, forward)


def rerun_bytes(model: Architecture, forward: Forward) -> int:
    """Of the one layer that runs again in the backward pass, per token; 0 without checkpointing."""
    return layer_bytes(model, forward) if forward.checkpointing else 0


def passing_bytes(model: Architecture, forward: Forward) -> int:
    """Working tensors of one layer that no later pass reads, per token: an estimate, not measured.

    In the backward pass the gradients of gate, up and their product, and of the hidden states beside the residual.
    """
    return forward.itemsize * (3 * model.intermediate + 2 * model.hidden)


def _norm(width: int, groups: int, normalised: int) -> int:
    return FLOAT * width + FLOAT * groups + normalised * width
