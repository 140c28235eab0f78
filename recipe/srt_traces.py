"""Traces for self-revision training: attempt, control phrase and a revision that is right (SD-Zero, arXiv 2604.12002).

A trace is kept where the final answer of its revision is right; whether the attempt was, only decides the phrase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipe.srt_attempts import BRANCHES, VERIFIER_ERROR, Attempt, RevisionPlan, is_right
from verl_ext.revision import Phrases
from verl_ext.revision_cleaning import clean
from verl_ext.sample_store import StoreError
from verl_ext.sampling import SampleRequest

# Why a revision gives no trace, in the order in which it is looked at.
REVISION_FAULTS = (
    *(VERIFIER_ERROR, "truncated", "wrong", "blank", "special_token", "wrong_when_cleaned"),
    *("beyond_per_attempt", "beyond_max_traces"),
)
# Whether each text answers its question; None where the verifier cannot say.
Judge = Callable[[Sequence[tuple[SampleRequest, str]]], list[bool | None]]


@dataclass(frozen=True)
class Trace:
    """One attempt with one right revision.

    Attributes:
        attempt_index: among the question's attempts.
        revision_index: among the attempt's revisions.
        messages: the question's chat messages.
        attempt: its text as it was drawn.
        right: whether the attempt was right.
        phrase: that stands between attempt and revision.
        revision: its text after cleaning.
        cleaned: whether cleaning changed it.
    """

    question_id: str
    attempt_index: int
    revision_index: int
    messages: Sequence[Mapping[str, Any]]
    attempt: str
    right: bool
    phrase: str
    revision: str
    cleaned: bool


@dataclass
class Collected:
    """The traces, and what became of the other revisions.

    Attributes:
        traces: in the order of questions, attempts and revisions.
        revisions: branch -> revisions drawn.
        judged: branch -> those with a verdict.
        right: branch -> those that are right, whether they give a trace or not.
        left_out: (branch, reason of ``REVISION_FAULTS``) -> revisions that give no trace.
    """

    traces: list[Trace] = field(default_factory=list)
    revisions: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, branch: str) -> int:
        """Traces of a branch."""
        return sum(trace.right == (branch == BRANCHES[0]) for trace in self.traces)

    def rate(self, branch: str) -> float | None:
        """Share of right ones among the judged revisions: the correction rate of wrong attempts, the retention of right
        ones. None where none was judged."""
        return round(self.right[branch] / self.judged[branch], 6) if self.judged[branch] else None


def choose_traces(
    plan: RevisionPlan,
    rows: Iterable[Mapping[str, Any]],
    phrases: Phrases,
    *,
    revisions: int,
    threshold: float,
    special_token: Callable[[str], str | None],
    judge: Judge,
    per_attempt: int | None = None,
    max_traces: int | None = None,
) -> Collected:
    """The traces of a store of revisions.

    Args:
        rows: of the store, in any order; rows of other attempts and indices from ``revisions`` on do not count.
        threshold: score from which a revision is right.
        special_token: the special token that a text spells, None where there is none.
        judge: asked again about revisions that cleaning changed: the answer may have stood in what was taken away.
        per_attempt: keep the first so many traces of an attempt.
        max_traces: keep so many in all, see :func:`spread`.

    Raises:
        StoreError: a revision of the plan is not there.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["question_id"] in plan.attempts and row["sample"] < revisions:
            found.setdefault(row["question_id"], {})[row["sample"]] = row
    collected, candidates = Collected(), []
    for name, attempt in plan.attempts.items():
        for index in range(revisions):
            if index not in found.get(name, {}):
                raise StoreError(f"revision {index} of attempt {name} is not in the store; the same command draws it")
            row, branch = found[name][index], attempt.branch
            right = is_right(row, threshold)
            collected.revisions[branch] += 1
            collected.judged[branch] += right is not None
            collected.right[branch] += bool(right)
            text = clean(row["text"])
            fault = _fault(row, right, text, special_token)
            if fault is None:
                candidates.append((attempt, _trace(attempt, index, text, phrases, text != row["text"])))
            else:
                collected.left_out[branch, fault] += 1
    kept = _still_right(candidates, judge, collected)
    kept = _first_of_each_attempt(kept, per_attempt, collected)
    collected.traces = spread(kept, max_traces)
    chosen = {id(trace) for trace in collected.traces}
    for trace in kept:
        if id(trace) not in chosen:
            collected.left_out[_branch(trace), "beyond_max_traces"] += 1
    return collected


def spread(traces: Sequence[Trace], count: int | None) -> list[Trace]:
    """``count`` of the traces, in their order: every question's first, then every question's second, and so on.

    Where a round does not fit whole, its questions are taken at even distances.
    """
    if count is None or count >= len(traces):
        return list(traces)
    seen: Counter[str] = Counter()
    rounds: list[list[int]] = []
    for place, trace in enumerate(traces):
        number = seen[trace.question_id]
        seen[trace.question_id] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(place)
    chosen: list[int] = []
    for places in rounds:
        room = min(count - len(chosen), len(places))
        chosen += [places[i * len(places) // room] for i in range(room)]
    return [traces[place] for place in sorted(chosen)]


def _fault(
    row: Mapping[str, Any], right: bool | None, text: str, special_token: Callable[[str], str | None]
) -> str | None:
    if right is None:
        return VERIFIER_ERROR
    if row["truncated"]:
        return "truncated"
    if not right:
        return "wrong"
    if not text.strip():
        return "blank"
    return None if special_token(text) is None else "special_token"


def _trace(attempt: Attempt, index: int, text: str, phrases: Phrases, cleaned: bool) -> Trace:
    question = attempt.question
    return Trace(
        question_id=question.question_id,
        attempt_index=attempt.index,
        revision_index=index,
        messages=question.messages,
        attempt=attempt.text,
        right=attempt.right,
        phrase=phrases.of(attempt.right),
        revision=text,
        cleaned=cleaned,
    )


def _branch(trace: Trace) -> str:
    return BRANCHES[0] if trace.right else BRANCHES[1]


def _still_right(candidates: Sequence[tuple[Attempt, Trace]], judge: Judge, collected: Collected) -> list[Trace]:
    changed = [(attempt.question, trace.revision) for attempt, trace in candidates if trace.cleaned]
    verdicts = iter(judge(changed) if changed else [])
    kept = []
    for _, trace in candidates:
        if not trace.cleaned or next(verdicts):
            kept.append(trace)
        else:
            collected.left_out[_branch(trace), "wrong_when_cleaned"] += 1
    return kept


def _first_of_each_attempt(traces: Sequence[Trace], count: int | None, collected: Collected) -> list[Trace]:
    seen: Counter[tuple[str, int]] = Counter()
    kept = []
    for trace in traces:
        seen[trace.question_id, trace.attempt_index] += 1
        if count is None or seen[trace.question_id, trace.attempt_index] <= count:
            kept.append(trace)
        else:
            collected.left_out[_branch(trace), "beyond_per_attempt"] += 1
    return kept
