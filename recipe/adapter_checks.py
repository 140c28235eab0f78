"""Do the names of ``target_modules`` exist in the model? peft ignores one that matches nothing beside one that does."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.adapter import MODEL, adapter_is_merged, uses_adapter
from verl_ext.config import ConfigError

LARGEST_RANK = 512
"""Of an adapter that vLLM 0.28 serves."""


def check_targets(config: DictConfig) -> None:
    """Raises ConfigError where LoRA's names or its rank do not fit the model, whose weights are not read."""
    model = config.actor_rollout_ref.model
    if not uses_adapter(model):
        return
    if model.lora_rank > LARGEST_RANK and not adapter_is_merged(model):
        raise ConfigError(
            f"{MODEL}.lora_rank is {model.lora_rank}; allowed: up to {LARGEST_RANK} without {MODEL}.lora.merge=true "
            "(vLLM serves no larger one)"
        )
    built = _without_weights(str(model.path), trust_remote_code=bool(model.get("trust_remote_code", False)))
    if built is None:
        return
    targets = OmegaConf.to_container(OmegaConf.create({"names": model.target_modules}))["names"]
    chosen = _chosen(built, targets, str(model.path))
    smallest = min((min(module.weight.shape), name) for name, module in chosen.items())
    if model.lora_rank > smallest[0]:
        raise ConfigError(
            f"{MODEL}.lora_rank is {model.lora_rank}; allowed: up to {smallest[0]}, the smaller side of {smallest[1]}"
        )


def _without_weights(path: str, *, trust_remote_code: bool) -> Any:
    """The model on the meta device; None where its configuration cannot be read, which verl says itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError:
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _chosen(built: Any, targets: str | list[str], path: str) -> dict[str, Any]:
    """The linear modules that the targets name, by full name, as peft matches them."""
    import torch

    head = built.get_output_embeddings()
    linear = {name: module for name, module in built.named_modules() if isinstance(module, torch.nn.Linear)}
    inner = {name: module for name, module in linear.items() if module is not head}
    found = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in inner}))
    if targets == "all-linear":
        return inner
    chosen: dict[str, Any] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            matching = [name for name in linear if re.fullmatch(target, name)]
        else:
            matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matching:
            raise ConfigError(
                f"{MODEL}.target_modules has {target!r}, which names no linear module of {path}; they are: {found}"
            )
        if any(linear[name] is head for name in matching):
            raise ConfigError(
                f"{MODEL}.target_modules has {target!r}, which names the head of {path}; allowed: {found} (the loss "
                "reads the head's own weight)"
            )
        chosen |= {name: linear[name] for name in matching}
    return chosen
