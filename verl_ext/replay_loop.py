"""An agent loop that replays a given text as the response, so that a teacher is matched along it (PACED, forward KL).

Everything behind the rollout stays as it is: the row has a prompt, a response and a verdict like any other.
verl finds it by ``conf/agent_loops.yaml``; the trainer names it for the prompts of a step.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

from verl_ext.reference_text import pick_reference, reference_responses

REPLAY_AGENT = "replay_reference"
"""Its name, as in ``conf/agent_loops.yaml``."""
REFERENCE_KEY = "reference_key"
"""Column of a prompt: the key of ``extra_info`` that holds its reference texts."""
VERSIONS = ("min_global_steps", "max_global_steps")


class ReplayAgentLoop(AgentLoopBase):
    """Rollout number i of a prompt replays its i-th reference text (modulo their number)."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Raises ValueError where the prompt has no reference text that fits the response length."""
        prompt_ids = await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))
        limit = self.rollout_config.response_length
        responses = reference_responses(
            kwargs["extra_info"],
            kwargs[REFERENCE_KEY],
            self.tokenizer,
            template_kwargs=dict(self.data_config.get("apply_chat_template_kwargs") or {}),
            limit=limit,
        )
        if not responses:
            raise ValueError(
                f"question {kwargs['extra_info'].get('question_id')} has no text under extra_info."
                f"{kwargs[REFERENCE_KEY]} of at most {limit} tokens"
            )
        response_ids = pick_reference(responses, int(kwargs["session_id"]))
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            num_turns=2,
            metrics={"generate_sequences": 0.0, "num_preempted": 0},
            # verl counts how old a rollout's weights are; a step begins with those of the step before.
            extra_fields={"turn_scores": [], "tool_rewards": []} | dict.fromkeys(VERSIONS, kwargs["global_steps"] - 1),
        )
