"""The grouped agent loops write the same rows as verl's own, in one call per prompt."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.trainer.ppo.v1 import agent_loop_tq

from verl_ext import agent_loops
from verl_ext.agent_loops import GroupedAgentLoopWorker, _Group, _Worker

pytestmark = pytest.mark.contract

RESPONSES = [[7, 8, 9], [5], [6, 6]]


class Reward:
    """The reward worker's remote surface: right iff the response starts with an odd token."""

    def __init__(self) -> None:
        self.calls = 0
        self.compute_score = SimpleNamespace(remote=self._one)
        self.compute_score_batch = SimpleNamespace(remote=self._many)

    async def _one(self, data: Any) -> dict:
        self.calls += 1
        return self._judge(data)

    async def _many(self, data: Any) -> list[dict]:
        self.calls += 1
        return [self._judge(data[i : i + 1]) for i in range(len(data))]

    @staticmethod
    def _judge(data: Any) -> dict:
        # As verl's reward manager finds the response: by the tail of the attention mask.
        item = data[0]
        width = item.batch["responses"].shape[-1]
        length = int(item.batch["attention_mask"][-width:].sum())
        tokens = item.batch["responses"][:length].tolist()
        score = float(tokens[0] % 2)
        truth = item.non_tensor_batch["reward_model"]["ground_truth"]
        return {"reward_score": score, "reward_extra_info": {"acc": score, "tokens": tokens, "truth": truth}}


def worker(kind: type, reward: Reward) -> Any:
    made = object.__new__(kind)
    made.processor, made.distillation_enabled, made.reward_loop_worker_handles = None, False, [reward]
    made.mm_processor_kwargs = {}
    made._groups = {}
    return made


def output(response: list[int]) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=[1, 2, 3],
        response_ids=response,
        response_mask=[1] * len(response),
        response_logprobs=[-0.5] * len(response),
        num_turns=2,
        metrics=AgentLoopMetrics(),
        extra_fields={"min_global_steps": 4, "max_global_steps": 4},
    )


def columns(session: int) -> dict[str, Any]:
    return {
        "uid": "q",
        "session_id": session,
        "global_steps": 4,
        "raw_prompt": [{"role": "user", "content": "?"}],
        "data_source": "tiny_world",
        "reward_model": {"ground_truth": "3"},
        "extra_info": {"index": 0, "question_id": "x"},
        "index": 0,
    }


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    async def put(**arguments: Any) -> None:
        calls.append(arguments)

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", put)
    assert agent_loops.tq is agent_loop_tq.tq
    return calls


def rows(calls: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for call in calls:
        for i, (key, tag) in enumerate(zip(call["keys"], call["tags"], strict=True)):
            fields = {name: call["fields"][i][name] for name in call["fields"].keys()}
            found[key] = {"tag": tag, "partition": call["partition_id"], **fields}
    return found


def plain(value: Any) -> Any:
    value = getattr(value, "data", value) if not isinstance(value, torch.Tensor) else value
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value.model_dump() if hasattr(value, "model_dump") else value


def test_grouped_rows_equal_verls_own_field_by_field(written):
    own, grouped = Reward(), Reward()
    ours = worker(GroupedAgentLoopWorker, grouped)

    async def both() -> tuple[dict, dict]:
        for session, response in enumerate(RESPONSES):
            await worker(_Worker, own)._agent_loop_postprocess(output(response), False, **columns(session))
        reference = rows(written)
        written.clear()
        group = ours._groups["q"] = _Group(len(RESPONSES), False)
        for session in (2, 0, 1):  # rollouts end in any order
            await ours._agent_loop_postprocess(output(RESPONSES[session]), False, **columns(session))
        await ours._hand_on(group)
        return reference, rows(written)

    reference, mine = asyncio.run(both())
    assert list(mine) == [f"q_{session}_0" for session in range(3)], "written in the order of the rollouts"
    assert set(mine) == set(reference) and own.calls == 3 and grouped.calls == 1 and len(written) == 1
    for key, row in reference.items():
        assert set(mine[key]) == set(row)
        for name in set(row) - {"metrics"}:  # timings
            assert plain(mine[key][name]) == plain(row[name]), (key, name)


def test_a_verifier_error_marks_its_row_and_spares_the_siblings(written):
    class Breaking(Reward):
        async def _many(self, data: Any) -> list[dict]:
            return [await self._one(data[i : i + 1]) for i in range(len(data))]

        async def _one(self, data: Any) -> dict:
            if data[0].batch["responses"][0] == 5:
                raise RuntimeError("verifier down")
            return self._judge(data)

    ours = worker(GroupedAgentLoopWorker, Breaking())
    group = _Group(3, False, 3, [(output(RESPONSES[i]), columns(i)) for i in range(3)])
    asyncio.run(ours._hand_on(group))
    infos = [plain(row["extra_fields"])["reward_extra_info"] for row in rows(written).values()]
    assert [info.get("status", "ok") for info in infos] == ["ok", "error", "ok"]
    assert "verifier down" in infos[1]["error"] and infos[0]["acc"] == 1.0


def test_a_failed_rollout_does_not_hold_its_siblings_back(written, monkeypatch):
    ours = worker(GroupedAgentLoopWorker, Reward())
    ours._groups["q"] = _Group(3, True)

    async def run(self: Any, sampling_params: dict, trajectory: dict, *, agent_name: str, **kwargs: Any) -> None:
        if kwargs["session_id"] == 1:
            raise RuntimeError("lost")
        await self._agent_loop_postprocess(output(RESPONSES[kwargs["session_id"]]), True, **kwargs)

    monkeypatch.setattr(_Worker, "_run_agent_loop", run)

    async def group() -> list[Any]:
        calls = [ours._run_agent_loop({}, {}, agent_name="single_turn_agent", **columns(i)) for i in range(3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(group())
    assert [type(result) for result in results] == [type(None), RuntimeError, type(None)]
    assert set(rows(written)) == {"q_0_0", "q_2_0"} and {call["partition_id"] for call in written} == {"val"}
