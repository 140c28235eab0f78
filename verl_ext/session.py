"""A training session inside a Ray cluster: TransferQueue, trainer, agent loops, and their orderly end.

verl runs this in an actor of its own; here it runs in the driver, which saves a process and its imports and keeps
progress and Ctrl-C where the user is.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from ray.util.placement_group import remove_placement_group
from verl.utils.import_utils import load_class_from_fqn

from verl_ext.agent_loops import GroupedAgentLoopManager, OneServerClient
from verl_ext.early import Early
from verl_ext.step_sink import StepSink
from verl_ext.trainer import DistillTrainer

logger = logging.getLogger(__name__)

SECONDS_TO_END = 30
ROLLOUT_SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"


def run_session(
    config: DictConfig,
    sink: StepSink,
    early: Early,
    *,
    seed: int = 0,
    trainer_class: Callable[..., DistillTrainer] = DistillTrainer,
) -> DistillTrainer:
    """Trains to the end of the configured steps.

    Args:
        early: what :func:`verl_ext.early.start` returned.
        trainer_class: a trainer that measures or tries something.

    Everything the session started is ended when it returns or raises; the cluster itself stays.
    """
    OmegaConf.resolve(config)
    with open_dict(config):
        # The sink hands its records to loggers; verl's tracker would send them the configuration with its secrets.
        config.trainer.logger = []
    named_before = set(ray.util.list_named_actors())
    trainer, agent_loops = None, None
    succeeded = False
    try:
        trainer = trainer_class(config, sink, seed=seed)
        sink.phase("starting student, teacher and rollout workers")
        # The driver waits for the model workers for a while: time for the import that comes after them.
        threading.Thread(target=importlib.import_module, args=(ROLLOUT_SERVER,), daemon=True).start()
        trainer.init()
        sink.phase("starting agent loops")
        agent_loops = _agent_loops(config, trainer, early.hosts)
        sink.phase("training")
        trainer.fit(agent_loops)
        succeeded = True
        return trainer
    finally:
        tracker = getattr(trainer, "_logger", None)
        if tracker is not None:
            tracker.finish(exit_code=0 if succeeded else 1)
        _end(trainer, agent_loops, early.hosts)
        _end_named(set(ray.util.list_named_actors()) - named_before | _server_names(config))
        tq.close()
        _wait_for_resources(early.free)


def _agent_loops(config: DictConfig, trainer: DistillTrainer, hosts: list[Any]) -> Any:
    from verl.trainer.ppo.v1 import AgentLoopManagerTQ

    name = config.actor_rollout_ref.rollout.get("agent", {}).get("agent_loop_manager_class")
    manager = load_class_from_fqn(name, "AgentLoopManager") if name else AgentLoopManagerTQ
    client = trainer.get_llm_client()
    extra: dict[str, Any] = {}
    if issubclass(manager, GroupedAgentLoopManager):
        extra["hosts"] = hosts
        servers = trainer.llm_server_manager.server_handles
        client = OneServerClient(client, servers[0]) if len(servers) == 1 else client
    return manager.create(
        config=config,
        llm_client=client,
        teacher_client=trainer.get_teacher_client(),
        reward_loop_worker_handles=trainer.get_reward_handles(),
        **extra,
    )


def _end(trainer: DistillTrainer | None, agent_loops: Any, hosts: list[Any]) -> None:
    """Ends every actor of the session, rollout servers last so that nobody asks them any more."""
    actors: list[Any] = list(hosts)
    actors += [worker for worker in getattr(agent_loops, "agent_loop_workers", None) or [] if worker not in actors]
    actors += getattr(getattr(trainer, "reward_loop_manager", None), "reward_loop_worker_handles", None) or []
    for group in ("actor_rollout_wg", "teacher_wg"):
        actors += getattr(getattr(trainer, group, None), "workers", None) or []
    servers = getattr(trainer, "llm_server_manager", None)
    for replica in servers.get_replicas() if servers is not None else []:
        actors += replica.servers
    # Nothing else ends it: an actor without resources, a process of several hundred MB per session.
    balancer = getattr(servers, "global_load_balancer", None)
    actors += [balancer] if balancer is not None else []
    for actor in actors:
        ray.kill(actor)
    pools = getattr(trainer, "resource_pool_manager", None)
    for pool in pools.resource_pool_dict.values() if pools is not None else []:
        for group in pool.pgs or []:
            remove_placement_group(group)


def _end_named(names: set[str]) -> None:
    """A start that failed half way leaves actors that no object of ours knows; their names would block the next one."""
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended in the meantime
            ray.kill(ray.get_actor(name))


def _server_names(config: DictConfig) -> set[str]:
    """What verl calls its rollout servers. Ray lists no actor whose constructor failed, but keeps its name taken."""
    nodes = config.trainer.nnodes
    replicas = config.trainer.n_gpus_per_node * nodes
    prefix = f"{config.actor_rollout_ref.rollout.name}_server"
    return {f"{prefix}_{replica}_{node}" for replica in range(replicas) for node in range(nodes)}


def _wait_for_resources(before: dict[str, float]) -> None:
    """The next session may start at once: what this one held must be free again."""
    held = {name: amount for name, amount in before.items() if name in ("CPU", "GPU")}
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline:
        free = ray.available_resources()
        if all(free.get(name, 0.0) >= amount for name, amount in held.items()):
            return
        time.sleep(0.1)
    logger.warning("some actors still hold resources %s s after the session's end", SECONDS_TO_END)
