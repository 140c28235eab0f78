"""Verifier of multiple-choice answers written ``<answer>B</answer>``.

The format is that of the SciKnowEval prompts of SDPO (repository lasgroup/SDPO at 0e6d510, arXiv 2601.20802): reasoning
in ``<reasoning>`` tags, then the option's letter alone in ``<answer>`` tags. Deliberate differences from that
repository's grader: a letter without tags does not count (``require_tags=False`` brings that rule back), ``format`` is
1.0 for a well-formed response (there it is inverted), and a wrong attempt gets feedback where that is safe.

Feedback and leaks: "the chosen option is wrong" names the right one where there are only two options. It is therefore
given only where the row lists three or more labels in ``extra_info["choices"]``; otherwise a well-formed wrong answer
gets no feedback. What is said about a missing or unreadable answer holds whatever the right option is.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

from verl_ext.verifiers.result import failure, same_text, verdict

ANSWER, REASONING = "answer", "reasoning"
DEFAULT_LABELS = tuple(string.ascii_uppercase)
FEWEST_OPTIONS_FOR_FEEDBACK = 3

NO_ANSWER_FEEDBACK = "No answer was found. End the response with <answer>, the letter of one option alone, </answer>."
UNREADABLE_FEEDBACK = "The text between <answer> and </answer> is not the letter of exactly one option."
WRONG_FEEDBACK = "The chosen option is wrong."


def last_block(text: str, tag: str) -> str | None:
    """Stripped content of the last ``<tag>`` that is closed by a ``</tag>``, or None; linear time.

    An opening tag inside an unclosed one starts afresh, so the content holds neither of the two tags.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.index(closing, start)].strip()


def _labels(extra_info: dict[str, Any] | None) -> tuple[tuple[str, ...], bool]:
    """The labels of the options, and whether the row itself lists them; ValueError where its list is unusable."""
    choices = None if extra_info is None else extra_info.get("choices")
    if choices is None:
        return DEFAULT_LABELS, False
    labels = tuple(choices) if isinstance(choices, Iterable) and not isinstance(choices, str | bytes | dict) else ()
    good = all(isinstance(label, str) and label and label == label.strip() for label in labels)
    if len(labels) < 2 or not good or len(set(labels)) != len(labels):
        raise ValueError(f"extra_info['choices'] is {choices!r:.200}; expected two or more different labels")
    return labels, True


def _well_formed(text: str, label: str, require_reasoning: bool) -> bool:
    """Whether there is one answer block, with one label in it, and before it one reasoning block where asked for."""
    tags = [f"<{ANSWER}>", f"</{ANSWER}>"]
    if require_reasoning:
        tags = [f"<{REASONING}>", f"</{REASONING}>", *tags]
    if not label or any(text.count(tag) != 1 for tag in tags):
        return False
    places = [text.index(tag) for tag in tags]
    return places == sorted(places)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    require_tags: bool = True,
    require_reasoning: bool = False,
) -> dict[str, Any]:
    """Compare the content of the last complete ``<answer>`` block with the label of the right option.

    The comparison is exact: another case, a full stop, the option's text or a look-alike letter of another script is
    not the label.

    Args:
        data_source: name of the data set; not used.
        solution_str: the decoded response.
        ground_truth: label of the right option, e.g. ``B``.
        extra_info: of the row; ``choices`` (a list of labels) is read where it is there, else the labels are A to Z.
        require_tags: if False, a response that is nothing but a label counts too (the rule of SDPO's grader).
        require_reasoning: whether ``format`` asks for one ``<reasoning>`` block before the answer as well.

    Returns:
        A dict in the shape of :mod:`verl_ext.verifiers.result`; ``pred`` is the label, "" where there is not exactly
        one. Status ``error`` where the gold answer is not one of the labels or the labels are unusable.
    """
    try:
        labels, listed = _labels(extra_info)
    except ValueError as error:
        return failure(str(error))
    gold = ground_truth.strip() if isinstance(ground_truth, str) else ground_truth
    if gold not in labels:
        return failure(f"ground truth {ground_truth!r:.200} is not one of the labels {', '.join(labels)}")
    if not isinstance(solution_str, str):
        return failure(f"the response is of type {type(solution_str).__name__}, expected str")

    content = last_block(solution_str, ANSWER)
    well_formed = _well_formed(solution_str, content or "", require_reasoning) and content in labels
    if content is None and not require_tags and solution_str.strip() in labels:
        content = solution_str.strip()
    pred = content if content in labels else ""
    if content is None:
        feedback = NO_ANSWER_FEEDBACK
    elif not pred:
        feedback = UNREADABLE_FEEDBACK
    else:
        feedback = WRONG_FEEDBACK if listed and len(labels) >= FEWEST_OPTIONS_FOR_FEEDBACK else ""
    return verdict(pred == gold, pred=pred, well_formed=well_formed, feedback=feedback)


equivalent = same_text
"""Labels are the same answer where their texts are."""


def gold_response(ground_truth: str, extra_info: dict[str, Any]) -> str:
    """A response that gives the gold answer in the asked-for form, to check rows with."""
    return f"<{ANSWER}>\n{ground_truth}\n</{ANSWER}>"
