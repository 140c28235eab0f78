"""Words that only the teacher reads, found in what the student writes.

A teacher's context wraps the privileged text in phrases of its own ("reference solution", "Correctly solve the
original question"). A student that is trained to agree with such a teacher may begin to write as if it had read them.
The phrases come from the run's own templates; what a row's own prompt says is no leak. Pure: no files, no verl.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GRAM = 7  # words in a row that are told apart from chance; shorter phrases count as a whole, from three words on
SHORTEST = 3

# How a text speaks of something that only the teacher was shown, whatever the template.
PRIVILEGED = (
    "reference solution",
    "reference answer",
    "provided solution",
    "given solution",
    "sample solution",
    "example solution",
    "solution above",
    "earlier attempt",
    "previous attempt",
)
# Keys of ``distill.context`` that hold words of the teacher's prompt, by the kind of context.
TEMPLATES = {
    "sibling": ("reprompt_template", "solution_template", "feedback_template"),
    "reference": ("reference_template",),
    "revision": ("phrase_right", "phrase_wrong"),
}
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_PLACEHOLDER = re.compile(r"\{\w*\}")
_END_OF_PHRASE = re.compile(r"\n+|(?<=[.:;!?])\s+")


@dataclass(frozen=True)
class Leak:
    """A phrase of the teacher in a response: the row's place among those looked at, and the phrase."""

    row: int
    phrase: str


def words(text: str) -> str:
    """The words of a text in lower case, one space between them and around them."""
    return " " + " ".join(found.group().lower() for found in _WORD.finditer(text)) + " "


def template_phrases(context: Mapping[str, Any]) -> list[str]:
    """What a context's templates say themselves, in runs of ``GRAM`` words, and the ``PRIVILEGED`` phrases.

    Args:
        context: the block ``distill.context``.
    """
    found = dict.fromkeys(PRIVILEGED)
    for key in TEMPLATES.get(str(context.get("kind")), ()):
        text = context.get(key)
        if not isinstance(text, str):
            continue
        for line in _END_OF_PHRASE.split(_PLACEHOLDER.sub("\n", text)):
            said = words(line).split()
            if SHORTEST <= len(said) <= GRAM:
                found[" ".join(said)] = None
            for start in range(len(said) - GRAM):
                found[" ".join(said[start : start + GRAM])] = None
            if len(said) > GRAM:
                found[" ".join(said[-GRAM:])] = None
    return list(found)


def leaks(rows: Iterable[Mapping[str, Any]], phrases: Sequence[str]) -> list[Leak]:
    """The first phrase in each response that its own prompt does not say; rows without one are left out."""
    found = []
    for place, row in enumerate(rows):
        response, prompt = words(_text(row.get("response"))), words(_text(row.get("prompt")))
        phrase = next((one for one in phrases if f" {one} " in response and f" {one} " not in prompt), None)
        if phrase is not None:
            found.append(Leak(place, phrase))
    return found


def _text(value: Any) -> str:
    """A prompt may be a list of chat messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(_text(one.get("content")) for one in value if isinstance(one, Mapping))
    return ""
