"""What can start before the trainer exists: the data plane and the agent-loop processes. Cheap to import.

Start-up is bounded by imports, about 55 core-seconds over all processes: these two fill the cores while the driver and
the model workers import.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray

GROUPED_AGENT_LOOPS = "verl_ext.agent_loops.GroupedAgentLoopManager"


class AgentLoopHost:
    """A Ray actor that imports at once and becomes a grouped agent-loop worker when it is attached."""

    def __init__(self) -> None:
        import verl_ext.agent_loops  # noqa: F401  (the slow part)

        self._worker: asyncio.Task[Any] | None = None

    async def attach(self, *args: Any) -> None:
        """Starts to build the worker; the arguments are those of verl's ``AgentLoopWorker``."""
        from verl_ext.agent_loops import GroupedAgentLoopWorker

        self._worker = asyncio.create_task(asyncio.to_thread(GroupedAgentLoopWorker, *args))

    async def generate_sequences(self, batch: Any) -> None:
        """As verl's worker. Raises what building the worker raised."""
        if self._worker is None:
            raise RuntimeError("this agent-loop process was not attached to rollout servers")
        await (await self._worker).generate_sequences(batch)


@dataclass
class Early:
    """What :func:`start` started.

    Attributes:
        hosts: agent-loop processes; empty where verl's own manager is used.
        free: the cluster's free resources before anything was started.
    """

    hosts: list[Any]
    free: dict[str, float]


def start(config: Any) -> Early:
    """Starts TransferQueue and, where the configuration asks for grouped agent loops, their processes.

    Ray must be initialised. Ended by :func:`verl_ext.session.run_session`.
    """
    agent = config.actor_rollout_ref.rollout.agent
    started = Early([], ray.available_resources())
    if agent.get("agent_loop_manager_class") == GROUPED_AGENT_LOOPS:
        started.hosts = [ray.remote(AgentLoopHost).options(num_cpus=1).remote() for _ in range(agent.num_workers)]
    import transfer_queue

    config.transfer_queue.enable = True
    transfer_queue.init(config.transfer_queue)
    return started
