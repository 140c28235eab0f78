"""A decoder's parameters by name and shape, from the numbers of its ``config.json``: no weights, no transformers.

Families: Qwen3 (norms on every head's query and key), Qwen2 and Qwen2.5 (biases on query, key and value), Llama, OLMo-2
and OLMo-3 (norms on the whole query and key, and behind the sublayers instead of before). Names are those of
transformers' classes; a test holds the shapes to the models that transformers builds.

Letters: D hidden size, I intermediate size, H heads, G key-value heads, d head dimension, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

Shape = tuple[int, ...]

FAMILIES = ("qwen3", "qwen2", "llama", "olmo2", "olmo3")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class UnknownArchitecture(ValueError):
    """The numbers are missing, or of a family that is not known here."""


@dataclass(frozen=True)
class Architecture:
    """The numbers that decide shapes.

    Attributes:
        family: ``model_type`` of the configuration.
        heads, groups: query heads and key-value heads.
        qkv_bias: biases on query, key and value. output_bias: one on the attention's output. mlp_bias: on the three
            matrices of the MLP.
        tied: head and embedding are one tensor.
        positions: longest sequence.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    tied: bool
    positions: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def query(self) -> int:
        """Width of the query and of the attention's output, H d."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of the key, and of the value, G d."""
        return self.groups * self.head_dim

    @property
    def norms_after(self) -> bool:
        """Whether a layer's norms stand behind its sublayers (OLMo)."""
        return self.family in ("olmo2", "olmo3")

    def linear(self) -> dict[str, Shape]:
        """The matrices of one layer by their last name, [out, in]."""
        width = {"q_proj": self.query, "k_proj": self.key, "v_proj": self.key}
        shapes: dict[str, Shape] = {name: (out, self.hidden) for name, out in width.items()}
        shapes["o_proj"] = (self.hidden, self.query)
        shapes["gate_proj"] = shapes["up_proj"] = (self.intermediate, self.hidden)
        shapes["down_proj"] = (self.hidden, self.intermediate)
        return shapes

    def layer(self) -> dict[str, Shape]:
        """Every parameter of one layer, names below ``model.layers.N``."""
        found: dict[str, Shape] = {}
        for name, shape in self.linear().items():
            attention = name in ("q_proj", "k_proj", "v_proj", "o_proj")
            full = f"{'self_attn' if attention else 'mlp'}.{name}"
            found[f"{full}.weight"] = shape
            biased = self.mlp_bias if not attention else self.output_bias if name == "o_proj" else self.qkv_bias
            if biased:
                found[f"{full}.bias"] = shape[:1]
        if self.family == "qwen3":
            found |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        if self.norms_after:
            found |= {"self_attn.q_norm.weight": (self.query,), "self_attn.k_norm.weight": (self.key,)}
            found["post_feedforward_layernorm.weight"] = (self.hidden,)
        else:
            found["input_layernorm.weight"] = (self.hidden,)
        found["post_attention_layernorm.weight"] = (self.hidden,)
        return found

    def outside(self) -> dict[str, Shape]:
        """Every parameter that belongs to no layer: embedding, last norm and, where it is one of its own, the head."""
        found: dict[str, Shape] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def parameters(self) -> dict[str, Shape]:
        """Every parameter of the model by its name; a tied head is not named twice."""
        layer = self.layer()
        inner = {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        return self.outside() | inner

    def adapter(self, rank: int, targets: str | Sequence[str]) -> dict[str, Shape]:
        """LoRA's matrices A [rank, in] and B [out, rank] of every layer.

        Args:
            targets: last names of matrices, or ``all-linear``.

        Raises:
            UnknownArchitecture: a target that is no matrix of a layer (a regular expression, say).
        """
        names = LINEAR if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
        shapes, found = self.linear(), {}
        for name in names:
            last = name.rsplit(".", 1)[-1]
            if last not in shapes:
                raise UnknownArchitecture(f"target {name!r} is none of {', '.join(LINEAR)}")
            out, inner = shapes[last]
            for i in range(self.layers):
                found[f"layers.{i}.{last}.lora_A"] = (rank, inner)
                found[f"layers.{i}.{last}.lora_B"] = (out, rank)
        return found


def elements(shapes: Mapping[str, Shape]) -> int:
    """Numbers in all of them."""
    return sum(prod(shape) for shape in shapes.values())


def architecture(config: Mapping[str, Any]) -> Architecture:
    """From the content of a ``config.json``.

    Raises:
        UnknownArchitecture: another family, or a number that is missing.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise UnknownArchitecture(f"model_type is {family!r}; known: {', '.join(FAMILIES)}")

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnknownArchitecture(f"{key} is {value!r}; expected a whole number from 1")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        family=family,
        hidden=hidden,
        intermediate=number("intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        groups=number("num_key_value_heads", heads),
        # Qwen3Config has a default of its own.
        head_dim=number("head_dim", 128 if family == "qwen3" else hidden // heads),
        vocabulary=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        positions=number("max_position_embeddings"),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
    )
