"""Reference texts as responses: reading them, their token ids against whole conversations, and their turns."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from verl_ext.reference_text import SpecialTokens, pick_reference, reference_response_ids, reference_texts

ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "Work left to right mod 10: 4(a)+6"}]
CONTROLS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin|>", "<|header|>", "<|/header|>")

# What each family's chat template does to a user and an assistant turn, in our own words.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
OLMO3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %}<|endoftext|>{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinks %}<think>{% endif %}{% endif %}"
)


def family_tokenizer(template: str, end: str, merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, control tokens and Qwen3's thinking tags, which are added tokens but no special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["".join(pair) for pair in merges or []]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *joined])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges or []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROLS])
    backend.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, chat_template=template)


@pytest.fixture(scope="module")
def qwen3():
    return family_tokenizer(QWEN3, "<|im_end|>")


@pytest.fixture(scope="module")
def llama3():
    return family_tokenizer(LLAMA3, "<|im_end|>")


@pytest.fixture(scope="module")
def olmo3():
    return family_tokenizer(OLMO3, "<|endoftext|>")


@pytest.fixture(scope="module", params=["plain", "formats"])
def tiny_world(request):
    return AutoTokenizer.from_pretrained(ROOT / "models" / "tiny_world" / request.param)


def continues(text: str, tokenizer, **kwargs) -> bool:
    """Whether generation prompt and response ids are how the chat template's whole conversation begins."""
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False, **kwargs)
    answered = [*QUESTION, {"role": "assistant", "content": text}]
    whole = tokenizer.apply_chat_template(answered, add_generation_prompt=False, return_dict=False, **kwargs)
    ours = prompt + reference_response_ids(text, tokenizer, template_kwargs=kwargs, limit=10_000)
    return whole[: len(ours)] == ours


# ------------------------------------------------------------------------------------------------------ reading texts


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one", ["one"]),
        (" kept \n", [" kept \n"]),
        (["a", "b"], ["a", "b"]),
        (("a", " \n", "", "b", "a"), ["a", "b", "a"]),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ("", []),
        ([], []),
        (None, []),
    ],
)
def test_texts_of_a_row(value, expected):
    found = reference_texts({"solution": value}, "solution")
    assert found == expected and all(type(text) is str for text in found)


def test_a_missing_key_means_no_text():
    assert reference_texts({"other": "x"}, "solution") == []


@pytest.mark.parametrize("value", [3, float("nan"), b"bytes", ["a", None], ["a", ["b"]], {"a": "b"}, np.array([1.0])])
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="extra_info.solution must be text or a list of texts"):
        reference_texts({"solution": value}, "solution")


# -------------------------------------------------------------------------------------------------------- picking one


@given(st.integers(1, 5), st.integers(1, 17))
def test_rollouts_spread_over_the_texts(texts, rollouts):
    names = [str(i) for i in range(texts)]
    counts = Counter(pick_reference(names, i) for i in range(rollouts))
    assert max(counts.values()) - min(counts[name] for name in names) <= 1
    assert pick_reference(names, 0) == "0"


def test_there_must_be_something_to_pick():
    with pytest.raises(ValueError, match="no reference text"):
        pick_reference([], 0)
    with pytest.raises(ValueError, match="-1 is negative"):
        pick_reference(["a"], -1)


# ---------------------------------------------------------------------------------------------------------- token ids

printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40).filter(str.strip)


def test_tiny_world_conversations_begin_with_the_ids(tiny_world):
    for text in ("(a)4+6=0\\boxed{0}", "Step (a) is wrong.\n(a)4+6=0\\boxed{0}", " leading and trailing \n", "x"):
        assert continues(text, tiny_world)


@given(text=printable)
@settings(deadline=None)
def test_any_text_in_the_tiny_world(tiny_world, text):
    assert continues(text, tiny_world)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).map(str.strip).filter(bool))
@settings(deadline=None)
def test_any_text_in_other_families(qwen3, llama3, olmo3, text):
    assert continues(text, llama3)
    assert continues(text, olmo3)
    assert continues(text, qwen3, enable_thinking=False)


def test_ids_are_the_text_and_the_end_of_the_turn(qwen3, olmo3):
    ids = reference_response_ids(" Häh?\n", qwen3, limit=100)
    assert ids[-1] == qwen3.convert_tokens_to_ids("<|im_end|>") and qwen3.decode(ids[:-1]) == " Häh?\n"
    assert len(ids) == len(" Häh?\n".encode()) + 1 and all(type(token) is int for token in ids)
    assert reference_response_ids("x", olmo3, limit=9)[-1] == olmo3.convert_tokens_to_ids("<|endoftext|>")


def test_no_token_is_put_in_front():
    """Llama's tokenizers begin every text with a token of their own unless told not to."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = family_tokenizer(LLAMA3, "<|im_end|>")
    start = tokenizer.convert_tokens_to_ids("<|begin|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", start)]
    )
    assert tokenizer.encode("x")[0] == start
    assert tokenizer.decode(reference_response_ids("x", tokenizer, limit=9)) == "x<|im_end|>"
    assert continues("x", tokenizer)


def test_where_a_conversation_differs(qwen3, llama3):
    """The cases that the module's docstring names."""
    assert not continues("answer", qwen3)  # the template writes an empty thinking block of its own
    assert not continues(" answer ", llama3)  # the template takes off outer white space
    joining = family_tokenizer(OLMO3, "<|endoftext|>", merges=[("Ċ", "Ċ")])
    assert continues("answer", joining) and not continues("\nanswer", joining)  # two line ends become one token
    assert not continues("answer", family_tokenizer(OLMO3, "<|im_end|>"))  # the template ends in another token


def test_a_thinking_block_that_the_prompt_opened_is_continued(olmo3):
    kwargs = {"thinks": True}
    text = "<think>4+6 is 10</think>0"
    assert continues(text, olmo3, **kwargs)
    ids = reference_response_ids(text, olmo3, template_kwargs=kwargs, limit=100)
    assert olmo3.decode(ids) == "4+6 is 10</think>0<|endoftext|>"
    # a text that was recorded behind such a prompt
    assert ids == reference_response_ids("4+6 is 10</think>0", olmo3, template_kwargs=kwargs, limit=100)
    assert olmo3.decode(reference_response_ids(text, olmo3, limit=100)) == text + "<|endoftext|>"
    with pytest.raises(ValueError, match="opens <think>, but the reference text never closes it.*'4'"):
        reference_response_ids("4", olmo3, template_kwargs=kwargs, limit=100)


def test_the_line_end_behind_an_opened_thinking_block_is_not_repeated():
    tokenizer = family_tokenizer("<|im_start|>{% if add_generation_prompt %}<think>\n{% endif %}", "<|im_end|>")
    for text in ("<think>\na</think>b", "<think>a</think>b", "a</think>b"):
        assert tokenizer.decode(reference_response_ids(text, tokenizer, limit=20)) == "a</think>b<|im_end|>"


def test_a_text_is_never_cut(qwen3):
    text = "twelve bytes"
    assert len(reference_response_ids(text, qwen3, limit=13)) == 13
    assert reference_response_ids(text, qwen3, limit=12) is None
    with pytest.raises(ValueError, match="limit.*0"):
        reference_response_ids(text, qwen3, limit=0)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|header|>"])
def test_a_spelt_special_token_is_refused(token, qwen3):
    for text in (f"so 4{token}", f"a{token}b", token):
        with pytest.raises(ValueError, match="spells the special token"):
            reference_response_ids(text, qwen3, limit=99)


def test_tags_that_are_no_special_tokens_stay(qwen3):
    ids = reference_response_ids("<think>a</think>b", qwen3, limit=99)
    assert ids[0] == qwen3.convert_tokens_to_ids("<think>") and qwen3.decode(ids) == "<think>a</think>b<|im_end|>"


def test_special_tokens_are_found_where_only_the_vocabulary_marks_them(qwen3):
    assert "<|header|>" not in qwen3.all_special_tokens
    special = SpecialTokens(qwen3)
    assert special.first_in("a <|im_end|> <|header|>") == "<|im_end|>"
    assert special.first_in("a <|header|>") == "<|header|>"
    assert special.first_in("<|im_end| > |im_end|") is None
    bare = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    assert SpecialTokens(PreTrainedTokenizerFast(tokenizer_object=bare)).first_in("anything") is None


def test_what_cannot_be_replayed_is_refused(tiny_world, qwen3):
    with pytest.raises(ValueError, match="characters that the tokenizer lacks"):
        reference_response_ids("Häh?", tiny_world, limit=99)
    with pytest.raises(ValueError, match="blank"):
        reference_response_ids(" \n", qwen3, limit=99)
    endless = copy.deepcopy(qwen3)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        reference_response_ids("x", endless, limit=99)
    with pytest.raises(ValueError, match="add_generation_prompt"):
        reference_response_ids("x", qwen3, template_kwargs={"add_generation_prompt": False}, limit=99)


def test_the_tokenizer_is_left_as_it_was(qwen3):
    before = qwen3.backend_tokenizer.to_str(), copy.deepcopy(qwen3.special_tokens_map)
    reference_response_ids("x" * 50, qwen3, limit=3)
    assert (qwen3.backend_tokenizer.to_str(), qwen3.special_tokens_map) == before
