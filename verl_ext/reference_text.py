"""Reference texts as responses: the sequences along which a teacher is matched off-policy.

PACED's distillation track (arXiv 2603.11178, section 6.2 of the project's method notes) scores the data set's expert
text instead of a student rollout. Such a text becomes the assistant's turn: the tokens a model would have written after
the generation prompt of the chat template, with the token it ends its turn with.

The text is taken as it is, outer white space included, and tokenised by itself, because a model continues the tokens of
its prompt too. The ids therefore equal those that the chat template gives to a whole conversation, except where

* the template puts something of its own into the turn (Qwen3 writes an empty thinking block unless the generation
  prompt has one already, ``enable_thinking=False``);
* the template changes the content (Llama 3 takes off outer white space);
* the tokenizer joins the end of the generation prompt with the start of the text (a text that begins with a line end);
* the template ends a turn with another token than ``tokenizer.eos_token`` (Qwen3's base models).

A text that spells a special token (``<|im_end|>``) is refused. As a control token it would end the turn in the middle,
as plain characters the student would learn to write them; mostly it comes from samples that were decoded with their
special tokens. Other added tokens, such as Qwen3's ``<think>``, are what a model writes itself, and stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_ext.contexts import check_template_kwargs

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


class SpecialTokens:
    """Finds the special tokens of a tokenizer where a text spells them out."""

    def __init__(self, tokenizer: Any) -> None:
        # Llama 3 and Qwen3 mark control tokens in their vocabulary without naming them as special tokens.
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= set(tokenizer.all_special_tokens)
        longest_first = sorted(tokens - {""}, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def first_in(self, text: str) -> str | None:
        """The first special token that the text spells, None where there is none."""
        found = None if self._pattern is None else self._pattern.search(text)
        return None if found is None else found[0]


def reference_texts(extra_info: Mapping[str, Any], key: str) -> list[str]:
    """The texts that ``extra_info[key]`` holds, one string or a list of strings, without the blank ones.

    A key that is missing or None means no text: []. Raises ValueError for any other value.
    """
    value = extra_info.get(key)
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple | np.ndarray) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"extra_info.{key} must be text or a list of texts, found {type(value).__name__}: {value!r:.80}"
        )
    return [str(text) for text in texts if text.strip()]


def pick_reference(texts: Sequence[Any], rollout_index: int) -> Any:
    """The text that rollout ``rollout_index`` (from 0) replays: the texts in turn, so that n rollouts spread over them.

    Raises ValueError for no texts or a negative index.
    """
    if not texts:
        raise ValueError("there is no reference text to pick from")
    if rollout_index < 0:
        raise ValueError(f"rollout index {rollout_index} is negative")
    return texts[rollout_index % len(texts)]


def reference_responses(
    extra_info: Mapping[str, Any],
    key: str,
    tokenizer: Any,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    limit: int,
) -> list[list[int]]:
    """Token ids of the texts of ``extra_info[key]`` that fit into ``limit`` tokens; see :func:`reference_response_ids`.

    Raises ValueError as the two functions above and below do.
    """
    texts = reference_texts(extra_info, key)
    responses = [
        reference_response_ids(text, tokenizer, template_kwargs=template_kwargs, limit=limit) for text in texts
    ]
    return [ids for ids in responses if ids is not None]


def reference_response_ids(
    text: str, tokenizer: Any, *, template_kwargs: Mapping[str, Any] | None = None, limit: int
) -> list[int] | None:
    """Token ids of the text as the assistant's response, ending in ``tokenizer.eos_token_id``.

    Where the generation prompt, rendered with ``template_kwargs`` (the ``data.apply_chat_template_kwargs`` of the
    rollouts), already opens a thinking block, the text's own ``<think>`` is not repeated. Where it equals the chat
    template's rendering of a conversation: see the module's docstring.

    None where there are more than ``limit`` tokens, the end token included: a text is never cut.

    Raises ValueError for a blank text, one that spells a special token, has characters the tokenizer lacks, or has no
    thinking to close although the generation prompt opens it; for a tokenizer without an end token; and for a limit
    below 1.
    """
    if limit < 1:
        raise ValueError(f"the limit of a response is {limit} tokens; at least 1 is needed")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so a reference text cannot be ended as a model's own turn")
    if not text.strip():
        raise ValueError("the reference text is blank")
    special = SpecialTokens(tokenizer).first_in(text)
    if special is not None:
        raise ValueError(f"the reference text spells the special token {special!r}: {text!r:.80}")
    text = _continue_thinking(text, _generation_prompt(tokenizer, template_kwargs or {}))
    ids = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise ValueError(f"the reference text has characters that the tokenizer lacks: {text!r:.80}")
    ids.append(int(tokenizer.eos_token_id))
    return ids if len(ids) <= limit else None


def _generation_prompt(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> str:
    """A rendered prompt; only its end matters."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": "."}],
        add_generation_prompt=True,
        tokenize=False,
        **check_template_kwargs(template_kwargs),
    )


def _continue_thinking(text: str, prompt: str) -> str:
    """The text as it goes on after a prompt that may end in an open ``<think>``."""
    if not prompt.rstrip().endswith(_THINK_OPEN):
        return text
    if _THINK_CLOSE not in text:
        raise ValueError(
            f"the chat template's generation prompt opens {_THINK_OPEN}, but the reference text never closes it and "
            f"would be replayed as thinking: {text!r:.80}; switch thinking off in data.apply_chat_template_kwargs or "
            "use texts with their thinking"
        )
    opening = prompt[prompt.rindex(_THINK_OPEN) :]
    return text.removeprefix(opening) if text.startswith(opening) else text.removeprefix(_THINK_OPEN)
