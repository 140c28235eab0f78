"""Cleaning of revisions before a model is trained on them (SD-Zero, arXiv 2604.12002, public code).

A control phrase reads like a remark of another person, so a chat model often answers it politely before it revises, and
some revisions end in a loop. Both would be learnt. Pure functions; neither changes a text without such a fault.
"""

from __future__ import annotations

import re

MAX_OPENERS = 5
OPENER_LENGTH = 300  # characters; what runs on for longer is no mere opener
SHORTEST_BLOCK, LONGEST_BLOCK = 10, 1500  # characters
REPEATS = 3
PASSES = 5

# Only what can hardly begin a solution: "Thanks to symmetry", "Sure enough" and "You are given" are none of them.
_OPENERS = (
    r"(?:oh,? )?you(?: a|['’])re (?:(?:absolutely|completely|totally|entirely|quite|indeed|so) )?(?:right|correct)\b",
    r"thank(?:s| you)(?: (?:so|very) much)?(?: for\b|[,.!])",
    r"(?:(?:that|this)(?: i|['’])s an? )?(?:really |very )?(?:good|great|nice|excellent|fantastic|wonderful|fair|sharp)"
    r" (?:question|catch|point|observation|eye)\b",
    r"i(?: (?:sincerely|deeply|do))? apologi[sz]e\b",
    r"(?:my (?:sincere )?)?apologies\b",
    r"(?:i(?: a|['’])m )(?:so |very |really |deeply )?sorry\b",
    r"sorry(?: (?:for|about)\b|[,.!])",
    r"(?:absolutely|certainly|of course|sure(?: thing)?|got it|understood)!",
)
_OPENER = re.compile(rf"(?:{'|'.join(_OPENERS)})(?!-)", re.IGNORECASE)
# A point inside a number or a word ends nothing.
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)*_]*(?=\s|$)|\n|$")
_SPACE = re.compile(r"\s*")


def remove_openers(text: str) -> str:
    """The text without the chat openers it begins with ("You're absolutely right …", "Thank you for …").

    A sentence goes up to its end or the end of the line, at most ``MAX_OPENERS`` of them; one of more than
    ``OPENER_LENGTH`` characters stays. The next word then begins with a capital letter, except in a new line (which may
    be code) or where it has one letter (which may be a variable).
    """
    position = 0
    start = _SPACE.match(text).end()
    same_line = True
    for _ in range(MAX_OPENERS):
        opener = _OPENER.match(text, start)
        if opener is None:
            break
        # From the last character of the opener, which may itself be the sentence's end.
        end = _SENTENCE_END.search(text, opener.end() - 1, start + OPENER_LENGTH + 1).end()
        if end - start > OPENER_LENGTH:
            break
        position = start = _SPACE.match(text, end).end()
        same_line = "\n" not in text[end - 1 : position]
    if position == 0:
        return text
    kept = text[position:]
    if same_line and kept[:1].islower() and kept[1:2].isalpha():
        kept = kept[0].upper() + kept[1:]
    return kept


def trim_repeats(text: str) -> str:
    """The text with a block that repeats at its very end cut to one copy; a prefix of the text.

    A block has ``SHORTEST_BLOCK`` to ``LONGEST_BLOCK`` characters and stands there ``REPEATS`` times or more, without
    anything between or behind. Where several blocks do, the one whose removal takes most goes first, so that a loop
    that itself ends in a row of equal signs goes as a whole. At most ``PASSES`` passes, each linear in the repeated
    part.
    """
    for _ in range(PASSES):
        surplus = _surplus(text)
        if not surplus:
            return text
        text = text[:-surplus]
    return text


def clean(text: str) -> str:
    """Both: :func:`remove_openers`, then :func:`trim_repeats`."""
    return trim_repeats(remove_openers(text))


def _surplus(text: str) -> int:
    """Characters of all copies but one of the block at the end; 0 where none repeats."""
    most = 0
    found: list[tuple[int, int]] = []  # period, length of its run
    for period in range(SHORTEST_BLOCK, min(LONGEST_BLOCK, len(text) // REPEATS) + 1):
        block = text[-period:]
        if not text.endswith(block * 2):
            continue
        # Two periods that share a run of their sum's length have a common one: the longer takes no more (Fine, Wilf).
        if any(run >= shorter + period for shorter, run in found):
            continue
        copies = 2
        while text.endswith(block, 0, len(text) - copies * period):
            copies += 1
        if copies >= REPEATS:
            found.append((period, copies * period))
            most = max(most, (copies - 1) * period)
    return most
