"""What the switching rollout server relies on in verl 0.9.1, and that a request's flag decides what vLLM is asked."""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest

from recipe.compose import compose_config
from verl_ext.adapter import switching_servers

pytestmark = pytest.mark.contract


def server_module() -> Any:
    from verl.workers.rollout.vllm_rollout import vllm_async_server

    return vllm_async_server


def source(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def test_verl_asks_one_property_whether_a_request_goes_through_the_adapter() -> None:
    server = server_module().vLLMHttpServer
    assert isinstance(inspect.getattr_static(server, "lora_as_adapter"), property)
    decisions = [
        ast.unparse(node.test)
        for node in ast.walk(source(server.generate))
        if isinstance(node, ast.If) and "lora_request = LoRARequest(" in ast.unparse(node)
    ]
    assert decisions == ["self.lora_as_adapter", "lora_loaded"]
    others = [name for name, value in vars(server).items() if callable(value) and name != "generate"
              and "lora_as_adapter" in inspect.getsource(value)]  # fmt: skip
    assert others == ["_resolve_sleep_level"], "asked outside of a request, where the answer must be verl's"


def test_our_server_takes_what_verls_takes() -> None:
    from verl_ext.adapter_sampling import SwitchingServer

    theirs = list(inspect.signature(server_module().vLLMHttpServer.generate).parameters)
    ours = inspect.signature(SwitchingServer.generate)
    named = [name for name, one in ours.parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    assert theirs[: len(named)] == named == ["self", "prompt_ids", "sampling_params", "request_id"]


def test_the_replica_starts_its_servers_from_an_attribute() -> None:
    replica = server_module().vLLMReplica
    assert "self.server_class = ray.remote(vLLMHttpServer)" in ast.unparse(source(replica.__init__))
    assert "self.server_class.options(" in ast.unparse(source(replica.launch_servers))


def test_the_manager_takes_the_replica_from_the_registry_when_it_is_built() -> None:
    from verl.workers.rollout.llm_server import LLMServerManager

    assert "get_rollout_replica_class(" in ast.unparse(source(LLMServerManager.__init__))


@pytest.mark.parametrize(
    ("overrides", "ours"),
    [(["adapter=lora", "teacher=frozen"], True), ([], False),
     (["adapter=lora", "teacher=frozen", "actor_rollout_ref.model.lora.merge=true"], False)],
)  # fmt: skip
def test_verls_servers_are_replaced_inside_and_only_where_there_is_an_adapter(overrides: list[str], ours: bool) -> None:
    from verl.workers.rollout.replica import get_rollout_replica_class

    from verl_ext.adapter_sampling import SwitchingReplica

    theirs = server_module().vLLMReplica
    with switching_servers(compose_config(overrides)):
        assert get_rollout_replica_class("vllm") is (SwitchingReplica if ours else theirs)
    assert get_rollout_replica_class("vllm") is theirs


class Engine:
    """vLLM's engine: notes the adapter of each request, and answers when all of them have arrived."""

    def __init__(self, expected: int) -> None:
        self.asked: dict[str, Any] = {}
        self._all, self._expected = asyncio.Event(), expected

    async def list_loras(self) -> set[int]:
        await asyncio.sleep(0)
        return {server_module().VLLM_LORA_INT_ID}

    async def generate(self, *, prompt: Any, sampling_params: Any, request_id: str, lora_request: Any, priority: int):
        self.asked[request_id] = lora_request
        if len(self.asked) == self._expected:
            self._all.set()
        await self._all.wait()
        yield SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=[7], logprobs=None, finish_reason="stop")],
            prompt_logprobs=None,
            metrics=None,
        )


def serving(engine: Engine, rank: int = 8) -> Any:
    from verl_ext.adapter_sampling import SwitchingServer

    server = object.__new__(SwitchingServer)
    server.engine = engine
    server.model_config = SimpleNamespace(lora_rank=rank, lora={"rank": 0, "merge": False}, processor=None)
    server.config = compose_config([]).actor_rollout_ref.rollout
    server._disaggregation_role, server._pd_decode_peers = None, []
    server.replica_rank, server.global_steps, server._admitting = 0, 0, 0

    async def admitted(request_id: str) -> None:
        server._admitting += 1

    server._park_until_admitted = admitted
    return server


def test_requests_at_the_same_time_differ_in_their_adapter_and_the_callers_parameters_stay() -> None:
    parameters: dict[str, dict[str, Any]] = {
        "on": {"temperature": 1.0, "adapter": True}, "off": {"temperature": 1.0, "adapter": False}, "default": {}
    }  # fmt: skip
    before = {name: dict(values) for name, values in parameters.items()}

    async def ask() -> Engine:
        engine = Engine(len(parameters))
        server = serving(engine)
        answers = [server.generate([1, 2], values, name) for name, values in parameters.items()]
        assert [answer.token_ids for answer in await asyncio.gather(*answers)] == [[7]] * 3
        assert server.lora_as_adapter, "between requests as verl's"
        return engine

    asked = asyncio.run(ask()).asked
    assert asked["off"] is None
    assert asked["on"].lora_int_id == asked["default"].lora_int_id == server_module().VLLM_LORA_INT_ID
    assert parameters == before


def test_a_request_without_the_adapter_is_refused_where_the_weights_are_whole() -> None:
    async def ask() -> None:
        await serving(Engine(1), rank=0).generate([1], {"adapter": False}, "x")

    with pytest.raises(ValueError, match="adapter=false reached a server without an adapter"):
        asyncio.run(ask())
