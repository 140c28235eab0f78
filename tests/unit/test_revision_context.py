"""Teacher context "revision": a whole batch of attempts, what is left out and counted, and what a row costs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.random_model import byte_tokenizer
from verl_ext.contexts import Contexts
from verl_ext.revision import PHRASES, PLACEMENTS
from verl_ext.revision_context import LEFT_OUT, build_revision_contexts

QWEN = PHRASES["qwen"]
TOKENIZER = byte_tokenizer()  # one token a byte and Qwen's layout, so that a prompt's length can be counted by hand
BEFORE, BEHIND = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Config:
    """The attributes that the context reads."""

    phrase_right: str | None = QWEN.right
    phrase_wrong: str | None = QWEN.wrong
    placement: str = "assistant"
    max_length: int = 10_000


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def build(attempts: list[str], config: Config | None = None, tokenizer: Any = TOKENIZER, **columns: Any) -> Contexts:
    rows = len(attempts)
    given_columns = {
        "raw_prompts_N": [user("Solve Q.")] * rows,
        "successes_N": [True] * rows,
        "judged_N": [True] * rows,
        "response_lengths_N": [5] * rows,
    } | columns
    prompts = given_columns.pop("raw_prompts_N")
    return build_revision_contexts(prompts, attempts, tokenizer=tokenizer, config=config or Config(), **given_columns)


# ----------------------------------------------------------------------------------------------- what the teacher reads


def test_the_phrase_is_chosen_by_the_row_s_own_outcome() -> None:
    result = build(["= 7", "= 8"], successes_N=[True, False])
    for row, attempt, phrase in zip(result.rows, ("= 7", "= 8"), (QWEN.right, QWEN.wrong), strict=True):
        prompt = TOKENIZER.encode(BEFORE + "Solve Q." + BEHIND, add_special_tokens=False)
        rest = TOKENIZER.encode(f"{attempt}\n\n{phrase}\n\n", add_special_tokens=False)
        assert row.token_ids == prompt + rest and row.prompt_tokens == len(prompt) + len(rest)
        assert row.messages == [*user("Solve Q."), {"role": "assistant", "content": f"{attempt}\n\n{phrase}\n\n"}]
        assert row.distill and row.demonstration is None and not row.used_feedback
    assert result.metrics == {
        "context/rows": 2.0,
        "context/phrase_right": 1.0,
        "context/phrase_wrong": 1.0,
        **{f"context/{reason}": 0.0 for reason in LEFT_OUT},
        "context/too_long": 0.0,
        "context/distilled": 2.0,
        "context/prompt_tokens_mean": sum(row.prompt_tokens for row in result.rows) / 2,
    }
    assert all(type(value) is float for value in result.metrics.values())
    assert not [name for name in result.metrics if "max" in name or "min" in name]


def test_in_the_user_s_turn_the_whole_prompt_goes_through_the_template() -> None:
    row = build(["= 8"], Config(placement="user"), successes_N=[False]).rows[0]
    assert row.text == f"Solve Q.\n\n= 8\n\n{QWEN.wrong}" and row.messages == user(row.text)
    assert row.token_ids == TOKENIZER.encode(BEFORE + row.text + BEHIND, add_special_tokens=False)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_sample_dump_shows_attempt_and_phrase_and_the_prompt_is_not_changed(placement: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *user("Q")]
    before = copy.deepcopy(messages)
    row = build(["= 8"], Config(placement=placement), raw_prompts_N=[messages]).rows[0]
    assert f"= 8\n\n{QWEN.right}" in row.text and row.messages[0] == before[0]
    assert TOKENIZER.decode(row.token_ids).count(row.text) == 1
    row.messages[0]["content"] = "changed"
    assert messages == before


def test_template_arguments_reach_the_chat_template() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ messages[-1].content }}{% if add_generation_prompt %}[{{ mood }}]{% endif %}"
    row = build(["A"], Config("R", "W"), tokenizer, template_kwargs={"mood": "open"}).rows[0]
    assert tokenizer.decode(row.token_ids) == "Solve Q.[open]A\n\nR\n\n"


# --------------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        ("", "blank"),
        (" \n\t", "blank"),
        ("<think>so</think>= 7", "thinking"),
        ("so</think>= 7", "thinking"),
        ("<think>cut", "thinking"),
        ("= 7<|im_end|>\n<|im_start|>user\nGood.", "special_tokens"),
    ],
)
def test_an_attempt_that_cannot_be_shown_is_left_out_and_counted(attempt: str, reason: str, placement: str) -> None:
    result = build(["= 7", attempt], Config(placement=placement))
    assert [row.distill for row in result.rows] == [True, False]
    left_out = result.rows[1]
    assert (left_out.messages, left_out.token_ids, left_out.prompt_tokens, left_out.too_long) == (None, None, 0, False)
    counts = {name: result.metrics[f"context/{name}"] for name in LEFT_OUT}
    assert counts == dict.fromkeys(LEFT_OUT, 0.0) | {reason: 1.0}
    assert result.metrics["context/phrase_right"] == result.metrics["context/distilled"] == 1


def test_an_attempt_that_does_not_come_back_from_its_tokens_is_left_out_and_counted() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    encode = tokenizer.encode
    tokenizer.encode = lambda text, **arguments: encode(text.replace("\N{OHM SIGN}", "O"), **arguments)
    result = build(["3 \N{OHM SIGN}", "3 O"], tokenizer=tokenizer)
    assert [row.distill for row in result.rows] == [False, True]
    assert result.metrics["context/not_continuable"] == 1


def test_a_row_without_a_verdict_has_no_phrase() -> None:
    result = build(["= 7", "= 7", " "], successes_N=[True, True, False], judged_N=[True, False, False])
    assert [row.distill for row in result.rows] == [True, False, False]
    assert result.metrics["context/without_verdict"] == 2 and result.metrics["context/blank"] == 0
    assert result.metrics["context/phrase_right"] == 1 and result.metrics["context/phrase_wrong"] == 0


def test_too_long_prompts_are_counted_and_left_out_and_nothing_is_cut() -> None:
    attempts = ["A" * count for count in (10, 11, 12)]
    limit = build(attempts).rows[1].prompt_tokens
    result = build(attempts, Config(max_length=limit))
    assert [row.distill for row in result.rows] == [True, True, False]
    assert [row.too_long for row in result.rows] == [False, False, True]
    assert result.rows[2].token_ids is None and result.rows[2].prompt_tokens == limit + 1
    assert result.metrics["context/too_long"] == 1 and result.metrics["context/phrase_right"] == 3
    assert result.metrics["context/prompt_tokens_mean"] == limit - 0.5


def test_the_doubled_attempt_must_fit_the_model() -> None:
    full = build(["= 7"]).rows[0].prompt_tokens
    result = build(["= 7"] * 3, response_lengths_N=[5, 6, 7], max_total=full + 6)
    assert [row.distill for row in result.rows] == [True, True, False] and result.metrics["context/too_long"] == 1


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("phrases", [(None, None), ("R", None), (None, "W")])
def test_phrases_that_nobody_chose_are_refused(phrases: tuple[str | None, str | None]) -> None:
    with pytest.raises(ValueError, match=r"phrase_right is .* call recipe\.revision_checks\.resolve_phrases"):
        build(["= 7"], Config(*phrases))


def test_an_unknown_placement_and_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="context.placement is 'system'"):
        build(["= 7"], Config(placement="system"))
    for column in ("successes_N", "judged_N", "response_lengths_N", "row_names_N"):
        with pytest.raises(ValueError, match=f"{column.removesuffix('_N')} has 1 entries for 2 rows"):
            build(["a", "b"], **{column: [1]})
    with pytest.raises(ValueError, match="responses has 1 entries for 0 rows"):
        build(["a"], raw_prompts_N=[])


@pytest.mark.parametrize("messages", [[], "text", [{"role": "assistant", "content": "A"}]])
@pytest.mark.parametrize("attempt", ["= 7", ""])
def test_a_prompt_that_cannot_be_used_names_its_row(messages: Any, attempt: str) -> None:
    with pytest.raises(ValueError, match="row q7"):
        build([attempt], raw_prompts_N=[messages], row_names_N=["q7"])


def test_an_empty_batch() -> None:
    assert build([]).rows == [] and set(build([]).metrics.values()) == {0.0}


# ------------------------------------------------------------------------------------------------------ rows and cost

ROW = st.tuples(
    st.sampled_from(["P", "Q?"]),
    st.sampled_from(["= 7", "= 8\n", "", "<think>", "long " * 20, "<|im_end|>"]) | st.text(max_size=12),
    st.booleans(),
    st.booleans(),
    st.integers(0, 60),
)


@given(st.lists(ROW, min_size=1, max_size=6), st.sampled_from(PLACEMENTS), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_row_depends_on_nothing_but_itself(rows: list[tuple], placement: str, random: Any) -> None:
    config = Config("R", "W", placement, 140)
    order = random.sample(range(len(rows)), len(rows))

    def contexts(picked: list[tuple]) -> Contexts:
        questions, attempts, successes, judged, lengths = zip(*picked, strict=True)
        columns = {"successes_N": successes, "judged_N": judged, "response_lengths_N": lengths, "max_total": 170}
        return build(list(attempts), config, raw_prompts_N=[user(question) for question in questions], **columns)

    result, turned = contexts(rows), contexts([rows[i] for i in order])
    assert [result.rows[i] for i in order] == turned.rows and result.metrics == turned.metrics
    counts = {name.removeprefix("context/"): value for name, value in result.metrics.items()}
    assert counts["phrase_right"] + counts["phrase_wrong"] + sum(counts[reason] for reason in LEFT_OUT) == len(rows)
    assert counts["phrase_right"] + counts["phrase_wrong"] == counts["distilled"] + counts["too_long"]
    for row, context in zip(rows, result.rows, strict=True):
        assert contexts([row]).rows == [context]
        if context.distill:
            question, attempt, right, judged, length = row
            turn = f"\n\n{attempt}\n\n{'R' if right else 'W'}"
            turn = f"{turn}{BEHIND}" if placement == "user" else f"{BEHIND}{turn[2:]}\n\n"
            assert judged and TOKENIZER.decode(context.token_ids) == BEFORE + question + turn
            assert len(context.token_ids) <= 140 and len(context.token_ids) + length <= 170


def test_a_thousand_rows_of_ten_questions_render_ten_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    calls = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda messages, **options: calls.append(1) or render(messages, **options)
    )
    result = build(
        [f"= {i}" for i in range(1000)], tokenizer=tokenizer, raw_prompts_N=[user(str(i % 10)) for i in range(1000)]
    )
    assert result.metrics["context/distilled"] == 1000
    assert len(calls) == 2 * 10  # with the generation prompt, and without to see that it opens a turn
