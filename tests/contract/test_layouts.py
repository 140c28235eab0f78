"""Every model on every GPU layout, and every method, composes and passes the offline doctor."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from recipe import layouts
from recipe.compose import ROOT, choices, compose_config
from recipe.doctor import Examination
from recipe.findings import FAIL, OK, WARN
from recipe.memory import DEVICE_GIB, estimate_run, known_architectures, read_architecture
from verl_ext.architecture import elements
from verl_ext.memory_estimate import GIB

pytestmark = pytest.mark.contract

SMALL = "gpus4_small"
EXTERNAL = ["model=qwen3_1_7b", "distill.teacher.path=Qwen/Qwen3-8B"]
MODELS = {
    "paced_distill": EXTERNAL,
    "paced_two_stage": EXTERNAL,
    "paced_two_stage_reversed": EXTERNAL,
    "sd_zero": ["model=qwen3_4b_instruct"],
    "sd_zero_code": ["model=qwen3_4b_instruct"],
}


def failures(examination: Examination) -> list[str]:
    return [f"{found.name}: {found.line}" for found in examination.run() if found.status == FAIL]


@pytest.mark.parametrize("model", layouts.models())
def test_every_model_fits_every_layout_with_its_own_lengths(model: str) -> None:
    for layout in layouts.layouts():
        config = layouts.on_layout(model, layout)
        examination = Examination(config, offline=True)
        found = failures(examination)
        small = elements(read_architecture(str(config.actor_rollout_ref.model.path)).parameters()) < 5e9
        assert (not found) == (layout != SMALL or small), (layout, found)
        # The longest sequence is a micro-batch of its own, and the budget holds it.
        longest = config.data.max_prompt_length + config.data.max_response_length
        assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= longest
        memory = next(one for one in examination.findings if one.name == "memory")
        assert memory.status in (OK, WARN, FAIL), "the architecture is known"


def test_the_layouts_say_what_their_names_say() -> None:
    ranks = {name: layouts.on_layout("qwen3_1_7b", name).trainer for name in layouts.layouts()}
    assert {name: (found.nnodes, found.n_gpus_per_node) for name, found in ranks.items()} == {
        "gpus4": (1, 4), SMALL: (1, 4), "gpus8": (1, 8), "gpus2x8": (2, 8)
    }  # fmt: skip


@pytest.mark.parametrize("method", choices("method"))
def test_every_method_passes_on_eight_gpus(method: str) -> None:
    chosen = MODELS.get(method, ["model=qwen3_8b"])
    model = chosen[0].removeprefix("model=")
    overrides = [f"method={method}", *chosen, "hardware=gpu", "layout=gpus8", *layouts.model_lengths(model)]
    assert failures(Examination(compose_config(overrides), offline=True)) == []


@pytest.mark.parametrize("layout", layouts.layouts())
def test_laying_a_layout_over_is_what_composing_gives(layout: str) -> None:
    model = "qwen3_8b"
    overrides = [layouts.METHOD, f"model={model}", "hardware=gpu", f"layout={layout}", *layouts.model_lengths(model)]
    found, expected = layouts.on_layout(model, layout), compose_config(overrides)
    found.run.overrides = expected.run.overrides  # a record of the words, not a setting
    assert found == expected


def test_the_models_of_the_presets_are_in_the_table() -> None:
    paths = {layouts.on_layout(model, "gpus8").actor_rollout_ref.model.path for model in layouts.models()}
    assert paths <= set(known_architectures())


def test_the_table_of_the_docs_is_the_one_that_the_code_makes() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert layouts.markdown() in text, "python -m recipe.doctor --layouts prints the table of docs/clusters.md"


def test_the_adapter_s_shapes_are_peft_s() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    path = ROOT / "models" / "tiny_world" / "plain"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = sorted(tuple(parameter.shape) for parameter in adapted.parameters() if parameter.requires_grad)
    assert sorted(read_architecture(str(path)).adapter(4, targets).values()) == trained


NO_SYNC = "actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation"
ADAPTER = {
    "actor_rollout_ref.model.lora_rank": 64,
    "actor_rollout_ref.model.target_modules": "all-linear",
    "distill.teacher.kind": "frozen",
}


@pytest.mark.parametrize(
    ("changes", "less"),
    [
        (ADAPTER, True),
        ({"distill.teacher.offload": True}, True),
        ({"distill.divergence.inputs": "logits"}, False),
        ({NO_SYNC: True}, False),
        ({"actor_rollout_ref.actor.fsdp_config.offload_policy": True}, True),
    ],
)
def test_what_a_key_changes_in_the_update(changes: dict[str, Any], less: bool) -> None:
    config, size = layouts.on_layout("qwen3_8b", "gpus8"), int(DEVICE_GIB * GIB)
    before = estimate_run(config, size).phase("update")
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    after = estimate_run(config, size).phase("update")
    assert after != before and (after < before) == less
