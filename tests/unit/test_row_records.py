"""The text of each token of a recorded response: joined, they are the response."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl_ext.row_records import token_texts


def bytes_alone() -> PreTrainedTokenizerFast:
    """Every byte is a token, as in the worst case of a byte-level vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def spaces_between() -> PreTrainedTokenizerFast:
    """Words with a marked space, which a decoder drops at the beginning of a text."""
    words = ["▁a", "▁cart", "▁moves", "s"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="s"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("text", ["p = m·v → 6 N·s", "日本語", "🙂🙂", "plain", ""])
def test_characters_of_several_bytes_belong_to_the_token_that_completes_them(text: str) -> None:
    tokenizer = bytes_alone()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) == len(text.encode()) and "".join(texts) == text
    assert [one for one in texts if one] == list(text)


def test_a_character_that_is_never_completed_is_shown_as_such() -> None:
    tokenizer = bytes_alone()
    ids = tokenizer("a·", add_special_tokens=False)["input_ids"][:-1]
    assert token_texts(tokenizer, ids) == ["a", "\ufffd"]


def test_spaces_between_words_are_kept() -> None:
    tokenizer = spaces_between()
    assert tokenizer.decode([1]) == "cart"  # alone, a word has lost its space
    assert token_texts(tokenizer, [0, 1, 2, 3]) == ["a", " cart", " moves", "s"]
