"""verl's rollout servers without a trainer: the weights of a model folder, the same vLLM, the same client."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from ray.util.placement_group import remove_placement_group
from verl.workers.rollout.llm_server import LLMServerManager

SECONDS_TO_END = 30


class _Servers(LLMServerManager):
    """verl's manager, known to us from before its servers start: a failing start must not leave them behind."""

    def __init__(self, *args: Any, made: list[LLMServerManager], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        made.append(self)


@contextlib.contextmanager
def standalone_servers(config: DictConfig) -> Iterator[LLMServerManager]:
    """Rollout servers with the weights at ``actor_rollout_ref.model.path``. Ray must be initialised.

    As many replicas as ``trainer.nnodes`` x ``trainer.n_gpus_per_node`` devices hold. Everything that was started is
    ended on leaving; the cluster stays.
    """
    config = standalone_config(config)
    free_before = ray.available_resources()
    made: list[LLMServerManager] = []
    try:
        yield _Servers.create(config=config, made=made)
    finally:
        for manager in made:
            end_servers(manager)
        wait_for_resources(free_before)


def standalone_config(config: DictConfig) -> DictConfig:
    """The run's configuration with what standalone servers need beside it."""
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    rollout = config.actor_rollout_ref.rollout
    with open_dict(config):
        rollout.nnodes = config.trainer.nnodes
        rollout.n_gpus_per_node = config.trainer.n_gpus_per_node
        # verl's default leaves random weights until a trainer sends real ones.
        rollout.load_format = "auto"
    return config


def end_servers(manager: LLMServerManager) -> None:
    """Ends every actor of the manager's servers and gives their devices back."""
    actors: list[Any] = []
    for replica in getattr(manager, "rollout_replicas", []):
        actors += [*replica.servers, *replica.workers]
    balancer = getattr(manager, "global_load_balancer", None)
    for actor in actors + ([balancer] if balancer is not None else []):
        ray.kill(actor)
    for replica in getattr(manager, "rollout_replicas", []):
        for group in (replica.resource_pool.pgs if replica.resource_pool is not None else None) or []:
            remove_placement_group(group)


def wait_for_resources(before: dict[str, float]) -> None:
    """Whoever comes next may start at once: the cluster's resources must be free again."""
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline:
        now = ray.available_resources()
        if all(now.get(name, 0.0) >= before.get(name, 0.0) for name in ("CPU", "GPU")):
            return
        time.sleep(0.1)


def stop_token_ids(folder: Path) -> list[int]:
    """The end tokens of a model's generation config, which vLLM stops at beside the tokenizer's."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return [int(token) for token in (found if isinstance(found, list) else [found]) if token is not None]
