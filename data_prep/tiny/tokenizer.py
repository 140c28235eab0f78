"""The tokenizer of the tiny world: single characters and a few longer pieces, with a chat template."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.tiny.task import MAX_LEVEL, TASK_PHRASE
from verl_ext.verifiers.tiny_world import LABELS

PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
VOCAB_SIZE = 128  # of the model; the ids not used here are padding, and room for the pieces of other flavours
MAX_POSITIONS = 512

# Whole pieces, one token each. Any other printable ASCII text is read character by character.
PIECES = (
    TASK_PHRASE,
    "Correct solution:",
    "Correctly solve the original question.",
    "\\boxed{",
    "user",
    "assistant",
    *(f"({label})" for label in LABELS[:MAX_LEVEL]),
    "The following is feedback from your unsuccessful earlier attempt:",
    "Step ",
    " is wrong.",
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' + '\\n' -}}{%- endif -%}"
)
"""Qwen's layout. ``enable_thinking`` and other arguments are accepted and have no effect."""


def build_tokenizer(extra_pieces: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer, the same for everyone; ``extra_pieces`` of a flavour get the ids after the common ones."""
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    tokens = [PAD, START, END, UNKNOWN, *characters, *PIECES, *extra_pieces]
    if len(set(tokens)) != len(tokens) or len(tokens) > VOCAB_SIZE:
        raise ValueError(f"{len(tokens)} tokens, {len(set(tokens))} of them distinct; at most {VOCAB_SIZE} fit")
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    longest_first = sorted((*PIECES, *extra_pieces), key=len, reverse=True)
    pattern = "|".join([*(re.escape(piece) for piece in longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
