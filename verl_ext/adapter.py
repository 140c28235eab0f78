"""LoRA: the base weights stand still, so the student with its adapter switched off is the frozen teacher.

``actor_rollout_ref.model.lora_rank`` is verl's key; what follows from it for the ``distill`` block is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from verl_ext.config import DistillConfig
from verl_ext.config_values import ConfigError
from verl_ext.stages import stages

MODEL = "actor_rollout_ref.model"
ADAPTER_OFF = "adapter off"
"""What :meth:`verl_ext.worker.DistillWorker.describe` says of such a teacher."""
ADAPTER = "adapter"
"""Key of a request's sampling parameters: false samples from the base weights (:mod:`verl_ext.adapter_sampling`)."""


def uses_adapter(model: Mapping[str, Any]) -> bool:
    """Whether the block ``actor_rollout_ref.model`` asks for LoRA."""
    return int(model.get("lora_rank") or 0) > 0


def adapter_is_merged(model: Mapping[str, Any]) -> bool:
    """Whether the rollout servers get whole merged weights instead of the adapter."""
    return bool((model.get("lora") or {}).get("merge", False))


def is_adapter_off(distill: DistillConfig, model: Mapping[str, Any]) -> bool:
    """Whether the teacher is the student with its adapter switched off."""
    return distill.enabled and distill.teacher.kind == "frozen" and uses_adapter(model)


def has_own_weights(distill: DistillConfig, model: Mapping[str, Any]) -> bool:
    """Whether a second copy of the model stands in the reference policy's place."""
    return distill.enabled and distill.teacher.has_own_weights and not is_adapter_off(distill, model)


def check_adapter(config: Any, distill: DistillConfig) -> None:
    """Raises ConfigError where the model's LoRA keys do not fit each other or the teacher."""
    model = config.actor_rollout_ref.model
    rank, path = model.get("lora_rank") or 0, model.get("lora_adapter_path")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ConfigError(f"{MODEL}.lora_rank is {rank!r}; allowed: a whole number from 1, or 0 (no adapter)")
    if (model.get("lora") or {}).get("rank", 0):
        raise ConfigError(
            f"{MODEL}.lora.rank is {model.lora.rank}; allowed: 0 (Megatron's; FSDP's is {MODEL}.lora_rank)"
        )
    if rank == 0:
        if path is not None:
            raise ConfigError(
                f"{MODEL}.lora_rank is 0 with {MODEL}.lora_adapter_path={path}; allowed: that adapter's rank, else "
                "verl does not load it"
            )
        return
    alpha = model.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise ConfigError(f"{MODEL}.lora_alpha is {alpha!r}; allowed: a number above 0 (the scale is alpha / rank)")
    if not model.get("target_modules"):
        raise ConfigError(f"{MODEL}.target_modules is empty; allowed: names of linear modules, or all-linear")
    _check_export(config)
    for stage in stages(distill):
        _check_teacher(stage, path)


def _check_export(config: Any) -> None:
    """verl's export writes the names that the weights have inside the adapter's wrapper; no model is loaded from it."""
    if "hf_model" in config.actor_rollout_ref.actor.checkpoint.save_contents:
        raise ConfigError(
            "actor_rollout_ref.actor.checkpoint.save_contents has hf_model with "
            f"{MODEL}.lora_rank above 0; allowed: without it (verl would write it under names that no model has; "
            "docs/lora.md says how an adapter is exported)"
        )
    if config.chain.stages:
        raise ConfigError(
            f"chain.stages is {list(config.chain.stages)} with {MODEL}.lora_rank above 0; allowed: no stages, because "
            "each starts from the exported weights of the one before"
        )


def _check_teacher(distill: DistillConfig, path: str | None) -> None:
    kind = distill.teacher.kind
    if not distill.enabled:
        return
    if kind not in ("frozen", "live", "external"):
        raise ConfigError(
            f"distill.teacher.kind is {kind!r} with {MODEL}.lora_rank above 0; allowed: frozen (the adapter switched "
            "off), live (switched on) or external: a teacher that follows the student would be an average of adapters"
        )
    if kind == "frozen" and path is not None:
        raise ConfigError(
            f"{MODEL}.lora_adapter_path is {path} with distill.teacher.kind=frozen; allowed: null, because the frozen "
            "teacher is the model without its adapter and not the one the student starts from"
        )


def check_adapter_off_sampling(config: Any) -> None:
    """Raises ConfigError where the rollout servers cannot sample from the model without its adapter."""
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    if not uses_adapter(model):
        raise ConfigError(
            f"{MODEL}.lora_rank is 0; allowed: above 0 (adapter=lora) where the teacher samples with the adapter "
            "switched off, because the servers hold the student's weights only"
        )
    if adapter_is_merged(model):
        raise ConfigError(
            f"{MODEL}.lora.merge is true; allowed: false where the teacher samples with the adapter switched off, "
            "because merged weights have no adapter to switch off"
        )
    if rollout.name != "vllm" or rollout.disaggregation.enabled:
        raise ConfigError(
            f"actor_rollout_ref.rollout.name is {rollout.name!r} with disaggregation.enabled="
            f"{rollout.disaggregation.enabled}; allowed: vllm without it where the teacher samples with the adapter "
            "switched off"
        )


@contextmanager
def switching_servers(config: Any) -> Iterator[None]:
    """Rollout servers built inside take :data:`ADAPTER` in a request's sampling parameters, where there is an adapter.

    By verl's registry of replicas, which is asked once, when the servers are built.
    """
    model = config.actor_rollout_ref.model
    if not uses_adapter(model) or adapter_is_merged(model) or config.actor_rollout_ref.rollout.name != "vllm":
        yield
        return
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    def load() -> type:
        from verl_ext.adapter_sampling import SwitchingReplica

        return SwitchingReplica

    before = RolloutReplicaRegistry._registry["vllm"]
    RolloutReplicaRegistry.register("vllm", load)
    try:
        yield
    finally:
        RolloutReplicaRegistry.register("vllm", before)
