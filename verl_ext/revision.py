"""Self-revision (SD-Zero, arXiv 2604.12002): a question, an attempt at it, a control phrase chosen by the attempt's
reward, and a revision that follows.

One place decides what stands where, for collection (:mod:`recipe.srt`), for training along the traces and for the
teacher's context in distillation: the teacher then reads exactly what it was trained on. The phrase stands in the open
assistant turn, ``chat(x) + y + "\\n\\n" + P_r + "\\n\\n"`` (the paper, and the public code at collection and
distillation), or ends the user turn (the public code's second stage of fine-tuning).

Everything here is pure: no Ray, no verl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_ext.contexts import PromptTokenizer, checked_messages
from verl_ext.sampling_prompts import PromptBuilder, PromptError

SEPARATOR = "\n\n"
PLACEMENTS = ("assistant", "user")
THINKING_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class Phrases:
    """The control phrases: what stands between an attempt and its revision, by the attempt's outcome."""

    right: str
    wrong: str

    def of(self, right: bool) -> str:
        """P_r."""
        return self.right if right else self.wrong


_REPHRASE = "Let me rephrase the above solution."
# "paper": as third parties quote it; the others from the repository princeton-pli/Self-Distillation-Zero @ fdaeb0b.
PHRASES = {
    "paper": Phrases(_REPHRASE, "Wait, this response is not correct, let me start over."),
    "qwen": Phrases(_REPHRASE, "Wait, this response is wrong. Let me correct it."),
    "olmo": Phrases(_REPHRASE, "Wrong. I need to redo all."),
}
# `model_type` of a Hugging Face configuration -> whose phrases.
FAMILIES = {
    "qwen2": "qwen",
    "qwen2_moe": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
    "qwen3_next": "qwen",
    "olmo": "olmo",
    "olmo2": "olmo",
    "olmo3": "olmo",
}


def choose_phrases(name: str, model_type: str | None, *, right: str | None = None, wrong: str | None = None) -> Phrases:
    """The phrases of a name in ``PHRASES``, or for ``auto`` those of the model's family; given texts win.

    Raises ValueError for an unknown name, an empty text, or ``auto`` with a family that has none and no given texts.
    """
    for key, text in (("phrase_right", right), ("phrase_wrong", wrong)):
        if text is not None and not text.strip():
            raise ValueError(f"context.{key} is {text!r}; allowed: a phrase, or null for that of context.phrases")
    if right is not None and wrong is not None:
        return Phrases(right, wrong)
    if name != "auto" and name not in PHRASES:
        raise ValueError(f"context.phrases is {name!r}; allowed: auto, {', '.join(PHRASES)}")
    family = FAMILIES.get(str(model_type)) if name == "auto" else name
    if family is None:
        raise ValueError(
            f"models of type {model_type!r} have no control phrases of their own; set distill.context.phrases to one "
            f"of {', '.join(PHRASES)}, or both distill.context.phrase_right and distill.context.phrase_wrong"
        )
    chosen = PHRASES[family]
    return Phrases(right or chosen.right, wrong or chosen.wrong)


def turn_prefix(attempt: str, phrase: str) -> str:
    """What the open assistant turn holds before a revision."""
    return attempt + SEPARATOR + phrase + SEPARATOR


def user_turn(messages: Sequence[Mapping[str, Any]], attempt: str, phrase: str, *, row: object = None) -> list[dict]:
    """The messages with attempt and phrase at the end of the user turn; ``messages`` is not changed.

    Raises ValueError if the last message is not a user turn with plain text.
    """
    messages = checked_messages(messages, row)
    content = messages[-1]["content"] + SEPARATOR + attempt + SEPARATOR + phrase
    return [*messages[:-1], {**messages[-1], "content": content}]


class RevisionPrompts:
    """Token ids that a revision follows.

    With the placement ``assistant`` the ids of the student's own prompt come first, unchanged, and the rest of the
    turn is tokenised as one text behind them.
    """

    def __init__(
        self, tokenizer: Any, phrases: Phrases, placement: str, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"context.placement is {placement!r}; allowed: {', '.join(PLACEMENTS)}")
        self.phrases, self.placement = phrases, placement
        self._plain = PromptTokenizer(tokenizer, template_kwargs)
        self._continued = PromptBuilder(tokenizer, template_kwargs)

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], attempt: str, right: bool, *, row: object = None
    ) -> list[int]:
        """Prompt ids of one row.

        Raises:
            PromptError: the chat template opens no assistant turn, or the attempt does not come back from its tokens.
            ValueError: the last message is not a user turn with plain text.
        """
        phrase = self.phrases.of(right)
        if self.placement == "user":
            return list(self._plain(user_turn(messages, attempt, phrase, row=row)))
        return self._continued(str(row), checked_messages(messages, row), turn_prefix(attempt, phrase))


def check_continuation(
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "1+1"},),
) -> None:
    """Whether an assistant turn of this chat template can hold an attempt, a phrase and a revision.

    Raises:
        PromptError: the template opens no assistant turn, or opens a thinking block in it: attempt and revision would
            both be thoughts, and the answer would come after the revision only. Says what to set.
    """
    ids = PromptBuilder(tokenizer, template_kwargs)("of the check", messages, "2")
    text = tokenizer.decode(ids)
    opened = text.rfind(THINKING_TAGS[0])
    if opened >= 0 and THINKING_TAGS[1] not in text[opened:]:
        raise PromptError(
            f"the chat template with the arguments {dict(template_kwargs or {})} opens a thinking block "
            f"({THINKING_TAGS[0]}) in the assistant turn, where attempt, phrase and revision would stand: set "
            "data.apply_chat_template_kwargs={enable_thinking: false} if the template knows that, or take a model "
            "without thinking"
        )


def has_thinking(text: str) -> bool:
    """Whether an attempt holds a thinking block: it cannot stand before a phrase in an assistant turn."""
    return any(tag in text for tag in THINKING_TAGS)
