"""Which attempts are revised, behind which phrase, and why the others are not (SD-Zero, arXiv 2604.12002)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_ext.revision import Phrases, has_thinking, turn_prefix
from verl_ext.sampling import SampleRequest
from verl_ext.sampling_prompts import PromptBuilder, PromptError
from verl_ext.verifiers.result import OK

RIGHT, WRONG, UNJUDGED = "right", "wrong", "unjudged"
BRANCHES = (RIGHT, WRONG)
# Why an attempt is not revised, in the order in which it is looked at.
VERIFIER_ERROR = "verifier_error"
ATTEMPT_FAULTS = (
    *(VERIFIER_ERROR, "truncated", "blank", "thinking", "special_token"),
    *("switched_off", "no_room", "not_continued"),
)


@dataclass(frozen=True)
class Attempt:
    """A first response that is revised.

    Attributes:
        question: its request; the verdict on a revision is asked with it too.
        index: among the question's attempts.
        right: whether its score meets the threshold.
        request: for its revisions, which continue the assistant turn behind attempt and phrase.
    """

    question: SampleRequest
    index: int
    text: str
    right: bool
    request: SampleRequest

    @property
    def branch(self) -> str:
        """``right`` or ``wrong``."""
        return RIGHT if self.right else WRONG


@dataclass
class RevisionPlan:
    """What the attempts of a collection lead to.

    Attributes:
        attempts: id of the request for its revisions -> the attempt, in the order of the questions.
        judged: branch -> attempts that the verifier judged so; ``unjudged``: those it could not judge.
        left_out: (branch or ``unjudged``, reason of ``ATTEMPT_FAULTS``) -> attempts that are not revised.
        mean: over questions with a judged attempt, of the share of right ones; None where there is none.
    """

    attempts: dict[str, Attempt] = field(default_factory=dict)
    judged: Counter[str] = field(default_factory=Counter)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    mean: float | None = None

    @property
    def requests(self) -> list[SampleRequest]:
        """For the sampler."""
        return [attempt.request for attempt in self.attempts.values()]

    def revised(self, branch: str) -> int:
        """Attempts of a branch that are revised."""
        return sum(attempt.branch == branch for attempt in self.attempts.values())


def plan_revisions(
    questions: Sequence[SampleRequest],
    rows: Iterable[Mapping[str, Any]],
    *,
    attempts: int,
    threshold: float,
    phrases: Phrases | None,
    branches: Sequence[str],
    prompts: PromptBuilder,
    max_tokens: int,
    max_model_len: int | None,
    special_token: Callable[[str], str | None],
) -> RevisionPlan:
    """Sorts the attempts of a store into those that are revised and those that are not.

    Args:
        rows: of the store, in any order; rows of other questions and indices from ``attempts`` on do not count.
        threshold: score from which an attempt is right.
        phrases: None only where no branch is revised.
        branches: which attempts are revised, of ``BRANCHES``.
        max_tokens: of a revision; with prompt, attempt and phrase it must fit into ``max_model_len``.
        special_token: the special token that a text spells, None where there is none. One in an attempt would end the
            assistant turn before the phrase.
    """
    wanted = {question.question_id for question in questions}
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["question_id"] in wanted and row["sample"] < attempts:
            found.setdefault(row["question_id"], {})[row["sample"]] = row
    plan, rates = RevisionPlan(), []
    for question in questions:
        verdicts = []
        for index, row in sorted(found.get(question.question_id, {}).items()):
            right = is_right(row, threshold)
            branch = UNJUDGED if right is None else RIGHT if right else WRONG
            plan.judged[branch] += 1
            if right is None:
                plan.left_out[branch, VERIFIER_ERROR] += 1
                continue
            verdicts.append(right)
            fault = _fault(row, special_token)
            if fault is None and branch not in branches:
                fault = "switched_off"
            if fault is None:
                request = _request(question, index, turn_prefix(row["text"], phrases.of(right)))
                fault = _prompt_fault(request, prompts, max_tokens, max_model_len)
            if fault is None:
                plan.attempts[request.question_id] = Attempt(question, index, row["text"], right, request)
            else:
                plan.left_out[branch, fault] += 1
        if verdicts:
            rates.append(sum(verdicts) / len(verdicts))
    plan.mean = round(sum(rates) / len(rates), 6) if rates else None
    return plan


def is_right(row: Mapping[str, Any], threshold: float) -> bool | None:
    """Whether a sample's score meets the threshold, None where it was not judged.

    Compared in float32 as the trainer's rewards are: one notion of success in both phases.
    """
    import torch

    from verl_ext.pass_rates import success_mask

    if row["status"] != OK:
        return None
    return bool(success_mask(torch.tensor([row["score"]], dtype=torch.float32), threshold=threshold).item())


def _fault(row: Mapping[str, Any], special_token: Callable[[str], str | None]) -> str | None:
    if row["truncated"]:
        return "truncated"
    if not row["text"].strip():
        return "blank"
    if has_thinking(row["text"]):
        return "thinking"
    return None if special_token(row["text"]) is None else "special_token"


def _request(question: SampleRequest, index: int, prefix: str) -> SampleRequest:
    return SampleRequest(
        # No two attempts share it, whatever the ids of the questions hold: the last # parts the index.
        question_id=f"{question.question_id}#{index}",
        messages=question.messages,
        prefix=prefix,
        judge_prefix=False,
        data_source=question.data_source,
        ground_truth=question.ground_truth,
        extra_info=question.extra_info,
    )


def _prompt_fault(
    request: SampleRequest, prompts: PromptBuilder, max_tokens: int, max_model_len: int | None
) -> str | None:
    try:
        ids = prompts(request.question_id, request.messages, request.prefix)
    except PromptError:
        return "not_continued"
    return "no_room" if max_model_len is not None and len(ids) + max_tokens > max_model_len else None
