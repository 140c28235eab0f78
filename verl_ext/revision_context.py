"""Teacher context "revision": the teacher reads the question, the student's own attempt and the phrase that the
attempt's reward chooses, and then scores that same attempt (SD-Zero, arXiv 2604.12002; public code
princeton-pli/Self-Distillation-Zero @ fdaeb0b).

The attempt stands in the sequence twice: in the teacher's prompt, where it is shown, and behind it, where it is scored.
That doubled length has to fit; the public code cuts the attempt, here its row is counted and left out.

Left out as well: an attempt that the verifier did not judge (no reward, no phrase), a blank one, one with a thinking
block (a revision cannot follow it within the turn), one that spells a special token of the tokenizer (it would end the
turn in the middle) and one that does not come back from its tokens.

Everything here is a pure function on the driver: no Ray, no verl.
Shape suffix: N rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_ext.contexts import Contexts, RowContext, check_lengths, checked_messages
from verl_ext.reference_text import SpecialTokens
from verl_ext.revision import Phrases, RevisionPrompts, has_thinking, turn_prefix, user_turn
from verl_ext.sampling_prompts import PromptError

LEFT_OUT = ("without_verdict", "blank", "thinking", "special_tokens", "not_continuable")
"""Reasons for a row to have no teacher prompt, the first that holds."""


def build_revision_contexts(
    raw_prompts_N: Sequence[Sequence[Mapping[str, Any]]],
    responses_N: Sequence[str],
    *,
    successes_N: Sequence[bool],
    judged_N: Sequence[bool],
    response_lengths_N: Sequence[int],
    tokenizer: Any,
    config: Any,
    template_kwargs: Mapping[str, Any] | None = None,
    max_total: int | None = None,
    row_names_N: Sequence[object] | None = None,
) -> Contexts:
    """Tokenise the teacher prompts of a whole batch; a row's context depends on that row alone.

    ``responses_N``: decoded texts without special tokens. ``successes_N``: which phrase a row gets; not looked at where
    ``judged_N`` is false (the verifier failed). ``config`` has the attributes ``phrase_right``, ``phrase_wrong``,
    ``placement`` and ``max_length`` (tokens). A teacher prompt, attempt included, of more than ``config.max_length``
    tokens, or one that together with the response (``response_lengths_N``, tokens) exceeds ``max_total`` (the model's
    limit; None: no limit), is counted and its row left out; nothing is ever cut.

    A row's ``messages`` end in what the teacher reads last: the begun assistant turn or the user turn.

    Metrics, counts of rows: ``context/rows``; ``phrase_right`` and ``phrase_wrong`` (rows with a teacher prompt, too
    long ones included); ``without_verdict``, ``blank``, ``thinking``, ``special_tokens`` and ``not_continuable`` (rows
    without one, each at its first reason); ``too_long``; ``distilled``. No count: ``prompt_tokens_mean`` over the
    distilled rows.

    Raises ValueError for columns of different length, phrases that nobody chose, an unknown placement or a prompt that
    does not end in a user turn with plain text (the row is named).
    """
    rows = len(raw_prompts_N)
    names = list(range(rows)) if row_names_N is None else list(row_names_N)
    check_lengths(
        rows,
        responses=responses_N,
        successes=successes_N,
        judged=judged_N,
        response_lengths=response_lengths_N,
        row_names=names,
    )
    prompts = RevisionPrompts(tokenizer, _phrases(config), config.placement, template_kwargs)
    special = SpecialTokens(tokenizer)
    outcomes: Counter[str] = Counter()
    contexts = []
    for i in range(rows):
        messages, attempt, right = checked_messages(raw_prompts_N[i], names[i]), responses_N[i], bool(successes_N[i])
        reason = _unfit(attempt, bool(judged_N[i]), special)
        if reason is None:
            try:
                ids = prompts(messages, attempt, right, row=names[i])
            except PromptError:
                reason = "not_continuable"
        outcomes[reason or ("phrase_right" if right else "phrase_wrong")] += 1
        if reason is not None:
            contexts.append(RowContext())
            continue
        too_long = len(ids) > config.max_length
        too_long |= max_total is not None and len(ids) + int(response_lengths_N[i]) > max_total
        contexts.append(
            RowContext(
                messages=_shown(prompts, messages, attempt, right),
                token_ids=None if too_long else ids,
                prompt_tokens=len(ids),
                too_long=bool(too_long),
            )
        )
    distilled = [context.prompt_tokens for context in contexts if context.distill]
    return Contexts(
        contexts,
        {
            "context/rows": float(rows),
            **{f"context/{name}": float(outcomes[name]) for name in ("phrase_right", "phrase_wrong", *LEFT_OUT)},
            "context/too_long": float(sum(context.too_long for context in contexts)),
            "context/distilled": float(len(distilled)),
            "context/prompt_tokens_mean": float(np.mean(distilled)) if distilled else 0.0,
        },
    )


def _phrases(config: Any) -> Phrases:
    if config.phrase_right is None or config.phrase_wrong is None:
        raise ValueError(
            f"context.phrase_right is {config.phrase_right!r} and context.phrase_wrong {config.phrase_wrong!r}: call "
            "recipe.revision_checks.resolve_phrases on the configuration first, it chooses those of the model"
        )
    return Phrases(config.phrase_right, config.phrase_wrong)


def _unfit(attempt: str, judged: bool, special: SpecialTokens) -> str | None:
    """Why the attempt cannot be shown, as far as its text says."""
    if not judged:
        return "without_verdict"
    if not attempt.strip():
        return "blank"
    if has_thinking(attempt):
        return "thinking"
    return None if special.first_in(attempt) is None else "special_tokens"


def _shown(prompts: RevisionPrompts, messages: list[dict[str, Any]], attempt: str, right: bool) -> list[dict[str, Any]]:
    """What the teacher reads, as messages."""
    phrase = prompts.phrases.of(right)
    if prompts.placement == "user":
        return user_turn(messages, attempt, phrase)
    return [*messages, {"role": "assistant", "content": turn_prefix(attempt, phrase)}]
