"""Teacher context "reference": the teacher reads the question together with the data set's own reference text.

The last user turn is replaced by a template filled with the question and the reference text; earlier turns (a system
turn) stay. All rollouts of a question share one teacher prompt. The same rule with another template and another key of
``extra_info`` serves PACED's self-distillation (a solution), OPSD (a solution) and SDFT (a demonstration).

A row without a reference text has no context and carries no distillation loss. So has one whose reference text spells a
special token of the tokenizer (``<|im_end|>``): the chat template's text is tokenised as a whole, so the teacher would
read a control token that ends the user turn in the middle. Both are counted, and ``check_reference`` and
``check_special_tokens`` name them before a run starts.

Everything here is a pure function on the driver: no Ray, no verl.
Shape suffix: N rows.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_ext.contexts import Contexts, PromptTokenizer, RowContext, check_lengths, checked_messages, remove_thinking
from verl_ext.reference_text import SpecialTokens, reference_texts

# PACED (arXiv 2603.11178): the group's repository HJSang/OPSD_Reasoning_Compression.
REFERENCE_TEMPLATE = (
    "## Problem\n{problem}\n\n## Reference Solution\n{solution}\n\n"
    "After understanding the reference solution, solve the problem step by step using your own approach. "
    "The last line of your response should be of the form Answer: $Answer (without quotes) "
    "where $Answer is the answer to the problem."
)
# OPSD (arXiv 2601.18734), the later settings ("v3"): fork SaFo-Lab/PW-OPSD.
OPSD_TEMPLATE = (
    "Problem: {problem}\n\nHere is a reference solution to this problem:\n"
    "=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n"
    "\n\nAfter reading the reference solution above, make sure you truly understand the reasoning behind each step — "
    "do not copy or paraphrase it. Now, using your own words and independent reasoning, derive the same final answer "
    "to the problem above. Think step by step, explore different approaches, and don't be afraid to backtrack or "
    "reconsider if something doesn't work out:\n"
    "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
)
# OPSD, the first settings ("v1"): repository siyan-zhao/OPSD, snapshot of 10 March 2026.
OPSD_V1_TEMPLATE = (
    "{problem}\n\nHere is a reference solution to this problem:\n{solution}\n"
    "\n\nAfter understanding the reference solution and the rationale behind each step, now articulate your own "
    "step-by-step reasoning that derives the same final answer to the problem below:\n"
    "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
)
# SDFT (arXiv 2601.19897): public fork ayushnangia/Self-Distillation, where the placeholder is called "golden".
SDFT_TEMPLATE = (
    "\n{prompt}\n\nThis is an example for a response to the question:\n{solution}\n\n"
    "Now answer with a response of your own, including the thinking process.\n"
)

PROBLEM_KEY = "problem"
_PLACEHOLDERS = ("prompt", "problem", "solution")


@dataclass(frozen=True)
class ReferenceTemplate:
    """The text of the teacher's last user turn, filled once by ``str.format``.

    Placeholders: ``{solution}``, the reference text, which must be there; ``{prompt}``, the text of the student's last
    user turn; ``{problem}``, the bare question of ``extra_info.problem``, else the last user turn. Other braces are
    doubled.

    Raises ValueError, naming the template, for a broken format string, an unknown placeholder, one with a conversion or
    a format (``{solution:.100}`` would cut the text) or a missing ``{solution}``.
    """

    text: str = REFERENCE_TEMPLATE

    def __post_init__(self) -> None:
        try:
            fields = [field for field in string.Formatter().parse(self.text) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"reference_template: {self.text!r} is not a valid format string: {error}") from error
        unknown = sorted({name for _, name, _, _ in fields} - set(_PLACEHOLDERS))
        if unknown:
            raise ValueError(f"reference_template: unknown placeholder {unknown}; allowed are {list(_PLACEHOLDERS)}")
        for _, name, spec, conversion in fields:
            if spec or conversion:
                raise ValueError(f"reference_template: placeholder {name!r} may have no conversion and no format")
        if not self.uses("solution"):
            raise ValueError(f"reference_template: placeholder ['solution'] is missing in {self.text!r}")

    def uses(self, placeholder: str) -> bool:
        """Whether the placeholder occurs in the template."""
        return any(name == placeholder for _, name, _, _ in string.Formatter().parse(self.text))


def render_reference(
    messages: Sequence[Mapping[str, Any]],
    reference: str,
    problem: str | None = None,
    template: ReferenceTemplate | None = None,
    *,
    row: object = None,
) -> list[dict[str, Any]]:
    """The teacher's message list: all turns but the last as they are, the last user turn replaced by the template.

    ``problem`` is the bare question, None where the data set has none. Braces in the values are plain text.
    ``messages`` is not changed. ``row`` only names the row in an error.

    Raises ValueError if the last message is not a user turn with plain text.
    """
    messages = checked_messages(messages, row)
    prompt = messages[-1]["content"]
    text = (template or ReferenceTemplate()).text.format(
        prompt=prompt, problem=prompt if problem is None else problem, solution=reference
    )
    return [*messages[:-1], {**messages[-1], "content": text}]


def build_reference_contexts(
    raw_prompts_N: Sequence[Sequence[Mapping[str, Any]]],
    extra_infos_N: Sequence[Mapping[str, Any]],
    *,
    response_lengths_N: Sequence[int],
    tokenizer: Any,
    config: Any,
    template_kwargs: Mapping[str, Any] | None = None,
    max_total: int | None = None,
    row_names_N: Sequence[object] | None = None,
) -> Contexts:
    """Render and tokenise the teacher prompts of a whole batch; a row's context depends on that row alone.

    Rows of one question share ``messages`` and ``token_ids``: do not change them.

    ``config`` has the attributes ``reference_template``, ``reference_key`` (which text of ``extra_info``),
    ``max_length`` (tokens) and ``remove_thinking`` (from the reference text). A teacher prompt of more than
    ``config.max_length`` tokens, or one that together with the response (``response_lengths_N``, tokens) exceeds
    ``max_total`` (the model's limit; None: no limit), is counted and its row left out; nothing is ever cut.

    Metrics, counts of rows: ``context/rows``, ``with_reference`` (rows whose prompt has one, too long ones included),
    ``without_context``, of these ``special_tokens`` (the text spells one), ``problem_from_prompt`` (``{problem}`` is
    the last user turn for want of a bare question), ``too_long``, ``distilled``; ``prompts_rendered`` counts distinct
    prompts, and ``prompt_tokens_mean`` is over the distilled rows.

    Sources: PACED (arXiv 2603.11178), OPSD (arXiv 2601.18734), SDFT (arXiv 2601.19897).

    Raises ValueError for a bad template, columns of different length, a prompt that does not end in a user turn with
    plain text, or a reference text or question that is not text; the row is named.
    """
    rows = len(raw_prompts_N)
    names = list(range(rows)) if row_names_N is None else list(row_names_N)
    check_lengths(rows, extra_infos=extra_infos_N, response_lengths=response_lengths_N, row_names=names)
    template = ReferenceTemplate(config.reference_template)
    asks_problem = template.uses("problem")
    tokenize = PromptTokenizer(tokenizer, template_kwargs)
    special = SpecialTokens(tokenizer)
    # Text as read -> text as shown and whether it spells a special token, once a question rather than once a row.
    prepared: dict[str, tuple[str, bool]] = {}
    # Rollouts of a question share messages and ids: a batch holds, and hashes, one long prompt a question.
    rendered: dict[tuple[str | None, str, str], tuple[list[dict[str, Any]], list[int]]] = {}
    contexts = []
    special_rows = fallback_rows = 0
    for i in range(rows):
        reference = _text(extra_infos_N[i], config.reference_key, names[i])
        if reference not in prepared:
            shown = remove_thinking(reference) if config.remove_thinking else reference
            prepared[reference] = (shown, special.first_in(shown) is not None)
        shown, spells_special = prepared[reference]
        if spells_special or not shown.strip():
            special_rows += spells_special
            contexts.append(RowContext())
            continue
        problem = _text(extra_infos_N[i], PROBLEM_KEY, names[i]) if asks_problem else ""
        fallback_rows += asks_problem and not problem.strip()
        key = (_prompt_key(raw_prompts_N[i]), problem, reference)
        if key[0] is None or key not in rendered:
            messages = render_reference(
                raw_prompts_N[i], shown, problem if problem.strip() else None, template, row=names[i]
            )
            rendered[key] = messages, tokenize(messages)
        messages, ids = rendered[key]
        too_long = len(ids) > config.max_length
        too_long |= max_total is not None and len(ids) + int(response_lengths_N[i]) > max_total
        contexts.append(
            RowContext(
                messages=messages,
                token_ids=None if too_long else ids,
                prompt_tokens=len(ids),
                too_long=bool(too_long),
            )
        )
    distilled = [context.prompt_tokens for context in contexts if context.distill]
    with_reference = sum(context.messages is not None for context in contexts)
    return Contexts(
        contexts,
        {
            "context/rows": float(rows),
            "context/with_reference": float(with_reference),
            "context/without_context": float(rows - with_reference),
            "context/special_tokens": float(special_rows),
            "context/problem_from_prompt": float(fallback_rows),
            "context/too_long": float(sum(context.too_long for context in contexts)),
            "context/distilled": float(len(distilled)),
            "context/prompts_rendered": float(tokenize.calls),
            "context/prompt_tokens_mean": float(np.mean(distilled)) if distilled else 0.0,
        },
    )


def _prompt_key(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """A key of the student's prompt, None where a message holds something beside plain values."""
    try:
        return json.dumps(list(messages), ensure_ascii=False)
    except TypeError:
        return None


def _text(extra_info: Mapping[str, Any], key: str, row: object) -> str:
    """``extra_info[key]``, "" where it is missing or None; ValueError where it is anything but text."""
    value = _checked_info(extra_info, row).get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        # A list could be lines of one text or several texts: it is the data preparation that knows.
        raise ValueError(
            f"row {row}: extra_info.{key} must be one text to be shown to the teacher, "
            f"found {type(value).__name__}: {value!r:.80}"
        )
    return value


def _checked_info(extra_info: Mapping[str, Any], row: object) -> Mapping[str, Any]:
    if not isinstance(extra_info, Mapping):
        raise ValueError(f"row {row}: extra_info must be a mapping, found {type(extra_info).__name__}")
    return extra_info


# ------------------------------------------------------------------------------------------------ before a run starts


def check_reference(
    rows: Iterable[Mapping[str, Any]], key: str, *, lists: bool = False, thinking_removed: bool = False
) -> list[tuple[int, str | None]]:
    """The rows without a reference text, as (row number from 0, ``question_id`` or None), for the start of a run.

    ``rows`` are the rows' ``extra_info``. ``lists``: a list of texts will do too (texts that are replayed as responses,
    see ``verl_ext.reference_text``). ``thinking_removed``: text inside a thinking block does not count.

    Raises ValueError if there are rows and none has the key at all, with the keys there are; and for a value that is
    not text, with its row.
    """
    missing: list[tuple[int, str | None]] = []
    keys: set[str] = set()
    for number, extra_info in enumerate(rows):
        texts = _texts(extra_info, key, number, lists)
        keys.update(extra_info)
        if not any((remove_thinking(text) if thinking_removed else text).strip() for text in texts):
            missing.append((number, _question_id(extra_info)))
    if missing and key not in keys:
        raise ValueError(f"no row has the reference text extra_info.{key}; the keys of extra_info are {sorted(keys)}")
    return missing


def check_special_tokens(
    rows: Iterable[Mapping[str, Any]], key: str, tokenizer: Any, *, lists: bool = False, thinking_removed: bool = False
) -> list[tuple[int, str | None, str]]:
    """The rows whose reference text spells a special token: (row number from 0, ``question_id`` or None, the token).

    Arguments and ValueError for a value that is not text as in ``check_reference``.
    """
    special = SpecialTokens(tokenizer)
    found: list[tuple[int, str | None, str]] = []
    for number, extra_info in enumerate(rows):
        for text in _texts(extra_info, key, number, lists):
            token = special.first_in(remove_thinking(text) if thinking_removed else text)
            if token is not None:
                found.append((number, _question_id(extra_info), token))
                break
    return found


def _texts(extra_info: Mapping[str, Any], key: str, row: int, lists: bool) -> list[str]:
    if not lists:
        return [_text(extra_info, key, row)]
    _checked_info(extra_info, row)
    try:
        return reference_texts(extra_info, key)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error


def _question_id(extra_info: Mapping[str, Any]) -> str | None:
    value = extra_info.get("question_id")
    return None if value is None else str(value)
