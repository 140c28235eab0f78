"""Traces as training rows: token ids exactly as rollouts and teacher see them, and which of them are trained.

With P the prompt's ids, A those of attempt and phrase in the open assistant turn and R those of the revision with its
end token, L_generation of SD-Zero (arXiv 2604.12002) trains on A and R behind P, L_revision on R behind P and A.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipe.srt_traces import Trace
from recipe.teacher_text_data import ChosenTexts, choose_texts
from verl_ext.config import ConfigError
from verl_ext.contexts import PromptTokenizer
from verl_ext.revision import Phrases, RevisionPrompts
from verl_ext.sample_store import StoreError
from verl_ext.sampling import SampleRequest

GENERATION, REVISION, PLAIN = "generation", "revision", "plain"
JOINT_FILE = "sft.parquet"
STAGE_FILES = {GENERATION: "sft_generation.parquet", REVISION: "sft_revision.parquet"}
ROW_FILES = (JOINT_FILE, *STAGE_FILES.values())
Row = dict[str, Any]


class TraceTokenizer:
    """Rows of traces: ``input_ids`` int32 [T], ``loss_mask`` int8 [T] (1 where a token is trained), ``kind`` and
    ``question_id``."""

    def __init__(
        self, tokenizer: Any, phrases: Phrases, placement: str, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """``placement`` is that of L_revision. Raises ConfigError for a tokenizer without an end token."""
        self._tokenizer, self._end = tokenizer, end_token(tokenizer)
        self._prompt = PromptTokenizer(tokenizer, template_kwargs)
        self._open_turn = RevisionPrompts(tokenizer, phrases, "assistant", template_kwargs)
        self._before_revision = RevisionPrompts(tokenizer, phrases, placement, template_kwargs)

    def generation(self, trace: Trace) -> Row:
        """L_generation: attempt, phrase and revision are trained."""
        before = self._open_turn(trace.messages, trace.attempt, trace.right, row=trace.question_id)
        return self._row(GENERATION, trace, before, len(self._prompt(trace.messages)))

    def revision(self, trace: Trace) -> Row:
        """L_revision: the revision alone is trained."""
        before = self._before_revision(trace.messages, trace.attempt, trace.right, row=trace.question_id)
        return self._row(REVISION, trace, before, len(before))

    def _row(self, kind: str, trace: Trace, before: Sequence[int], untrained: int) -> Row:
        ids = [*before, *_encode(self._tokenizer, trace.revision), self._end]
        return _row(kind, trace.question_id, ids, untrained)


@dataclass
class RowFiles:
    """Training rows by file, and how many were too long.

    Attributes:
        files: name -> its rows.
        too_long: kind -> rows of more tokens than allowed, which are left out.
        left_out: with rows of plain responses, reason of ``teacher_text_data.LEFT_OUT`` -> responses without a row.
    """

    files: dict[str, list[Row]] = field(default_factory=dict)
    too_long: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, int] = field(default_factory=dict)


def trace_rows(
    traces: Sequence[Trace],
    tokenizer: TraceTokenizer,
    losses: str,
    *,
    generation_rows: int | None = None,
    revision_rows: int | None = None,
    max_length: int | None = None,
) -> RowFiles:
    """The files of ``srt.losses``.

    ``two_stage`` is that of the public code: L_generation on traces of wrong attempts, L_revision on those of right
    attempts, then those of wrong ones. Where ``revision_rows`` bounds the second stage, the first one trains on what
    that leaves.

    Raises:
        StoreError: a file would be empty; says what to set.
    """
    rows = RowFiles()

    def take(make: Callable[[Trace], Row], trace: Trace) -> list[Row]:
        row = make(trace)
        if max_length is not None and len(row["input_ids"]) > max_length:
            rows.too_long[row["kind"]] += 1
            return []
        return [row]

    if losses == "two_stage":
        revisions: list[Row] = []
        remain: list[Trace] = []
        for trace in sorted(traces, key=lambda trace: not trace.right):
            # None: both stages see every trace of a wrong attempt.
            if revision_rows is None or len(revisions) < revision_rows:
                fits = take(tokenizer.revision, trace)
                revisions += fits
                if revision_rows is not None and fits:
                    continue
            remain.append(trace)
        generations: list[Row] = []
        for trace in remain:
            if not trace.right and (generation_rows is None or len(generations) < generation_rows):
                generations += take(tokenizer.generation, trace)
        rows.files = {STAGE_FILES[GENERATION]: generations, STAGE_FILES[REVISION]: revisions}
    else:
        makers = {GENERATION: tokenizer.generation, REVISION: tokenizer.revision}
        kinds = [kind for kind in makers if losses in ("joint", kind)]
        rows.files = {JOINT_FILE: [row for trace in traces for kind in kinds for row in take(makers[kind], trace)]}
    for file, content in rows.files.items():
        if not content:
            lost = ", ".join(f"{kind} {count}" for kind, count in rows.too_long.items()) or "none"
            wrong = sum(not trace.right for trace in traces)
            raise StoreError(
                f"{file} would have no row: {len(traces)} traces, {wrong} of wrong attempts; rows of more than "
                f"srt.max_length={max_length} tokens: {lost}. Set srt.max_length higher, "
                f"srt.revision_rows={revision_rows} lower (the stages share the traces), or srt.limit or srt.attempts "
                "higher; what was drawn is kept"
            )
    return rows


def plain_rows(
    store: Path,
    requests: Sequence[SampleRequest],
    tokenizer: Any,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    samples: int,
    threshold: float,
    per_question: int | None,
    special_token: Callable[[str], str | None],
    max_length: int | None = None,
) -> tuple[list[Row], ChosenTexts, int]:
    """Rejection-sampling fine-tuning (RFT): every right response of a sample store behind its prompt, each text once.

    Without ``per_question`` a question weighs as its pass rate says; with it, questions of many right responses do not
    drown the others.

    Args:
        store: whose rows :func:`verl_ext.pass_rate_store.read_pass_rates` accepts.
        samples, threshold, per_question, special_token: see :func:`recipe.teacher_text_data.choose_texts`.
        max_length: tokens of a row; longer ones are left out.

    Returns:
        the rows in the order of the requests, the texts with what was left out, and the number of rows too long.

    Raises:
        StoreError: there is no store, or a sample has no text.
        ConfigError: the tokenizer has no end token.
    """
    names = [request.question_id for request in requests]
    chosen = choose_texts(
        store,
        names,
        sampled=names,
        samples=samples,
        threshold=threshold,
        per_question=per_question,
        special_token=special_token,
    )
    prompt, end = PromptTokenizer(tokenizer, template_kwargs), end_token(tokenizer)
    rows: list[Row] = []
    too_long = 0
    for request in requests:
        for text in chosen.texts.get(request.question_id, ()):
            before = prompt(request.messages)
            row = _row(PLAIN, request.question_id, [*before, *_encode(tokenizer, text), end], len(before))
            if max_length is None or len(row["input_ids"]) <= max_length:
                rows.append(row)
            else:
                too_long += 1
    return rows, chosen, too_long


def end_token(tokenizer: Any) -> int:
    """The id with which a model ends its turn. Raises ConfigError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos_token, so no training row could end as a model's own turn")
    return int(tokenizer.eos_token_id)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """By itself, as a model continues the tokens of its prompt."""
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def _row(kind: str, question_id: str, ids: list[int], untrained: int) -> Row:
    # Arrays: lists of the same would take ten times the memory, gigabytes for the paper's 6,000 traces.
    mask = np.ones(len(ids), dtype=np.int8)
    mask[:untrained] = 0
    return {"input_ids": np.array(ids, np.int32), "loss_mask": mask, "kind": kind, "question_id": question_id}
