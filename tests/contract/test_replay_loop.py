"""The loop that replays reference texts: what it writes, and that verl 0.9.1 finds and builds it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop import agent_loop as verl_agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap

from verl_ext.reference_text import reference_response_ids
from verl_ext.replay_loop import REFERENCE_KEY, REPLAY_AGENT, ReplayAgentLoop

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [{"role": "user", "content": "1+1"}]
TEXTS = ["1+1=2", "2", "2*1=2"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "models/tiny_world/plain")


def loop(tokenizer: Any, limit: int = 48, built: list[Any] | None = None) -> ReplayAgentLoop:
    """The loop with what its ``run`` reads of verl; verl's token builder is the edge."""
    made = object.__new__(ReplayAgentLoop)
    made.tokenizer = tokenizer
    made.rollout_config = SimpleNamespace(response_length=limit)
    made.data_config = OmegaConf.create({"apply_chat_template_kwargs": {}})

    async def build(messages: list[dict[str, Any]]) -> list[int]:
        (built if built is not None else []).append(messages)
        return [7, 8, 9]

    made.ct_build_initial_tokens = build
    return made


def replay(made: ReplayAgentLoop, session: int = 0, **info: Any) -> AgentLoopOutput:
    columns = {
        "raw_prompt": np.array(PROMPT, dtype=object),
        "extra_info": {"question_id": "q", "solution": TEXTS} | info,
        REFERENCE_KEY: "solution",
        "session_id": session,
        "global_steps": 4,
        "uid": "u",
    }
    return asyncio.run(made.run({"temperature": 1.0}, **columns))


def test_a_rollout_replays_its_text_behind_the_prompt(tokenizer: Any) -> None:
    built: list[Any] = []
    made = loop(tokenizer, built=built)
    for session in range(7):
        output = replay(made, session)
        expected = reference_response_ids(TEXTS[session % 3], tokenizer, limit=48)
        assert output.prompt_ids == [7, 8, 9] and output.response_ids == expected
        assert output.response_ids[-1] == tokenizer.eos_token_id
        assert output.response_mask == [1] * len(expected) and output.response_logprobs is None
        assert output.reward_score is None, "the verifier judges it like any other response"
    assert built == [PROMPT] * 7 and isinstance(built[0], list)


def test_verl_s_metrics_find_the_version_of_the_weights(tokenizer: Any) -> None:
    # verl makes whole numbers of both tags of every row; at the start of step 4 the weights are those after step 3.
    fields = replay(loop(tokenizer)).extra_fields
    assert (fields["min_global_steps"], fields["max_global_steps"]) == (3, 3)
    assert (fields["turn_scores"], fields["tool_rewards"]) == ([], [])


def test_texts_that_do_not_fit_are_passed_over_and_none_is_cut(tokenizer: Any) -> None:
    assert len(reference_response_ids("2", tokenizer, limit=48)) == 2
    made = loop(tokenizer, limit=2)
    short = reference_response_ids("2", tokenizer, limit=2)
    assert [replay(made, session).response_ids for session in range(3)] == [short] * 3


@pytest.mark.parametrize("texts", ["1+1=2", [], None, "", ["1+1=2", "2*1=2"]])
def test_a_question_without_a_text_that_fits_is_an_error(tokenizer: Any, texts: Any) -> None:
    with pytest.raises(ValueError, match=r"question q has no text under extra_info\.solution of at most 2 tokens"):
        replay(loop(tokenizer, limit=2), solution=texts)


def test_verl_builds_the_loop_from_our_list(tokenizer: Any) -> None:
    """As verl's worker does it, from the key of the rollout configuration on."""
    entries = OmegaConf.load(ROOT / "conf" / "agent_loops.yaml")
    assert [entry.name for entry in entries][0] == REPLAY_AGENT
    assert REPLAY_AGENT not in verl_agent_loop._agent_loop_registry, "verl has none of this name"
    rollout = {"response_length": 48, "prompt_length": 64}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {"apply_chat_template_kwargs": {}}})

    async def built_and_run() -> AgentLoopOutput:
        made = instantiate(
            config=entries[0],
            trainer_config=DictConfigWrap(config=config),
            server_manager=None,
            tokenizer=tokenizer,
            processor=None,
            hf_model_type="qwen3",
            dataset_cls=None,
            data_config=DictConfigWrap(config.data),
            tools=verl_agent_loop.ToolListWrap([]),
        )
        assert isinstance(made, ReplayAgentLoop)
        info = {"question_id": "q", "solution": TEXTS}
        return await made.run({}, raw_prompt=PROMPT, extra_info=info, session_id=1, global_steps=1, **key)

    key = {REFERENCE_KEY: "solution"}
    output = asyncio.run(built_and_run())
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert output.prompt_ids == prompt, "the prompt of a generated rollout"
    assert output.response_ids == reference_response_ids("2", tokenizer, limit=48)
