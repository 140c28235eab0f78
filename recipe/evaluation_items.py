"""One evaluation item by item: verdicts, keys of the answers, lengths. What comparisons are made from.

Shapes: P items, K samples each, in the order of the samples' numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from data_prep.sources import sha256_of
from recipe.run_files import json_line, read_json_lines
from verl_ext.answer_keys import AnswerKeys
from verl_ext.atomic import write_atomically
from verl_ext.sample_store import StoreError
from verl_ext.sampling import SampleRequest
from verl_ext.verifiers.result import OK, TIMEOUT

RESULT, ITEMS = "evaluation.json", "items.jsonl"
"""Files of an evaluation's folder."""
FORMAT = 1
"""Of both."""


class ItemError(ValueError):
    """Items that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Item:
    """A question and its K samples.

    Attributes:
        item: id of the question.
        data_source: of the question.
        question: digest of messages and right answer: equal where two evaluations asked the same.
        correct: [K] verdicts, None where the verifier could not judge.
        answers: [K] keys (:mod:`verl_ext.answer_keys`): equal where the verifier takes the answers for the same; "" or
            None where there is no answer or no verdict.
        statuses: [K] of the verifier.
        tokens: [K] of the response.
        truncated: [K] whether the response was cut off.
        format: [K] 1 where the response has the shape asked for; None where the verifier did not say.
    """

    item: str
    data_source: str
    question: str
    correct: list[float | None]
    answers: list[str | None]
    statuses: list[str]
    tokens: list[int]
    truncated: list[bool]
    format: list[float | None]

    @property
    def verdicts(self) -> list[float]:
        """Those that there are."""
        return [verdict for verdict in self.correct if verdict is not None]

    @property
    def votes(self) -> list[str | None]:
        """The answers that belong to :attr:`verdicts`."""
        return [answer for answer, verdict in zip(self.answers, self.correct, strict=True) if verdict is not None]

    @property
    def timeouts(self) -> int:
        """Of the samples without a verdict."""
        return self.statuses.count(TIMEOUT)

    def first(self, samples: int) -> Item:
        """With the first so many samples."""
        lists = ("correct", "answers", "statuses", "tokens", "truncated", "format")
        return replace(self, **{name: getattr(self, name)[:samples] for name in lists})


def question_digest(request: SampleRequest) -> str:
    """16 hex digits of what is asked and what is right."""
    messages = [[message.get("role"), message.get("content")] for message in request.messages]
    text = json.dumps([messages, request.ground_truth], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def build_items(
    requests: Sequence[SampleRequest], rows: Iterable[Mapping[str, Any]], samples: int, keys: AnswerKeys
) -> list[Item]:
    """The first ``samples`` rows of every question, in the order of the requests.

    Raises:
        StoreError: a sample is missing; names the question.
    """
    by_question: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_question[row["question_id"]][row["sample"]] = row
    found: list[tuple[SampleRequest, list[Mapping[str, Any]]]] = []
    for request in requests:
        drawn = by_question.get(request.question_id, {})
        missing = [sample for sample in range(samples) if sample not in drawn]
        if missing:
            raise StoreError(f"question {request.question_id} lacks sample {missing[0]}; run the same command again")
        found.append((request, [drawn[sample] for sample in range(samples)]))
    answers_PK = keys([[row.get("pred") if row["status"] == OK else None for row in part] for _, part in found])
    return [
        Item(
            item=request.question_id,
            data_source=str(request.data_source),
            question=question_digest(request),
            correct=[float(row["acc"]) if row["status"] == OK else None for row in part],
            answers=answers_K,
            statuses=[str(row["status"]) for row in part],
            tokens=[int(row["tokens"]) for row in part],
            truncated=[bool(row["truncated"]) for row in part],
            format=[row.get("format") for row in part],
        )
        for (request, part), answers_K in zip(found, answers_PK, strict=True)
    ]


def write_items(path: Path, items: Iterable[Item]) -> str:
    """Writes a JSON object a line, with the counts beside the lists; returns the file's SHA-256."""
    text = ""
    for item in items:
        counts = {"samples": len(item.correct), "judged": len(item.verdicts), "right": sum(item.verdicts)}
        text += json_line(asdict(item) | counts) + "\n"
    write_atomically(path, text)
    return sha256_of(path)


def read_items(path: Path) -> list[Item]:
    """Raises ItemError, or RunFileError for a damaged line."""
    names = [field.name for field in fields(Item)]
    items = []
    for number, row in enumerate(read_json_lines(path), start=1):
        missing = [name for name in names if name not in row]
        if missing:
            raise ItemError(
                f"{path}, line {number}: {missing[0]!r} is missing; is this the items file of an evaluation?"
            )
        items.append(Item(**{name: row[name] for name in names}))
    return items
