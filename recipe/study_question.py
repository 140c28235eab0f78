"""A question of a study's declaration: which two entries it compares, in what, and who claims it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recipe.study_values import expect
from verl_ext.config import ConfigError

QUESTION_KEYS = {
    "ask": "the claim in words",
    "first": "entry that is said to be better",
    "second": "entry that it is compared with; the same one with another step",
    "delta": "by more than this share (default 0)",
    "metric": "mean (default), maj, or pass@k",
    "step": "validation at this step (default: the last); of a method of several stages, the number of the model",
    "second_step": "the same for second, where it is another step",
    "pairing": "of the seeds: paired (default: equal seeds share the order of the data) or unpaired",
    "source": "who claims it, with the number",
    "claimed": "size of the claimed effect, a share: the page says how likely these runs would show one as large",
    "group": "heading under which the page puts the question",
}

_METRIC = re.compile(r"mean|maj|pass@[1-9][0-9]*")


@dataclass(frozen=True)
class StudyQuestion:
    """A claim that the study can answer: is ``first`` better than ``second`` by more than ``delta``?

    Attributes:
        ask: the claim in words.
        delta: a difference of shares.
        metric: ``mean``, ``maj`` or ``pass@k``.
        step: of the validation; None: the last.
        second_step: of the validation of ``second``; None: that of ``first``, or the last.
        pairing: of the seeds, see :mod:`recipe.paired`.
        source: who claims it.
        claimed: the effect that is claimed, a share; None: no number.
        group: a heading.
    """

    ask: str
    first: str
    second: str
    delta: float = 0.0
    metric: str = "mean"
    step: int | None = None
    second_step: int | None = None
    pairing: Literal["paired", "unpaired"] = "paired"
    source: str = ""
    claimed: float | None = None
    group: str = ""


def parse_questions(found: Any, entries: Sequence[str], where: str) -> tuple[StudyQuestion, ...]:
    """The questions of a file about its ``entries``. Raises ConfigError naming the question's place and key."""
    expect(isinstance(found, list), where, "questions", found, "a list of mappings")
    questions = []
    for number, one in enumerate(found):
        key = f"questions[{number}]"
        expect(isinstance(one, dict), where, key, one, f"a mapping with {', '.join(QUESTION_KEYS)}")
        unknown = [name for name in one if name not in QUESTION_KEYS]
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r} in {key}; allowed: {', '.join(QUESTION_KEYS)}")
        expect(isinstance(one.get("ask"), str) and one["ask"], where, f"{key}.ask", one.get("ask"), "a sentence")
        for name in ("first", "second"):
            expect(one.get(name) in entries, where, f"{key}.{name}", one.get(name), f"one of {', '.join(entries)}")
        made = StudyQuestion(**one)
        if made.first == made.second:
            steps = made.second_step is not None and made.second_step != made.step
            expect(steps, where, f"{key}.second", made.second, "another entry than first, or another second_step")
            # A run is not independent of itself.
            expect(made.pairing == "paired", where, f"{key}.pairing", made.pairing, "paired, for one entry")
        number_like = isinstance(made.delta, int | float) and not isinstance(made.delta, bool)
        expect(number_like and -1 <= made.delta <= 1, where, f"{key}.delta", made.delta, "a share from -1 to 1")
        metric = isinstance(made.metric, str) and _METRIC.fullmatch(made.metric)
        expect(metric, where, f"{key}.metric", made.metric, "mean, maj or pass@k with k from 1")
        for name, step in (("step", made.step), ("second_step", made.second_step)):
            whole = step is None or (type(step) is int and step >= 0)
            expect(whole, where, f"{key}.{name}", step, "a whole number from 0")
        expect(made.pairing in ("paired", "unpaired"), where, f"{key}.pairing", made.pairing, "paired or unpaired")
        for name, text in (("source", made.source), ("group", made.group)):
            expect(isinstance(text, str), where, f"{key}.{name}", text, "a text")
        sized = made.claimed is None or (isinstance(made.claimed, float) and 0 < made.claimed <= 1)
        expect(sized, where, f"{key}.claimed", made.claimed, "a share above 0, such as 0.032 for 3.2 points")
        questions.append(made)
    return tuple(questions)
