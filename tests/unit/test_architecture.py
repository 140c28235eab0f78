"""Parameters by name and shape against the models that transformers builds, and against published totals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recipe.memory import known_architectures, read_architecture
from verl_ext.architecture import FAMILIES, Architecture, UnknownArchitecture, architecture, elements

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def built(numbers: dict[str, Any]) -> torch.nn.Module:
    """transformers' model of these numbers, without memory for its weights."""
    numbers = dict(numbers)
    config = AutoConfig.for_model(numbers.pop("model_type"), **numbers)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_real_model(family: str, tied: bool) -> None:
    numbers = {**SHAPE, "model_type": family, "tie_word_embeddings": tied}
    if family == "qwen3":
        numbers["head_dim"] = 10
    model = built(numbers)
    assert architecture(numbers).parameters() == shapes(model)
    assert architecture(model.config.to_dict()).parameters() == shapes(model), "from a whole config.json too"


@pytest.mark.parametrize(
    ("family", "flags"),
    [("llama", {"mlp_bias": True}), ("llama", {"attention_bias": True}), ("qwen3", {"attention_bias": True})],
)
def test_biases(family: str, flags: dict[str, bool]) -> None:
    numbers = {**SHAPE, "model_type": family, "tie_word_embeddings": False, **flags}
    assert architecture(numbers).parameters() == shapes(built(numbers))


@pytest.mark.parametrize("name", known_architectures())
def test_the_table_gives_the_parameters_of_transformers_own_model(name: str) -> None:
    assert read_architecture(name).parameters() == shapes(built(known_architectures()[name]))


# From the publishers' model cards, in units of 1e9.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": 0.6, "Qwen/Qwen3-1.7B": 1.7, "Qwen/Qwen3-4B": 4.0, "Qwen/Qwen3-4B-Instruct-2507": 4.0,
    "Qwen/Qwen3-8B": 8.2, "Qwen/Qwen2.5-7B-Instruct": 7.61, "Qwen/Qwen2.5-Math-7B-Instruct": 7.61,
    "allenai/Olmo-3-7B-Instruct": 7.3, "allenai/Olmo-3-1025-7B": 7.3, "meta-llama/Llama-3.1-8B-Instruct": 8.03,
}  # fmt: skip


def test_the_table_s_totals_are_the_published_ones() -> None:
    assert set(PUBLISHED) == set(known_architectures())
    for name, billions in PUBLISHED.items():
        assert elements(read_architecture(name).parameters()) / 1e9 == pytest.approx(billions, abs=0.05), name


def test_an_adapter_has_two_matrices_for_every_target() -> None:
    ours = architecture({**SHAPE, "model_type": "llama"})
    assert ours.adapter(4, ["k_proj"])["layers.1.k_proj.lora_A"] == (4, 24)
    assert ours.adapter(4, ["k_proj"])["layers.1.k_proj.lora_B"] == (12, 4)
    assert len(ours.adapter(4, "all-linear")) == 2 * 7 * ours.layers
    assert ours.adapter(4, ["model.layers.0.q_proj"]).keys() == ours.adapter(4, "q_proj").keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": "96"}, "vocab_size is '96'"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
    ],
)
def test_a_bad_number_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownArchitecture, match=message):
        architecture({**SHAPE, "model_type": "llama", **change})


def test_an_unknown_model_and_an_unknown_target_are_named(tmp_path) -> None:
    with pytest.raises(UnknownArchitecture, match="some/model is no folder"):
        read_architecture("some/model")
    with pytest.raises(UnknownArchitecture, match="wq"):
        architecture({**SHAPE, "model_type": "llama"}).adapter(4, ["wq"])


def test_a_missing_head_dimension_and_missing_groups_follow_from_the_heads() -> None:
    numbers = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    found = architecture({**numbers, "model_type": "llama"})
    assert (found.groups, found.head_dim) == (4, 6) and isinstance(found, Architecture)
