"""Prompts of the sampler: messages, and where wanted an assistant turn that is already begun, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from verl_ext.contexts import PromptTokenizer


class PromptError(ValueError):
    """A prompt that cannot be made; the message names the question."""


class PromptBuilder:
    """Token ids as the rollouts of training see them, plus the ids of an open assistant turn.

    The prompt's ids stay exactly those of training: the prefix is tokenised by itself and set behind them.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._prompt = PromptTokenizer(tokenizer, self._kwargs)
        self._open_texts: dict[tuple[int, ...], str] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """Hash of the chat template and the arguments given to it."""
        template = self._tokenizer.get_chat_template()
        return {"hash": hashlib.sha256(str(template).encode()).hexdigest()[:32], "kwargs": self._kwargs}

    def __call__(self, question_id: str, messages: Sequence[Mapping[str, Any]], prefix: str | None) -> list[int]:
        """Prompt ids of one question.

        Raises:
            PromptError: no messages, a last message of the assistant, a template that refuses the messages or opens no
                assistant turn, or a prefix that does not come back from its tokens.
        """
        if not messages:
            raise PromptError(f"question {question_id} has no messages")
        if messages[-1].get("role") == "assistant":
            raise PromptError(
                f"question {question_id}: the last message is the assistant's; give the text of an open turn as prefix"
            )
        try:
            prompt = self._prompt(messages)
            if not prefix:
                return list(prompt)
            text = self._open_text(question_id, messages, prompt)
        except PromptError:
            raise
        except Exception as error:
            raise PromptError(f"question {question_id}: the chat template refuses it: {error}") from error
        ids = prompt + [int(token) for token in self._tokenizer.encode(prefix, add_special_tokens=False)]
        # Some tokenizers put a space before a text that stands alone, and small ones lack characters.
        read = self._tokenizer.decode(ids)
        if read != text + prefix:
            raise PromptError(
                f"question {question_id}: the tokenizer cannot continue the prefix {prefix[:80]!r}: its tokens read "
                f"{read[-len(prefix) - 20 :]!r}"
            )
        return ids

    def _open_text(self, question_id: str, messages: Sequence[Mapping[str, Any]], prompt: Sequence[int]) -> str:
        """A prompt as text. The chat template is asked once a prompt whether it opens a turn: many prefixes share one.

        Raises PromptError.
        """
        key = tuple(prompt)
        if key not in self._open_texts:
            self._check_turn_is_open(question_id, messages, prompt)
            self._open_texts[key] = self._tokenizer.decode(prompt)
        return self._open_texts[key]

    def _check_turn_is_open(
        self, question_id: str, messages: Sequence[Mapping[str, Any]], prompt: Sequence[int]
    ) -> None:
        closed = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=False,
            **self._kwargs,
        )
        if len(prompt) <= len(closed) or list(prompt[: len(closed)]) != [int(token) for token in closed]:
            raise PromptError(
                f"question {question_id}: the chat template opens no assistant turn (add_generation_prompt adds "
                "nothing), so no text can be continued"
            )


def prompt_digest(prompt_ids: Sequence[int]) -> str:
    """16 hex digits that name a prompt."""
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()[:16]
