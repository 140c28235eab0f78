"""An agent-loop process that starts importing before the rollout servers exist. Cheap to import."""

from __future__ import annotations

import asyncio
from typing import Any


class AgentLoopHost:
    """A Ray actor (``ray.remote(AgentLoopHost)``) that becomes a grouped agent-loop worker when it is attached."""

    def __init__(self) -> None:
        import verl_ext.agent_loops  # noqa: F401  (the slow part)

        self._worker: Any = None

    async def attach(self, *args: Any) -> None:
        """The arguments of verl's ``AgentLoopWorker``."""
        from verl_ext.agent_loops import GroupedAgentLoopWorker

        self._worker = await asyncio.to_thread(GroupedAgentLoopWorker, *args)

    async def generate_sequences(self, batch: Any) -> None:
        """As verl's worker."""
        await self._worker.generate_sequences(batch)
