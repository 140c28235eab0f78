"""A rollout server that samples a single request from the model without its adapter.

verl 0.9.1 sends every request through the LoRA adapter as soon as one is loaded. Here the sampling parameters of a
request may hold ``adapter: false`` (:data:`ADAPTER`): that request sees the base weights, which is PBSD's teacher
sample, while its neighbours in the same batch see the adapter. vLLM's prefix cache keeps the two apart by itself.

:func:`verl_ext.adapter.switching_servers` makes verl start this server; vLLM is imported here and only here.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import ray
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from verl_ext.adapter import ADAPTER

_OFF: ContextVar[bool] = ContextVar("adapter_off", default=False)
"""Of the request that is being handled: requests run as tasks of one event loop, each with a context of its own."""


class SwitchingServer(vLLMHttpServer):
    """verl's server, which asks ``lora_as_adapter`` for each request whether it goes through the adapter."""

    @property
    def lora_as_adapter(self) -> bool:
        return super().lora_as_adapter and not _OFF.get()

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **kwargs: Any
    ) -> TokenOutput:
        """As verl's, with ``sampling_params["adapter"]`` (default true).

        Raises:
            ValueError: the adapter is to be off and the server has none (full weights, or merged ones).
        """
        sampling_params = dict(sampling_params)
        off = not sampling_params.pop(ADAPTER, True)
        if off and not super().lora_as_adapter:
            raise ValueError(
                f"a request with {ADAPTER}=false reached a server without an adapter; allowed: adapter=lora with "
                "actor_rollout_ref.model.lora.merge=false"
            )
        token = _OFF.set(off)
        try:
            return await super().generate(prompt_ids, sampling_params, request_id, **kwargs)
        finally:
            _OFF.reset(token)


class SwitchingReplica(vLLMReplica):
    """verl's replica of :class:`SwitchingServer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(SwitchingServer)
