"""Training rows of traces in the chat formats of Qwen3, OLMo 3 and Llama 3.1: ids, masks, where the phrase stands."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipe.srt_rows import TraceTokenizer, plain_rows, trace_rows
from recipe.srt_traces import Trace
from verl_ext.config import ConfigError
from verl_ext.revision import Phrases
from verl_ext.sample_store import SampleStore, StoreError
from verl_ext.sampling import SampleRequest
from verl_ext.sampling_prompts import PromptBuilder

PHRASES = Phrases("Let me rephrase the above solution.", "Wait, this response is wrong. Let me correct it.")
QUESTION = [{"role": "user", "content": "What is 3+4?"}]
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN3 = CHATML + (
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OLMO3 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful function-calling AI assistant. "
    "<functions></functions><|im_end|>\n' }}{% endif %}" + CHATML + OPEN
)
LLAMA31 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n"
    "<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# template, special tokens, the end of turn, arguments, what stands before and behind the user's text
FORMATS: dict[str, tuple[str, tuple[str, ...], str, dict[str, Any], str, str]] = {
    "qwen3": (
        *(QWEN3, CHATML_TOKENS, "<|im_end|>", {"enable_thinking": False}),
        *(USER, ASSISTANT + "<think>\n\n</think>\n\n"),
    ),
    "qwen3_instruct": (CHATML + OPEN, CHATML_TOKENS, "<|im_end|>", {}, USER, ASSISTANT),
    "olmo3_instruct": (
        *(OLMO3, CHATML_TOKENS, "<|endoftext|>", {}),
        "<|im_start|>system\nYou are a helpful function-calling AI assistant. <functions></functions>"
        f"<|im_end|>\n{USER}",
        ASSISTANT,
    ),
    "llama31": (
        *(LLAMA31, LLAMA_TOKENS, "<|eot_id|>", {}),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@cache
def tokenizer_of(name: str) -> Any:
    """One token a byte, the special ones, and Qwen3's thinking tags as added tokens that are not special."""
    template, special, end, *_ = FORMATS[name]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if name.startswith("qwen3"):
        tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    bos = "<|begin_of_text|>" if name == "llama31" else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=bos, chat_template=template, model_max_length=10**9
    )


def trace(right: bool = False, number: int = 0, attempt: str = "3+4 = 8 \\boxed{8}", **more: Any) -> Trace:
    values = {
        **{"question_id": f"q{number}", "attempt_index": 0, "revision_index": 0, "messages": QUESTION},
        **{"attempt": attempt, "right": right, "phrase": PHRASES.of(right), "revision": "It is \\boxed{7}."},
        "cleaned": False,
    }
    return Trace(**values | more)


def spelled(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_both_rows_exactly(name: str, right: bool) -> None:
    """Every piece is spelled out here and tokenised by itself, by nothing that the rows are made with."""
    _, _, end, kwargs, before, behind = FORMATS[name]
    tokenizer, given = tokenizer_of(name), trace(right)
    rows = TraceTokenizer(tokenizer, PHRASES, "assistant", kwargs)
    prompt = spelled(tokenizer, f"{before}What is 3+4?{behind}")
    attempt = spelled(tokenizer, f"{given.attempt}\n\n{PHRASES.of(right)}\n\n")
    revision = [*spelled(tokenizer, "It is \\boxed{7}."), tokenizer.convert_tokens_to_ids(end)]

    generation = rows.generation(given)
    assert generation["input_ids"].tolist() == prompt + attempt + revision
    assert generation["loss_mask"].tolist() == [0] * len(prompt) + [1] * len(attempt + revision)
    assert (generation["kind"], generation["question_id"]) == ("generation", "q0")

    row = rows.revision(given)
    assert row["input_ids"].tolist() == prompt + attempt + revision
    assert row["loss_mask"].tolist() == [0] * len(prompt + attempt) + [1] * len(revision)
    assert row["kind"] == "revision"

    # One token a byte: the phrase stands where its text does.
    text = tokenizer.decode(row["input_ids"])
    assert text.count(PHRASES.of(right)) == 1 and text.endswith(f"\n\n{PHRASES.of(right)}\n\nIt is \\boxed{{7}}.{end}")
    phrase = spelled(tokenizer, PHRASES.of(right))
    start = len(prompt) + len(spelled(tokenizer, given.attempt + "\n\n"))
    assert row["input_ids"][start : start + len(phrase)].tolist() == phrase
    assert tokenizer.decode(row["input_ids"][row["loss_mask"] == 1]) == "It is \\boxed{7}." + end


@pytest.mark.parametrize("name", FORMATS)
def test_a_rows_beginning_is_what_the_revision_was_sampled_behind(name: str) -> None:
    tokenizer, kwargs = tokenizer_of(name), FORMATS[name][3]
    row = TraceTokenizer(tokenizer, PHRASES, "assistant", kwargs).revision(trace())
    sampled = PromptBuilder(tokenizer, kwargs)("q0#0", QUESTION, f"3+4 = 8 \\boxed{{8}}\n\n{PHRASES.wrong}\n\n")
    assert row["input_ids"][row["loss_mask"] == 0].tolist() == sampled


@pytest.mark.parametrize("name", FORMATS)
def test_the_phrase_in_the_user_turn(name: str) -> None:
    _, _, end, kwargs, before, behind = FORMATS[name]
    tokenizer = tokenizer_of(name)
    rows = TraceTokenizer(tokenizer, PHRASES, "user", kwargs)
    row = rows.revision(trace())
    content = f"What is 3+4?\n\n3+4 = 8 \\boxed{{8}}\n\n{PHRASES.wrong}"
    prompt = spelled(tokenizer, f"{before}{content}{behind}")
    revision = [*spelled(tokenizer, "It is \\boxed{7}."), tokenizer.convert_tokens_to_ids(end)]
    assert row["input_ids"].tolist() == prompt + revision
    assert row["loss_mask"].tolist() == [0] * len(prompt) + [1] * len(revision)
    # L_generation knows no other place.
    assistant = TraceTokenizer(tokenizer, PHRASES, "assistant", kwargs).generation(trace())
    assert rows.generation(trace())["input_ids"].tolist() == assistant["input_ids"].tolist()


def test_earlier_turns_stay() -> None:
    tokenizer = tokenizer_of("qwen3_instruct")
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    row = TraceTokenizer(tokenizer, PHRASES, "user").revision(trace(messages=messages))
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("qwen3_instruct"))
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        TraceTokenizer(tokenizer, PHRASES, "assistant")


# ------------------------------------------------------------------------------------------------------------ the files

TRACES = [trace(right=False, number=0), trace(right=True, number=1), trace(right=False, number=2)]


def kinds(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["kind"][0], row["question_id"]) for row in rows]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ("joint", [("g", "q0"), ("r", "q0"), ("g", "q1"), ("r", "q1"), ("g", "q2"), ("r", "q2")]),
        ("generation", [("g", "q0"), ("g", "q1"), ("g", "q2")]),
        ("revision", [("r", "q0"), ("r", "q1"), ("r", "q2")]),
    ],
)
def test_rows_of_the_losses(losses: str, expected: list[tuple[str, str]]) -> None:
    rows = TraceTokenizer(tokenizer_of("qwen3_instruct"), PHRASES, "assistant")
    made = trace_rows(TRACES, rows, losses)
    assert list(made.files) == ["sft.parquet"] and kinds(made.files["sft.parquet"]) == expected


@pytest.mark.parametrize(
    ("sizes", "generation", "revision"),
    [
        ({}, ["q0", "q2"], ["q1", "q0", "q2"]),
        ({"generation_rows": 1}, ["q0"], ["q1", "q0", "q2"]),
        ({"revision_rows": 2}, ["q2"], ["q1", "q0"]),
        ({"revision_rows": 1}, ["q0", "q2"], ["q1"]),
        ({"revision_rows": 1, "generation_rows": 1}, ["q0"], ["q1"]),
    ],
)
def test_two_stages(sizes: dict[str, int], generation: list[str], revision: list[str]) -> None:
    """Wrong attempts only, then right ones first; with a size of the second stage, the first has what that leaves."""
    made = trace_rows(TRACES, TraceTokenizer(tokenizer_of("qwen3_instruct"), PHRASES, "user"), "two_stage", **sizes)
    assert kinds(made.files["sft_generation.parquet"]) == [("g", name) for name in generation]
    assert kinds(made.files["sft_revision.parquet"]) == [("r", name) for name in revision]
    assert list(made.files) == ["sft_generation.parquet", "sft_revision.parquet"]


def test_an_empty_stage_says_what_to_set() -> None:
    rows = TraceTokenizer(tokenizer_of("qwen3_instruct"), PHRASES, "user")
    message = r"sft_generation\.parquet would have no row: 3 traces, 2 of wrong.*revision_rows=3"
    with pytest.raises(StoreError, match=message):
        trace_rows(TRACES, rows, "two_stage", revision_rows=3)


def test_a_long_row_is_left_out_and_counted_never_cut() -> None:
    rows = TraceTokenizer(tokenizer_of("qwen3_instruct"), PHRASES, "assistant")
    longer = [*TRACES, trace(number=3, attempt="9" * 40)]
    limit = max(len(rows.generation(one)["input_ids"]) for one in TRACES)
    made = trace_rows(longer, rows, "joint", max_length=limit)
    assert len(made.files["sft.parquet"]) == 6 and dict(made.too_long) == {"generation": 1, "revision": 1}
    with pytest.raises(StoreError, match=r"srt\.max_length=9 tokens: generation 4, revision 4"):
        trace_rows(longer, rows, "joint", max_length=9)


# ----------------------------------------------------------------------------------------------------- plain responses


def test_right_responses_behind_their_prompts(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama31")
    requests = [SampleRequest(f"q{i}", QUESTION) for i in range(2)]
    texts = {("q0", 0): "a", ("q0", 1): "wrong", ("q0", 2): "bb", ("q1", 0): "c" * 50, ("q1", 1): "d"}
    with SampleStore(tmp_path, {}) as store:
        for (name, sample), text in texts.items():
            row = {"question_id": name, "sample": sample, "prompt": "p", "status": "ok", "truncated": False}
            store.append(row | {"score": float(text != "wrong"), "text": text})

    def make(**more: Any) -> tuple[list[str], int]:
        options = {"samples": 3, "threshold": 0.5, "per_question": None, "special_token": lambda text: None}
        rows, chosen, too_long = plain_rows(tmp_path, requests, tokenizer, **options | more)
        assert chosen.left_out["wrong"] == 1 and {row["kind"] for row in rows} == {"plain"}
        prompt = spelled(tokenizer, f"{FORMATS['llama31'][4]}What is 3+4?{FORMATS['llama31'][5]}")
        for row in rows:
            assert row["input_ids"][: len(prompt)].tolist() == prompt
            assert row["loss_mask"].tolist() == [0] * len(prompt) + [1] * (len(row["input_ids"]) - len(prompt))
        return [tokenizer.decode(row["input_ids"][row["loss_mask"] == 1]) for row in rows], too_long

    end = "<|eot_id|>"
    assert make() == (["a" + end, "bb" + end, "c" * 50 + end, "d" + end], 0)
    assert make(per_question=1) == (["a" + end, "c" * 50 + end], 0)
    fits = len(spelled(tokenizer, f"{FORMATS['llama31'][4]}What is 3+4?{FORMATS['llama31'][5]}")) + 10
    assert make(max_length=fits) == (["a" + end, "bb" + end, "d" + end], 1)
