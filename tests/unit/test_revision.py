"""Self-revision prompts in the chat formats of Qwen3, OLMo 3 and Llama 3.1: token ids, phrase positions, refusals."""

from __future__ import annotations

import copy
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from verl_ext.revision import (
    FAMILIES,
    PHRASES,
    PLACEMENTS,
    Phrases,
    RevisionPrompts,
    check_continuation,
    choose_phrases,
    has_thinking,
    turn_prefix,
    user_turn,
)
from verl_ext.sampling_prompts import PromptBuilder, PromptError

# The layouts of the models' own chat templates for system, user and assistant turns, without their tool branches.
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
)
QWEN3 = CHATML + (
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
QWEN3_INSTRUCT = CHATML + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
QWEN3_THINKING = CHATML + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
OLMO3_SYSTEM = (
    "You are a helpful function-calling AI assistant. You do not currently have access to any functions. "
    "<functions></functions>"
)
OLMO3 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\n" + OLMO3_SYSTEM + "<|im_end|>\n' }}{%- endif %}"
)
OLMO3_INSTRUCT = OLMO3 + QWEN3_INSTRUCT
OLMO3_THINK = OLMO3 + CHATML + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>' }}{%- endif %}"
LLAMA31 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
LLAMA31_BEGIN = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
)
LLAMA31_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


@dataclass(frozen=True)
class Model:
    """A family's layout: what stands before and behind the text of the only user turn."""

    template: str
    before: str
    behind: str
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added: tuple[str, ...] = ("<think>", "</think>")
    composes: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
OLMO3_USER = f"<|im_start|>system\n{OLMO3_SYSTEM}<|im_end|>\n{USER}"
OPEN = {
    "qwen3": Model(
        QWEN3, USER, ASSISTANT + "<think>\n\n</think>\n\n", composes=True, kwargs={"enable_thinking": False}
    ),
    "qwen3_instruct": Model(QWEN3_INSTRUCT, USER, ASSISTANT, composes=True),
    "olmo3_instruct": Model(OLMO3_INSTRUCT, OLMO3_USER, ASSISTANT, added=()),
    "llama31": Model(
        LLAMA31,
        LLAMA31_BEGIN,
        LLAMA31_END,
        special=("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        added=(),
    ),
}
THINKING = {
    "qwen3_thinking": Model(QWEN3_THINKING, USER, ASSISTANT + "<think>\n", composes=True),
    "olmo3_think": Model(OLMO3_THINK, OLMO3_USER, ASSISTANT + "<think>", added=()),
}
TEXT = [
    "Let me rephrase the above solution. Wait, this response is wrong. Let me correct it.",
    "So x = 3 + 4 and the answer is \\boxed{7}.\n\nTherefore, the sum of 12 and 30 is 42.",
]
# How Qwen3, OLMo 3 and Llama 3 split text before merging (Qwen takes one digit at a time, the others up to three).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@cache
def tokenizer_of(model: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with merges, the family's control tokens and its layout."""
    family = (OPEN | THINKING)[model]
    backend = Tokenizer(models.BPE())
    if family.composes:
        backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in family.special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    start = family.special[0]
    if model == "llama31":  # as Llama's: encode() puts a beginning of text before everything unless told not to
        pair = (start, backend.token_to_id(start))
        backend.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=family.special[1], chat_template=family.template
    )


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


QUESTION = "What is 3 + 4?"
ATTEMPT = "So x = 3 + 4, that is\n\n \\boxed{8} ."


# ------------------------------------------------------------------------------------------------------------ phrases


def test_the_phrases_are_the_paper_s_and_the_code_s_byte_for_byte() -> None:
    rephrase = "Let me rephrase the above solution."
    assert {name: (phrases.of(True), phrases.of(False)) for name, phrases in PHRASES.items()} == {
        "paper": (rephrase, "Wait, this response is not correct, let me start over."),
        "qwen": (rephrase, "Wait, this response is wrong. Let me correct it."),
        "olmo": (rephrase, "Wrong. I need to redo all."),
    }


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_auto_takes_the_phrases_of_the_family(model_type: str) -> None:
    assert choose_phrases("auto", model_type) == PHRASES["olmo" if "olmo" in model_type else "qwen"]


def test_given_texts_win_and_a_name_needs_no_family() -> None:
    assert choose_phrases("paper", None) == PHRASES["paper"]
    assert choose_phrases("olmo", "qwen3", wrong="No.") == Phrases(PHRASES["olmo"].right, "No.")
    assert choose_phrases("auto", "llama", right="Yes.", wrong="No.") == Phrases("Yes.", "No.")


@pytest.mark.parametrize(
    ("name", "model_type", "texts", "words"),
    [
        ("auto", "llama", {}, ["'llama'", "distill.context.phrases", "paper, qwen, olmo", "phrase_right"]),
        ("auto", None, {"right": "Yes."}, ["have no control phrases of their own", "phrase_wrong"]),
        ("gemma", "qwen3", {}, ["context.phrases is 'gemma'", "auto, paper, qwen, olmo"]),
        ("qwen", None, {"right": " "}, ["context.phrase_right is ' '"]),
        ("qwen", None, {"right": "Yes.", "wrong": ""}, ["context.phrase_wrong is ''"]),
    ],
)
def test_phrases_that_cannot_be_are_refused_with_what_to_set(
    name: str, model_type: str | None, texts: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        choose_phrases(name, model_type, **texts)
    assert [word for word in words if word not in str(caught.value)] == []


# ------------------------------------------------------------------------------------------ token ids, family by family


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("model", OPEN)
def test_the_assistant_s_turn_begins_with_attempt_and_phrase(model: str, right: bool) -> None:
    family, tokenizer, phrases = OPEN[model], tokenizer_of(model), PHRASES["qwen"]
    ids = RevisionPrompts(tokenizer, phrases, "assistant", family.kwargs)(user(QUESTION), ATTEMPT, right)
    phrase = phrases.right if right else phrases.wrong
    prompt = family.before + QUESTION + family.behind
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    rest_ids = tokenizer.encode(ATTEMPT + "\n\n" + phrase + "\n\n", add_special_tokens=False)
    assert ids == prompt_ids + rest_ids
    # The student's own prompt, unchanged: what the rollout servers are given.
    student = tokenizer.apply_chat_template(
        user(QUESTION), add_generation_prompt=True, tokenize=True, return_dict=False, **family.kwargs
    )
    assert ids[: len(prompt_ids)] == student
    text = tokenizer.decode(ids)
    assert text == prompt + ATTEMPT + "\n\n" + phrase + "\n\n"
    at = len(prompt) + len(ATTEMPT) + 2
    assert text.index(phrase) == text.rindex(phrase) == at
    # The phrase begins at a token; its full stop may be one token with the separator.
    assert text[:at] in [tokenizer.decode(ids[:count]) for count in range(len(prompt_ids), len(ids))]


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("model", OPEN)
def test_the_user_s_turn_ends_in_attempt_and_phrase(model: str, right: bool) -> None:
    family, tokenizer, phrases = OPEN[model], tokenizer_of(model), PHRASES["olmo"]
    ids = RevisionPrompts(tokenizer, phrases, "user", family.kwargs)(user(QUESTION), ATTEMPT, right)
    phrase = phrases.right if right else phrases.wrong
    text = family.before + QUESTION + "\n\n" + ATTEMPT + "\n\n" + phrase + family.behind
    assert tokenizer.decode(ids) == text and ids == tokenizer.encode(text, add_special_tokens=False)
    assert text.index(phrase) == len(family.before + QUESTION + ATTEMPT) + 4


@pytest.mark.parametrize("model", OPEN)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_control_tokens_are_those_of_the_chat_template_alone(model: str, placement: str) -> None:
    """No second beginning of text, and no end of turn behind the phrase."""
    family, tokenizer = OPEN[model], tokenizer_of(model)
    ids = RevisionPrompts(tokenizer, PHRASES["qwen"], placement, family.kwargs)(user(QUESTION), ATTEMPT, True)
    control = set(tokenizer.convert_tokens_to_ids([*family.special, *family.added]))
    template = tokenizer.encode(family.before + family.behind, add_special_tokens=False)
    assert [token for token in ids if token in control] == [token for token in template if token in control]


def test_a_system_turn_and_earlier_turns_stay() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *user("Hi"), {"role": "assistant", "content": "Hello"}]
    messages += user(QUESTION)
    before = copy.deepcopy(messages)
    tokenizer = tokenizer_of("olmo3_instruct")
    ids = RevisionPrompts(tokenizer, Phrases("R", "W"), "assistant")(messages, "7", False)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n7\n\nW\n\n"
    )
    assert user_turn(messages, "7", "W") == [*before[:-1], *user(f"{QUESTION}\n\n7\n\nW")]
    assert messages == before


@given(attempt=st.text(min_size=1, max_size=40), right=st.booleans())
@example(attempt="R = 3 \N{OHM SIGN}", right=True)
@example(attempt="cut within a character: \N{REPLACEMENT CHARACTER}", right=False)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("model", ["qwen3", "llama31"])
def test_any_text_comes_back_from_its_tokens_or_is_refused(model: str, attempt: str, right: bool) -> None:
    family, tokenizer = OPEN[model], tokenizer_of(model)
    assume(not any(token in attempt for token in (*family.special, *family.added)))
    prompts = RevisionPrompts(tokenizer, PHRASES["paper"], "assistant", family.kwargs)
    if family.composes and unicodedata.normalize("NFC", attempt) != attempt:  # Qwen's tokenizer composes characters
        with pytest.raises(PromptError, match="question 3: the tokenizer cannot continue"):
            prompts(user(QUESTION), attempt, right, row=3)
        return
    text = tokenizer.decode(prompts(user(QUESTION), attempt, right))
    phrase = PHRASES["paper"].of(right)
    assert text == family.before + QUESTION + family.behind + turn_prefix(attempt, phrase)
    assert turn_prefix(attempt, phrase) == f"{attempt}\n\n{phrase}\n\n"


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("model", OPEN)
def test_a_turn_that_can_be_continued_passes_the_check(model: str) -> None:
    check_continuation(tokenizer_of(model), OPEN[model].kwargs)


@pytest.mark.parametrize("model", THINKING)
def test_a_template_that_opens_a_thinking_block_is_refused_with_what_to_set(model: str) -> None:
    tokenizer = tokenizer_of(model)
    assert tokenizer.apply_chat_template(user("Q"), add_generation_prompt=True, tokenize=False).endswith(
        THINKING[model].behind
    )
    with pytest.raises(PromptError) as caught:
        check_continuation(tokenizer, {"enable_thinking": False})
    assert "opens a thinking block" in str(caught.value)
    assert "data.apply_chat_template_kwargs={enable_thinking: false}" in str(caught.value)


def test_a_template_without_a_generation_prompt_cannot_hold_a_revision() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("olmo3_instruct"))
    tokenizer.chat_template = CHATML
    with pytest.raises(PromptError, match="the chat template opens no assistant turn .add_generation_prompt adds noth"):
        check_continuation(tokenizer)
    with pytest.raises(PromptError, match="question 7: the chat template opens no assistant turn"):
        RevisionPrompts(tokenizer, PHRASES["olmo"], "assistant")(user("Q"), "2", True, row=7)
    RevisionPrompts(tokenizer, PHRASES["olmo"], "user")(user("Q"), "2", True)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "messages", [[], [{"role": "assistant", "content": "A"}], [{"role": "user", "content": ["p"]}]]
)
def test_a_prompt_that_does_not_end_in_a_user_turn_names_its_row(messages: list[Any], placement: str) -> None:
    with pytest.raises(ValueError, match="row q7: "):
        RevisionPrompts(tokenizer_of("olmo3_instruct"), PHRASES["olmo"], placement)(messages, "2", True, row="q7")


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="context.placement is 'system'; allowed: assistant, user"):
        RevisionPrompts(tokenizer_of("olmo3_instruct"), PHRASES["olmo"], "system")


@pytest.mark.parametrize(
    ("text", "found"),
    [("", False), ("a < b", False), ("<think>x</think>y", True), ("cut <think>x", True), ("x</think>y", True)],
)
def test_thinking_is_found_whole_and_in_halves(text: str, found: bool) -> None:
    assert has_thinking(text) is found


# --------------------------------------------------------------------------------------------------------------- cost


def test_the_chat_template_is_asked_twice_a_question_and_not_twice_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(tokenizer_of("olmo3_instruct"))
    calls = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda messages, **k: calls.append(1) or render(messages, **k)
    )
    builder, fresh = PromptBuilder(tokenizer), PromptBuilder(tokenizer_of("olmo3_instruct"))
    for prefix in ("a", "b c", "a", "d\n"):
        for question in ("P", "Q", "R"):
            assert builder("q", user(question), prefix) == fresh("q", user(question), prefix)
    assert len(calls) == 2 * 3
