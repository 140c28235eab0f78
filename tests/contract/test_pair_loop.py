"""The loop that draws pairs: what it asks of the rollout servers, what it writes, and that verl 0.9.1 builds it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop import agent_loop as verl_agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.workers.rollout.replica import TokenOutput

from verl_ext.pair_loop import PAIR_AGENT, TEACHER_IDS, PairAgentLoop
from verl_ext.reference_text import reference_response_ids
from verl_ext.replay_loop import REFERENCE_KEY

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [{"role": "user", "content": "1+1"}]
TEACHER = [11, 12, 13, 14, 15]
ANSWER = [21, 22, 2]


class Servers:
    """The rollout servers at the edge: notes what is asked and answers the same."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def generate(self, request_id: str, **asked: Any) -> TokenOutput:
        self.asked.append(asked)
        extra = {"min_global_steps": 3, "max_global_steps": 3}
        return TokenOutput(token_ids=list(ANSWER), log_probs=[-0.1, -0.2, -0.3], extra_fields=extra)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "models/tiny_world/plain")


def draw(
    tokenizer: Any,
    session: int,
    *,
    kind: str = "live",
    rank: int = 0,
    ids: list[int] | None = None,
    step: int = 4,
    **columns: Any,
) -> tuple[AgentLoopOutput, Servers]:
    """One rollout, with the loop made as verl's worker makes it, from our list on."""
    entry = next(one for one in OmegaConf.load(ROOT / "conf" / "agent_loops.yaml") if one.name == PAIR_AGENT)
    rollout = {"n": 2, "response_length": 6, "prompt_length": 16, "full_determinism": False}
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"rollout": rollout, "model": {"lora_rank": rank}},
            "data": {"apply_chat_template_kwargs": {}},
            "distill": {"teacher": {"kind": kind}},
        }
    )
    servers = Servers()

    async def built_and_run() -> AgentLoopOutput:
        made = instantiate(
            config=entry,
            trainer_config=DictConfigWrap(config=config),
            server_manager=servers,
            tokenizer=tokenizer,
            processor=None,
            hf_model_type="qwen3",
            dataset_cls=None,
            data_config=DictConfigWrap(config.data),
            tools=verl_agent_loop.ToolListWrap([]),
        )
        assert isinstance(made, PairAgentLoop)
        row = {"raw_prompt": PROMPT, "extra_info": {"question_id": "q", "solution": ["2", "1+1=2"]}} | columns
        row[TEACHER_IDS] = TEACHER if ids is None else ids
        return await made.run({"temperature": 1.0}, session_id=session, global_steps=step, **row)

    return asyncio.run(built_and_run()), servers


def student_ids(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=True, return_dict=False)


def test_verl_has_no_agent_of_this_name() -> None:
    assert PAIR_AGENT not in verl_agent_loop._agent_loop_registry


def test_even_rollouts_ask_with_the_teachers_prompt_and_keep_the_students(tokenizer: Any) -> None:
    output, servers = draw(tokenizer, 2)
    (asked,) = servers.asked
    assert asked["prompt_ids"] == TEACHER
    # The response may be as long as the student's, whatever the length of the prompt.
    assert asked["sampling_params"] == {"temperature": 1.0, "max_tokens": 6}
    assert output.prompt_ids == student_ids(tokenizer) and output.response_ids == ANSWER
    assert output.response_logprobs == [-0.1, -0.2, -0.3]


def test_odd_rollouts_are_verls_own(tokenizer: Any) -> None:
    output, servers = draw(tokenizer, 3)
    (asked,) = servers.asked
    assert asked["prompt_ids"] == student_ids(tokenizer) and asked["sampling_params"] == {"temperature": 1.0}
    assert output.prompt_ids == student_ids(tokenizer) and output.response_ids == ANSWER


def test_both_sides_write_the_same_fields(tokenizer: Any) -> None:
    rows = [draw(tokenizer, session)[0].as_dict() for session in (0, 1)]
    rows.append(draw(tokenizer, 0, **{REFERENCE_KEY: "solution"})[0].as_dict())
    rows.append(draw(tokenizer, 0, ids=[])[0].as_dict())
    assert len({frozenset(row) for row in rows}) == 1
    assert len({frozenset(row["extra_fields"]) for row in rows}) == 1


def test_with_an_adapter_the_frozen_teacher_samples_without_it(tokenizer: Any) -> None:
    _, servers = draw(tokenizer, 0, kind="frozen", rank=8)
    assert servers.asked[0]["sampling_params"]["adapter"] is False
    for session, kind in ((1, "frozen"), (0, "live")):
        _, servers = draw(tokenizer, session, kind=kind, rank=8)
        assert "adapter" not in servers.asked[0]["sampling_params"]


@pytest.mark.parametrize(("session", "step", "text"), [(0, 4, "2"), (2, 4, "1+1=2"), (4, 4, "2"), (0, 5, "1+1=2")])
def test_texts_drawn_beforehand_are_replayed_pair_by_pair_and_step_by_step(
    tokenizer: Any, session: int, step: int, text: str
) -> None:
    output, servers = draw(tokenizer, session, kind="external", step=step, **{REFERENCE_KEY: "solution"})
    assert output.response_ids == reference_response_ids(text, tokenizer, limit=6) and not servers.asked
    assert output.extra_fields["min_global_steps"] == output.extra_fields["max_global_steps"] == step - 1
    _, servers = draw(tokenizer, session + 1, kind="external", **{REFERENCE_KEY: "solution"})
    assert len(servers.asked) == 1, "the student's side is drawn"


def test_a_question_without_a_text_to_replay_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"question q has no text under extra_info\.other of at most 6 tokens"):
        draw(tokenizer, 0, **{REFERENCE_KEY: "other"})


@pytest.mark.parametrize("session", [0, 1])
def test_without_a_teachers_prompt_nothing_is_drawn_on_either_side(tokenizer: Any, session: int) -> None:
    output, servers = draw(tokenizer, session, ids=[])
    assert not servers.asked and output.response_ids == [tokenizer.eos_token_id]
    assert not tokenizer.decode(output.response_ids, skip_special_tokens=True).strip()
