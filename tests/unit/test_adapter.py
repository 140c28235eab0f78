"""LoRA's keys: what fits the teacher, the model and the servers, and what is refused before anything starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from recipe.adapter_checks import check_targets
from recipe.compose import check, compose_config
from verl_ext.adapter import check_adapter_off_sampling, has_own_weights, is_adapter_off, uses_adapter
from verl_ext.config import ConfigError, distill_config

MODEL = "actor_rollout_ref.model"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def lora() -> DictConfig:
    return compose_config(["adapter=lora", "teacher=frozen"])


def changed(config: DictConfig, changes: dict[str, Any]) -> DictConfig:
    config = copy.deepcopy(config)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return config


def refused(action: Any, config: DictConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        action(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_preset_is_that_of_pbsd_and_opsd_and_the_default_is_none(lora):
    model = lora.actor_rollout_ref.model
    assert (model.lora_rank, model.lora_alpha, list(model.target_modules)) == (64, 128, SEVEN)
    assert lora.actor_rollout_ref.rollout.load_format == "safetensors"
    plain = compose_config([])
    assert not uses_adapter(plain.actor_rollout_ref.model)
    assert plain.actor_rollout_ref.rollout.load_format != "safetensors"


@pytest.mark.parametrize(
    ("kind", "own_with", "own_without"),
    [("frozen", False, True), ("live", False, False), ("external", True, True), ("ema", True, True)],
)
def test_only_the_frozen_teacher_loses_its_copy(lora, kind, own_with, own_without):
    distill = distill_config({"teacher": {"kind": kind, "path": "x" if kind == "external" else None}})
    model = lora.actor_rollout_ref.model
    assert has_own_weights(distill, model) is own_with
    assert has_own_weights(distill, OmegaConf.merge(model, {"lora_rank": 0})) is own_without
    assert is_adapter_off(distill, model) is (kind == "frozen")
    off = distill_config({"teacher": {"kind": "frozen"}, "coefficient": 0.0})
    assert not is_adapter_off(off, model) and not has_own_weights(off, model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"distill.teacher.kind": "ema"}, ["distill.teacher.kind is 'ema'", f"{MODEL}.lora_rank", "frozen", "live"]),
        ({"distill.teacher.kind": "synced"}, ["distill.teacher.kind is 'synced'", "external"]),
        ({"distill.teacher.kind": "trust_region"}, ["distill.teacher.kind is 'trust_region'"]),
        ({f"{MODEL}.lora_rank": -1}, [f"{MODEL}.lora_rank is -1", "from 1"]),
        ({f"{MODEL}.lora_rank": 2.5}, [f"{MODEL}.lora_rank is 2.5"]),
        ({f"{MODEL}.lora_alpha": 0}, [f"{MODEL}.lora_alpha is 0", "above 0"]),
        ({f"{MODEL}.target_modules": []}, [f"{MODEL}.target_modules is empty"]),
        ({f"{MODEL}.lora.rank": 8}, [f"{MODEL}.lora.rank is 8", f"{MODEL}.lora_rank"]),
        ({f"{MODEL}.lora_rank": 0, f"{MODEL}.lora_adapter_path": "a"}, [f"{MODEL}.lora_adapter_path=a"]),
        ({f"{MODEL}.lora_adapter_path": "a"}, [f"{MODEL}.lora_adapter_path is a", "distill.teacher.kind=frozen"]),
        ({"actor_rollout_ref.actor.checkpoint.save_contents": ["model", "hf_model"]}, ["save_contents has hf_model"]),
        ({"chain.stages": ["distil"]}, ["chain.stages is ['distil']"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_lora_does_not_go_with_is_refused(lora, changes, expected):
    message = refused(check, changed(lora, changes))
    assert [part for part in expected if part not in message] == []


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_a_kl_term_finds_its_reference_without_the_adapter(lora, kind):
    check(changed(lora, {"actor_rollout_ref.actor.use_kl_loss": True, "distill.teacher.kind": kind}))


def test_a_starting_adapter_is_allowed_where_no_teacher_is_taken_for_the_model_without_it(lora):
    check(changed(lora, {f"{MODEL}.lora_adapter_path": "a", "distill.teacher.kind": "live"}))


# ------------------------------------------------------------------------------------------------------------- targets


def test_the_seven_projections_are_in_the_tiny_model(lora):
    check_targets(lora)
    check_targets(changed(lora, {f"{MODEL}.target_modules": "all-linear"}))
    check_targets(changed(lora, {f"{MODEL}.target_modules": r".*\.(q|v)_proj"}))


@pytest.mark.parametrize(
    ("targets", "named"),
    [(["q_proj", "qkv_proj"], "'qkv_proj'"), ("c_attn", "'c_attn'"), (["proj"], "'proj'")],
)
def test_a_target_that_names_no_linear_module_is_refused_beside_the_names_there_are(lora, targets, named):
    message = refused(check_targets, changed(lora, {f"{MODEL}.target_modules": targets}))
    assert named in message and all(name in message for name in SEVEN)
    assert "lm_head" not in message


def test_the_head_is_no_target(lora):
    message = refused(check_targets, changed(lora, {f"{MODEL}.target_modules": ["q_proj", "lm_head"]}))
    assert "'lm_head'" in message and "head" in message


def test_a_rank_above_the_matrix_or_above_what_is_served_is_refused(lora):
    # k_proj of the tiny model: 128 inputs, 2 heads of 32.
    check_targets(changed(lora, {f"{MODEL}.lora_rank": 64}))
    message = refused(check_targets, changed(lora, {f"{MODEL}.lora_rank": 65}))
    assert f"{MODEL}.lora_rank is 65" in message and "up to 64" in message and "k_proj" in message
    assert "up to 512" in refused(check_targets, changed(lora, {f"{MODEL}.lora_rank": 1024}))


def test_full_fine_tuning_asks_nothing_of_the_targets(lora):
    check_targets(changed(lora, {f"{MODEL}.lora_rank": 0, f"{MODEL}.target_modules": ["nothing"]}))


# ------------------------------------------------------------------------------------------------------------ sampling


def test_sampling_without_the_adapter_needs_one_that_is_not_merged(lora):
    check_adapter_off_sampling(lora)
    assert "lora.merge is true" in refused(check_adapter_off_sampling, changed(lora, {f"{MODEL}.lora.merge": True}))
    assert "lora_rank is 0" in refused(check_adapter_off_sampling, compose_config([]))
    other = changed(lora, {"actor_rollout_ref.rollout.name": "sglang"})
    assert "'sglang'" in refused(check_adapter_off_sampling, other)
