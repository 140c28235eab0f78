"""A configuration as the plan of one rank, and its memory: `verl_ext.memory_estimate` for the keys of this project."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from verl_ext.adapter import has_own_weights, uses_adapter
from verl_ext.architecture import Architecture, UnknownArchitecture, architecture, elements
from verl_ext.config import ConfigError, DistillConfig, distill_config
from verl_ext.memory_activations import FLOAT, Forward
from verl_ext.memory_estimate import Copy, Estimate, LossSettings, Plan, Rollout, estimate
from verl_ext.stages import stages

TABLE = Path(__file__).with_name("architectures.yaml")
ITEMSIZES = {"fp32": 4, "float32": 4, "float": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "half": 2}
DEVICE_GIB = 79.0
"""Of a GPU sold with 80 GB: drivers of A100 and H100 report a little more."""


@cache
def known_architectures() -> dict[str, dict[str, Any]]:
    """The numbers of the models that presets name, by hub name."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def read_architecture(path: str) -> Architecture:
    """Of a folder with a ``config.json``, or of a hub name in the table.

    Raises:
        UnknownArchitecture: neither, or a family that is not known.
    """
    file = Path(path).expanduser() / "config.json"
    if file.exists():
        return architecture(json.loads(file.read_text(encoding="utf-8")))
    if path not in known_architectures():
        raise UnknownArchitecture(f"{path} is no folder with a config.json and not in {TABLE.name}")
    return architecture(known_architectures()[path])


def estimate_run(config: DictConfig, device_bytes: int) -> Estimate:
    """The estimate of the stage that needs most.

    Args:
        device_bytes: memory of one device; of the host for a run without an accelerator.

    Raises:
        UnknownArchitecture: of the student's or the teacher's model.
        ConfigError: a precision that is not known.
    """
    found = [estimate(plan_of(config, stage, device_bytes)) for stage in stages(distill_config(config.distill))]
    return max(found, key=lambda one: one.peak[1])


def plan_of(config: DictConfig, stage: DistillConfig, device_bytes: int) -> Plan:
    """One rank's work in one stage. Raises as :func:`estimate_run`."""
    block = config.actor_rollout_ref
    model, actor, engine = block.model, block.actor, block.actor.fsdp_config
    student = read_architecture(str(model.path))
    compute = _precision(engine.get("mixed_precision") or {}, "param_dtype", "bf16")
    world = config.trainer.n_gpus_per_node * config.trainer.nnodes
    parallel = int(actor.get("ulysses_sequence_parallel_size") or 1)
    longest = config.data.max_prompt_length + config.data.max_response_length
    rows = ceil(actor.ppo_mini_batch_size * block.rollout.n * parallel / world)
    budget = _budget(actor.ppo_max_token_len_per_gpu, longest, parallel)
    student_tokens = min(budget, ceil(rows * longest / parallel))
    taught_rows = ceil(config.data.train_batch_size * block.rollout.n * parallel / world)
    prompt = 0 if not stage.enabled else stage.context.max_length or config.data.max_prompt_length
    prompt = config.data.max_prompt_length if stage.enabled and stage.context.kind == "none" else prompt
    teacher_longest = prompt + config.data.max_response_length
    teacher_budget = _budget(block.ref.log_prob_max_token_len_per_gpu, teacher_longest, parallel)
    teacher_tokens = min(teacher_budget, ceil(taught_rows * teacher_longest / parallel))
    teacher, teacher_model = _teacher(config, stage, student)
    return Plan(
        student=Copy(
            student,
            _itemsize(str(engine.model_dtype), "actor_rollout_ref.actor.fsdp_config.model_dtype"),
            offloaded=bool(engine.param_offload),
            streamed=bool(engine.offload_policy) and actor.strategy == "fsdp2",
        ),
        teacher=teacher,
        teacher_model=teacher_model,
        forward=Forward(compute, bool(model.enable_gradient_checkpointing), _masked(config, longest, student_tokens)),
        loss=_loss(config, stage),
        ranks=_sharding(int(engine.fsdp_size), world),
        student_tokens=student_tokens,
        teacher_tokens=teacher_tokens,
        taught_tokens=ceil(taught_rows * config.data.max_response_length / parallel) if stage.enabled else 0,
        rollout=_rollout(config, longest),
        device_bytes=device_bytes,
        optimizer_offload=bool(engine.optimizer_offload),
        states_offloaded=bool(stage.teacher.offload),
        compute=compute,
        reduce=_precision(engine.get("mixed_precision") or {}, "reduce_dtype", "fp32"),
        accumulate=bool(engine.get("use_no_sync_for_gradient_accumulation", False)),
        micro_batches=ceil(rows * longest / parallel / budget),
        adapter=_adapter(model, student),
        cuda=config.run.platform != "cpu",
    )


def checkpoint_bytes(config: DictConfig) -> int:
    """One checkpoint of all ranks together: verl's shards of weights and moments, and the teacher's where it moves.

    Raises:
        UnknownArchitecture: of the student's model.
    """
    block = config.actor_rollout_ref
    student = read_architecture(str(block.model.path))
    contents = list(block.actor.checkpoint.save_contents)
    weights = elements(student.parameters())
    adapter = _adapter(block.model, student)
    trained = weights if adapter is None else elements(adapter)
    stored = weights + (0 if adapter is None else trained)
    itemsize = _itemsize(str(block.actor.fsdp_config.model_dtype), "actor_rollout_ref.actor.fsdp_config.model_dtype")
    total = 0
    total += itemsize * stored if "model" in contents else 0
    total += 2 * itemsize * trained if "optimizer" in contents else 0
    # verl's export is in bf16 (FSDPCheckpointManager: the model's own type where it is built anew).
    total += itemsize * weights if "hf_model" in contents else 0
    distill = distill_config(config.distill)
    if has_own_weights(distill, block.model) and distill.teacher.moves:
        total += FLOAT * weights
    return total


# ------------------------------------------------------------------------------------------------------------- parts


def _teacher(
    config: DictConfig, stage: DistillConfig, student: Architecture
) -> tuple[Copy | None, Architecture | None]:
    """The copy beside the student, and the model of the teacher pass on these devices."""
    block = config.actor_rollout_ref
    if not stage.enabled:
        if not (block.actor.use_kl_loss or config.algorithm.use_kl_in_reward):
            return None, None
        if uses_adapter(block.model):
            return None, student
        # verl streams its reference policy from host memory.
        return Copy(student, _ref_itemsize(config), offloaded=True, streamed=True), student
    if not stage.teacher.beside:
        return None, None
    external = stage.teacher.kind == "external"
    model = read_architecture(str(stage.teacher.path)) if external else student
    if not has_own_weights(stage, block.model):
        return None, model
    return Copy(model, _ref_itemsize(config), offloaded=bool(stage.teacher.offload)), model


def _loss(config: DictConfig, stage: DistillConfig) -> LossSettings:
    actor = config.actor_rollout_ref.actor
    scaled = float(config.actor_rollout_ref.rollout.temperature) != 1.0
    policy = stage.policy_gradient or stage.pairs or actor.use_kl_loss or actor.entropy_coeff != 0.0
    policy = bool(policy or actor.calculate_entropy)
    if not stage.enabled:
        return LossSettings(False, policy_gradient=True, scaled=scaled)
    full = not stage.one_token and stage.divergence.support == "full"
    return LossSettings(
        divergence=stage.divergence_loss,
        full=full,
        topk=0 if full or stage.one_token else stage.divergence.topk,
        inputs=stage.student_inputs if stage.divergence_loss else "logits",
        teacher_states=stage.teacher_states,
        policy_gradient=policy,
        scaled=scaled,
        parts=2 if stage.teacher.kind == "trust_region" else 1,
    )


def _rollout(config: DictConfig, longest: int) -> Rollout:
    rollout = config.actor_rollout_ref.rollout
    return Rollout(
        share=float(rollout.gpu_memory_utilization),
        itemsize=_itemsize(str(rollout.dtype), "actor_rollout_ref.rollout.dtype"),
        parallel=int(rollout.tensor_model_parallel_size),
        sleeps=bool(rollout.free_cache_engine),
        length=int(rollout.max_model_len or longest),
        bucket=int(rollout.checkpoint_engine.update_weights_bucket_megabytes) << 20,
    )


def _adapter(model: Mapping[str, Any], student: Architecture) -> dict[str, tuple[int, ...]] | None:
    if not uses_adapter(model):
        return None
    targets = model["target_modules"]
    return student.adapter(int(model["lora_rank"]), targets if isinstance(targets, str) else list(targets))


def _budget(tokens: int | None, longest: int, parallel: int) -> int:
    """Tokens of a rank's largest micro-batch: the budget, or one row where that is longer."""
    return max(int(tokens or 0), ceil(longest / parallel))


def _masked(config: DictConfig, longest: int, tokens: int) -> int:
    """Edge of the mask that torch's attention gets: a row's where rows are padded, the pack's where they are not."""
    model = config.actor_rollout_ref.model
    if not model.use_remove_padding:
        return longest
    return 0 if model.override_config.get("attn_implementation") == "flash_attention_2" else tokens


def _sharding(size: int, world: int) -> int:
    return world if size < 1 or size > world else size


def _ref_itemsize(config: DictConfig) -> int:
    return _itemsize(
        str(config.actor_rollout_ref.ref.fsdp_config.model_dtype), "actor_rollout_ref.ref.fsdp_config.model_dtype"
    )


def _precision(values: Mapping[str, Any], key: str, default: str) -> int:
    return _itemsize(str(values.get(key) or default), f"actor_rollout_ref.actor.fsdp_config.mixed_precision.{key}")


def _itemsize(name: str, key: str) -> int:
    name = name.removeprefix("torch.")
    if name not in ITEMSIZES:
        raise ConfigError(f"{key} is {name!r}; allowed: {', '.join(ITEMSIZES)}")
    return ITEMSIZES[name]
