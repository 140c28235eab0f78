"""An agent loop that draws PBSD's pairs: from the teacher, who reads its context, and from the student.

Both are drawn on the same rollout servers, from the same weights; only the prompt differs. The row of a teacher's
sample carries the student's prompt, because that is what the student is scored on. verl finds the loop by
``conf/agent_loops.yaml``; the trainer names it for the prompts of a step, and gives the teacher's prompt with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout.replica import TokenOutput

from verl_ext.adapter import ADAPTER, uses_adapter
from verl_ext.pairs import is_teacher_sample
from verl_ext.reference_text import pick_reference, reference_responses
from verl_ext.replay_loop import REFERENCE_KEY, VERSIONS

PAIR_AGENT = "preference_pairs"
"""Its name, as in ``conf/agent_loops.yaml``."""
TEACHER_IDS = "teacher_ids_to_sample"
"""Column of a prompt: token ids of the teacher's prompt; empty where the question has none that fits."""


class TeacherRequests:
    """Stands before the rollout servers for one request, and asks them with the teacher's prompt."""

    def __init__(self, servers: Any, prompt_ids: list[int], changes: Mapping[str, Any]) -> None:
        self._servers, self._prompt_ids, self._changes = servers, prompt_ids, changes

    async def generate(self, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any) -> TokenOutput:
        """The servers' answer to the teacher's prompt; ``prompt_ids`` are the student's."""
        return await self._servers.generate(
            prompt_ids=self._prompt_ids, sampling_params=sampling_params | self._changes, **kwargs
        )


class GivenResponse:
    """Stands before the rollout servers for one request, and answers with tokens that are known already."""

    def __init__(self, response_ids: list[int], version: int) -> None:
        self._response_ids, self._version = response_ids, version

    async def generate(self, **kwargs: Any) -> TokenOutput:
        """The given tokens; their log-probabilities are unknown and read 0."""
        return TokenOutput(
            token_ids=self._response_ids,
            log_probs=[0.0] * len(self._response_ids),
            num_preempted=0,
            extra_fields=dict.fromkeys(VERSIONS, self._version),
        )


class PairAgentLoop(SingleTurnAgentLoop):
    """Even rollout numbers are the teacher's samples, odd ones the student's."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """Raises ValueError where the teacher's text is to be replayed and the prompt has none that fits."""
        rollout, version = int(kwargs["session_id"]), kwargs["global_steps"] - 1
        teacher_ids = [int(token) for token in kwargs[TEACHER_IDS]]
        if not teacher_ids:
            # No pair can be made: nothing is drawn, and the blank row is counted and left out.
            self.server_manager = GivenResponse([self.tokenizer.eos_token_id], version)
        elif is_teacher_sample(rollout):
            key = kwargs.get(REFERENCE_KEY)
            if key is not None:
                # Another text at every visit of the question, the same one where a run is resumed.
                number = kwargs["global_steps"] * (self.rollout_config.n // 2) + rollout // 2
                self.server_manager = GivenResponse(self._reference(kwargs, key, number), version)
            else:
                self.server_manager = TeacherRequests(self.server_manager, teacher_ids, self._changes())
        return await super().run(sampling_params, priority, **kwargs)

    def _changes(self) -> dict[str, Any]:
        """Sampling parameters of the teacher: its prompt is longer than the student's, its response may not be."""
        model, teacher = self.config.actor_rollout_ref.model, self.config.distill.teacher
        off = {ADAPTER: False} if teacher.kind == "frozen" and uses_adapter(model) else {}
        return {"max_tokens": self.response_length, **off}

    def _reference(self, kwargs: Mapping[str, Any], key: str, number: int) -> list[int]:
        found = reference_responses(
            kwargs["extra_info"],
            key,
            self.tokenizer,
            template_kwargs=dict(self.data_config.get("apply_chat_template_kwargs") or {}),
            limit=self.response_length,
        )
        if not found:
            raise ValueError(
                f"question {kwargs['extra_info'].get('question_id')} has no text under extra_info.{key} of at most "
                f"{self.response_length} tokens"
            )
        return pick_reference(found, number)
