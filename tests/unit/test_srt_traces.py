"""From stores to traces: which attempts are revised, which revisions are kept, and a reason for every other one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.random_model import byte_tokenizer
from recipe.srt_attempts import ATTEMPT_FAULTS, RevisionPlan, plan_revisions
from recipe.srt_files import TRACE_SCHEMA, write_traces
from recipe.srt_traces import REVISION_FAULTS, Collected, Trace, choose_traces, spread
from verl_ext.reference_text import SpecialTokens
from verl_ext.revision import Phrases
from verl_ext.sample_store import StoreError
from verl_ext.sampling import SampleRequest
from verl_ext.sampling_prompts import PromptBuilder, PromptError

PHRASES = Phrases("Let me rephrase.", "Wait, wrong.")
TOKENIZER = byte_tokenizer()
SPECIAL = SpecialTokens(TOKENIZER).first_in
QUESTION = [{"role": "user", "content": "3+4?"}]
BROKEN = {"status": "error", "score": None}


class NoParagraphs(PromptBuilder):
    """Of a tokenizer that lacks a character."""

    def __call__(self, question_id: str, messages: Any, prefix: str | None) -> list[int]:
        if "§" in (prefix or ""):
            raise PromptError(f"question {question_id}: the tokenizer cannot continue the prefix")
        return super().__call__(question_id, messages, prefix)


def row(name: str, sample: int, text: str = "7", score: float | None = 1.0, **more: Any) -> dict[str, Any]:
    values = {"question_id": name, "sample": sample, "prompt": "p", "status": "ok", "truncated": False}
    return values | {"text": text, "score": score} | more


def requests(count: int) -> list[SampleRequest]:
    return [SampleRequest(f"q{i}", QUESTION, ground_truth="7") for i in range(count)]


def plan(rows: Sequence[dict[str, Any]], count: int = 1, **more: Any) -> RevisionPlan:
    options = {"attempts": 2, "threshold": 0.5, "phrases": PHRASES, "branches": ("right", "wrong")}
    options |= {"prompts": PromptBuilder(TOKENIZER), "max_tokens": 8, "max_model_len": 200, "special_token": SPECIAL}
    return plan_revisions(requests(count), rows, **options | more)


def choose(planned: RevisionPlan, rows: Sequence[dict[str, Any]], **more: Any) -> Collected:
    options = {"revisions": 2, "threshold": 0.5, "special_token": SPECIAL}
    options["judge"] = lambda texts: [text.endswith("7") for _, text in texts]
    return choose_traces(planned, rows, PHRASES, **options | more)


# ------------------------------------------------------------------------------------------------------------- attempts


def test_attempts_in_order_behind_their_phrase() -> None:
    rows = [row("q1", 1, "b", 0.0), row("q1", 0, "a"), row("q0", 0, "c", 0.2)]
    rows += [row("q0", 2, "not asked"), row("other", 0)]
    planned = plan(rows, 2)
    assert [(r.question_id, r.prefix, r.judge_prefix) for r in planned.requests] == [
        ("q0#0", "c\n\nWait, wrong.\n\n", False),
        ("q1#0", "a\n\nLet me rephrase.\n\n", False),
        ("q1#1", "b\n\nWait, wrong.\n\n", False),
    ]
    assert planned.requests[0].ground_truth == "7" and planned.requests[0].messages == QUESTION
    assert planned.judged == {"right": 1, "wrong": 2} and planned.mean == 0.25
    assert (planned.revised("right"), planned.revised("wrong")) == (1, 2) and not planned.left_out


def test_every_reason_not_to_revise() -> None:
    faults = {
        "verifier_error": row("q0", 0, **BROKEN),
        "truncated": row("q1", 0, truncated=True),
        "blank": row("q2", 0, " \n", 0.0),
        "thinking": row("q3", 0, "<think>hm</think>7"),
        "special_token": row("q4", 0, "a<|im_end|>b", 0.0),
        "switched_off": row("q5", 0, "7"),
        "no_room": row("q6", 0, "x" * 200, 0.0),
        "not_continued": row("q7", 0, "§", 0.0),
    }
    assert list(faults) == list(ATTEMPT_FAULTS)
    planned = plan([*faults.values(), row("q8", 0, "8", 0.0)], 9, branches=("wrong",), prompts=NoParagraphs(TOKENIZER))
    assert list(planned.attempts) == ["q8#0"]
    right = ("truncated", "thinking", "switched_off")
    branches = dict.fromkeys(faults, "wrong") | dict.fromkeys(right, "right") | {"verifier_error": "unjudged"}
    assert planned.left_out == {(branches[fault], fault): 1 for fault in faults}
    assert planned.judged == {"right": 3, "wrong": 5, "unjudged": 1} and planned.mean == round(3 / 8, 6)


def test_room_is_counted_in_tokens_with_prompt_and_phrase() -> None:
    length = len(PromptBuilder(TOKENIZER)("q0", QUESTION, "8\n\nWait, wrong.\n\n"))
    rows = [row("q0", 0, "8", 0.0)]
    assert plan(rows, max_model_len=length + 8).attempts
    assert plan(rows, max_model_len=length + 7).left_out == {("wrong", "no_room"): 1}
    assert plan(rows, max_model_len=None).attempts


def test_the_threshold_is_met_in_the_precision_of_rewards() -> None:
    assert plan([row("q0", 0, score=0.7)], threshold=0.7).judged == {"right": 1}


# --------------------------------------------------------------------------------------------------------------- traces


def test_right_revisions_of_both_branches_in_order() -> None:
    planned = plan([row("q0", 0, "8", 0.0), row("q0", 1, "7")])
    rows = [
        *(row("q0#1", 1, "seven: 7"), row("q0#1", 0, "9", 0.0)),
        *(row("q0#0", 1, "Good catch! so 7"), row("q0#0", 0, " 7"), row("q0#0", 2, "not asked"), row("q5#0", 0)),
    ]
    collected = choose(planned, rows)
    traces = [(t.attempt_index, t.revision_index, t.attempt, t.right, t.revision, t.cleaned) for t in collected.traces]
    assert traces == [
        (0, 0, "8", False, " 7", False),
        (0, 1, "8", False, "So 7", True),
        (1, 1, "7", True, "seven: 7", False),
    ]
    assert [t.phrase for t in collected.traces] == [PHRASES.wrong, PHRASES.wrong, PHRASES.right]
    assert collected.traces[0].messages == QUESTION and collected.traces[0].question_id == "q0"
    assert collected.revisions == {"wrong": 2, "right": 2} and collected.right == {"wrong": 2, "right": 1}
    assert (collected.rate("wrong"), collected.rate("right")) == (1.0, 0.5)
    assert (collected.count("wrong"), collected.count("right")) == (2, 1)
    assert collected.left_out == {("right", "wrong"): 1}


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_every_reason_for_no_trace(score: float) -> None:
    planned = plan([row("q0", 0, "8", score)])
    rows = [
        row("q0#0", 0, **BROKEN),
        row("q0#0", 1, truncated=True),
        row("q0#0", 2, score=0.0),
        row("q0#0", 3, "Thank you!"),
        row("q0#0", 4, "7<|im_end|>"),
        row("q0#0", 5, "You're right, it is 7. Bye."),
        *(row("q0#0", i, "7") for i in range(6, 10)),
    ]
    collected = choose(planned, rows, revisions=10, per_attempt=2, max_traces=1)
    branch = "right" if score else "wrong"
    once = {(branch, reason): 1 for reason in REVISION_FAULTS}
    assert collected.left_out == once | {(branch, "beyond_per_attempt"): 2}
    assert [t.revision_index for t in collected.traces] == [6]
    # Those without a verdict are no part of the rate; cut and unusable ones are.
    assert collected.judged[branch] == 9 and collected.rate(branch) == round(8 / 9, 6)
    assert collected.left_out.total() + len(collected.traces) == collected.revisions.total() == 10


def test_only_what_cleaning_changed_is_judged_again() -> None:
    asked: list[tuple[str, str]] = []

    def judge(texts: Sequence[tuple[SampleRequest, str]]) -> list[bool | None]:
        asked.extend((request.question_id, text) for request, text in texts)
        return [None]

    planned = plan([row("q0", 0, "8", 0.0)])
    loop = "\n\nThe answer is 7."
    collected = choose(planned, [row("q0#0", 0, "7"), row("q0#0", 1, "So" + loop * 9)], judge=judge)
    assert asked == [("q0", "So" + loop)]
    assert collected.left_out == {("wrong", "wrong_when_cleaned"): 1} and len(collected.traces) == 1


def test_a_revision_that_is_not_there_is_named() -> None:
    planned = plan([row("q0", 0, "8", 0.0)])
    with pytest.raises(StoreError, match=re.escape("revision 1 of attempt q0#0 is not in the store")):
        choose(planned, [row("q0#0", 0)])


def make_trace(question: int, number: int = 0) -> Trace:
    return Trace(f"q{question}", 0, number, QUESTION, "8", False, PHRASES.wrong, "7", False)


def test_traces_are_spread_over_the_questions() -> None:
    traces = [make_trace(q, n) for q in range(4) for n in range(q + 1)]
    assert spread(traces, None) == spread(traces, 10) == traces

    def kept(count: int) -> list[tuple[str, int]]:
        return [(t.question_id, t.revision_index) for t in spread(traces, count)]

    assert kept(2) == [("q0", 0), ("q2", 0)]
    assert kept(4) == [("q0", 0), ("q1", 0), ("q2", 0), ("q3", 0)]
    assert kept(5) == [("q0", 0), ("q1", 0), ("q1", 1), ("q2", 0), ("q3", 0)]


@given(st.lists(st.integers(1, 5), max_size=8), st.integers(1, 30))
def test_no_question_has_two_traces_more_than_another_that_has_some_left(sizes: list[int], count: int) -> None:
    traces = [make_trace(q, n) for q, size in enumerate(sizes) for n in range(size)]
    chosen = spread(traces, count)
    assert len(chosen) == min(count, len(traces)) and chosen == [t for t in traces if t in chosen]
    held = [sum(t.question_id == f"q{q}" for t in chosen) for q in range(len(sizes))]
    for q, size in enumerate(sizes):
        assert held[q] == size or held[q] >= max(held) - 1


def test_traces_come_back_from_the_file(tmp_path: Path) -> None:
    write_traces(tmp_path / "traces.parquet", [make_trace(1, 2)])
    table = pq.read_table(tmp_path / "traces.parquet")
    assert table.schema.equals(TRACE_SCHEMA)
    assert table.to_pylist() == [
        {
            **{"question_id": "q1", "attempt_index": 0, "revision_index": 2, "prompt": QUESTION, "attempt": "8"},
            **{"right": False, "phrase": PHRASES.wrong, "revision": "7", "cleaned": False},
        }
    ]
