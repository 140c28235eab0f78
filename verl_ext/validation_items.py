"""How many right answers each validation question got: what a comparison over questions needs beside the mean.

verl gives a question another uid in every validation, so the loader is asked which question it is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from verl_ext.validation import QuestionAnswers, QuestionKey, samples_asked


class NamingLoader:
    """A validation loader that remembers the names of the questions it gave out last, in their order."""

    def __init__(self, loader: Iterable[Mapping[str, Any]]) -> None:
        self._loader = loader
        self.names: list[str] = []

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        self.names = []
        for batch in self._loader:
            self.names += [question_name(info, prompt) for info, prompt in _questions(batch)]
            yield batch

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


def _questions(batch: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    prompts = batch["raw_prompt"]
    infos = batch.get("extra_info")
    return zip([None] * len(prompts) if infos is None else infos, prompts, strict=True)


def question_name(extra_info: Any, prompt: Any) -> str:
    """``extra_info.question_id``, or a digest of the prompt where the data has none."""
    found = extra_info.get("question_id") if isinstance(extra_info, Mapping) else None
    if found:
        return str(found)
    return hashlib.sha256(json.dumps(prompt, default=str, sort_keys=True).encode()).hexdigest()[:32]


def item_counts(
    questions: Mapping[QuestionKey, QuestionAnswers], asked: Sequence[QuestionKey], names: Sequence[str]
) -> dict[str, Any]:
    """Right and judged answers of every question, sorted by item.

    Args:
        questions: as judged.
        asked: their keys in the order in which the loader gave them out.
        names: the loader's names, in the same order.

    Returns:
        ``samples`` (k), and one entry per question in each of ``items`` (its name; one that stands in the data again
        ends in ``#2``), ``sources`` (data source), ``right`` (sum of verdicts) and ``judged`` (number of verdicts,
        fewer than ``samples`` where the verifier failed). mean@k is the mean of right / judged where judged > 0.

    Raises:
        ValueError: another number of names than of questions.
    """
    if len(asked) != len(names):
        raise ValueError(f"{len(asked)} questions were validated, and the loader named {len(names)}")
    seen: Counter[str] = Counter()
    rows = []
    for (source, uid), name in zip(asked, names, strict=True):
        seen[name] += 1
        verdicts = questions[source, uid].verdicts
        label = name if seen[name] == 1 else f"{name}#{seen[name]}"
        rows.append((label, source, _plain(sum(verdicts)), len(verdicts)))
    columns = zip(*sorted(rows), strict=True) if rows else ((),) * 4
    found = zip(("items", "sources", "right", "judged"), map(list, columns), strict=True)
    return {"samples": samples_asked(questions), **dict(found)}


def _plain(value: float) -> int | float:
    """A whole number as int: most verifiers say right or wrong."""
    return int(value) if value == int(value) else value
