"""Teacher context "reference": templates of the papers, rendering, missing references, limits, checks before a run."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from data_prep.random_model import byte_tokenizer
from data_prep.tiny_world import main as make_tiny_world
from verl_ext import reference_context
from verl_ext.reference_context import (
    OPSD_TEMPLATE,
    OPSD_V1_TEMPLATE,
    REFERENCE_TEMPLATE,
    SDFT_TEMPLATE,
    ReferenceTemplate,
    build_reference_contexts,
    check_reference,
    check_special_tokens,
    render_reference,
)


@dataclass
class Config:
    """The attributes that the context reads."""

    reference_template: str = REFERENCE_TEMPLATE
    reference_key: str = "solution"
    max_length: int = 10_000
    remove_thinking: bool = True


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte and Qwen's layout, so that a prompt's length can be counted by hand."""
    return byte_tokenizer()


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def build(infos, tokenizer, config: Config | None = None, *, prompts=None, lengths=None, **arguments):
    return build_reference_contexts(
        [user("Solve Q.")] * len(infos) if prompts is None else prompts,
        infos,
        response_lengths_N=[5] * len(infos) if lengths is None else lengths,
        tokenizer=tokenizer,
        config=config or Config(),
        **arguments,
    )


def plainly_filled(template: str, **values: str) -> str:
    """An independent reading of a format string: placeholders by one regular expression, then doubled braces."""
    pieces = re.split(r"(?<!\{)\{(prompt|problem|solution)\}(?!\})", template)
    return "".join(
        values[piece] if i % 2 else piece.replace("{{", "{").replace("}}", "}") for i, piece in enumerate(pieces)
    )


# ---------------------------------------------------------------------------------------------------------- templates


def test_paceds_text_in_full():
    assert render_reference(user("student prompt"), "S = 1", "P?") == user(
        "## Problem\nP?\n\n## Reference Solution\nS = 1\n\nAfter understanding the reference solution, solve the "
        "problem step by step using your own approach. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem."
    )


def test_opsds_texts_in_full():
    later = render_reference(user("x"), "S", "P", ReferenceTemplate(OPSD_TEMPLATE))[-1]["content"]
    assert later == (
        "Problem: P\n\nHere is a reference solution to this problem:\n=== Reference Solution Begin ===\nS\n"
        "=== Reference Solution End ===\n\n\nAfter reading the reference solution above, make sure you truly "
        "understand the reasoning behind each step \N{EM DASH} do not copy or paraphrase it. Now, using your own words "
        "and independent reasoning, derive the same final answer to the problem above. Think step by step, explore "
        "different approaches, and don't be afraid to backtrack or reconsider if something doesn't work out:\n\n"
        "Please reason step by step, and put your final answer within \\boxed{}."
    )
    first = render_reference(user("x"), "S", "P", ReferenceTemplate(OPSD_V1_TEMPLATE))[-1]["content"]
    assert first == (
        "P\n\nHere is a reference solution to this problem:\nS\n\n\nAfter understanding the reference solution and the "
        "rationale behind each step, now articulate your own step-by-step reasoning that derives the same final answer "
        "to the problem below:\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


def test_sdfts_text_in_full_with_its_system_turn():
    messages = [{"role": "system", "content": "Be brief."}, *user("P")]
    assert render_reference(messages, "D1\nD2", None, ReferenceTemplate(SDFT_TEMPLATE)) == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": "\nP\n\nThis is an example for a response to the question:\nD1\nD2\n\n"
            "Now answer with a response of your own, including the thinking process.\n",
        },
    ]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{problem}", "'solution'.*missing"),
        ("{solution}{hint}", "unknown placeholder.*hint"),
        ("{solution}{}", "unknown placeholder"),
        ("{solution}{0}", "unknown placeholder.*0"),
        ("{solution.__class__}", "unknown placeholder"),
        ("{solution}{problem[0]}", "unknown placeholder"),
        ("{solution", "not a valid format string"),
        ("{solution} \\boxed{}", "unknown placeholder"),
        ("{solution:.100}", "no conversion and no format"),
        ("{solution!r}", "no conversion and no format"),
        ("{solution}{prompt:>{problem}}", "no conversion and no format"),
    ],
)
def test_a_bad_template_is_refused_by_name(text, word):
    with pytest.raises(ValueError, match=f"reference_template: .*{word}"):
        ReferenceTemplate(text)


def test_a_bad_template_is_refused_in_a_batch(tokenizer):
    with pytest.raises(ValueError, match="reference_template"):
        build([{"solution": "S"}], tokenizer, Config(reference_template="no place"))


# ---------------------------------------------------------------------------------------------------------- rendering

awkward = st.text(alphabet="{}promtbleslui\\% 0\n!:", max_size=30)


@given(awkward, awkward, awkward)
@settings(deadline=None)
def test_braces_in_values_are_plain_text(prompt, problem, solution):
    for template in (REFERENCE_TEMPLATE, OPSD_TEMPLATE, SDFT_TEMPLATE, "{solution}{{{prompt}}}{problem}{solution}"):
        text = render_reference(user(prompt), solution, problem, ReferenceTemplate(template))[-1]["content"]
        if "{{{" in template:
            assert text == solution + "{" + prompt + "}" + problem + solution
        else:
            assert text == plainly_filled(template, prompt=prompt, problem=problem, solution=solution)


def test_earlier_turns_are_kept_and_the_prompt_is_not_changed():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "2+2?", "name": "me"},
    ]
    before = copy.deepcopy(messages)
    rendered = render_reference(messages, "4", None, ReferenceTemplate("{prompt}|{problem}|{solution}"))
    assert rendered == [*before[:-1], {"role": "user", "content": "2+2?|2+2?|4", "name": "me"}]
    rendered[0]["content"] = "changed"
    assert messages == before


@pytest.mark.parametrize(
    "messages", [[], "text", ["text"], [{"role": "assistant", "content": "A"}], [{"role": "user", "content": ["part"]}]]
)
def test_a_prompt_that_cannot_be_used_names_its_row(messages, tokenizer):
    with pytest.raises(ValueError, match="row q7"):
        build([{"solution": "S"}], tokenizer, prompts=[messages], row_names_N=["q7"])


# ------------------------------------------------------------------------------------------------------ whole batches


def test_prompt_ids_are_those_of_the_chat_template(tokenizer):
    infos = [{"solution": "S", "problem": "P"}, {"solution": "T", "problem": "Häh?"}]
    result = build(infos, tokenizer)
    for context, info in zip(result.rows, infos, strict=True):
        text = plainly_filled(REFERENCE_TEMPLATE, **info, prompt="")
        assert context.text == text and context.distill and context.demonstration is None
        rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert context.token_ids == tokenizer.encode(rendered, add_special_tokens=False)
        assert context.prompt_tokens == len(context.token_ids)


def test_template_arguments_reach_the_chat_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[-1].content }}{% if thinking %}[think]{% endif %}"
    result = build(
        [{"solution": "S"}], tokenizer, Config(reference_template="{solution}"), template_kwargs={"thinking": True}
    )
    assert tokenizer.decode(result.rows[0].token_ids) == "S[think]"


def test_the_bare_question_and_what_stands_in_for_it(tokenizer):
    infos = [{"solution": "S", "problem": "bare"}, {"solution": "S"}, {"solution": "S", "problem": None}]
    infos += [{"solution": "S", "problem": " \n"}, {"problem": "bare"}]
    result = build(infos, tokenizer, Config(reference_template="{problem}|{solution}"))
    assert [row.text for row in result.rows] == ["bare|S", *["Solve Q.|S"] * 3, None]
    assert result.metrics["context/problem_from_prompt"] == 3
    # a template that does not ask for the question does not look at it
    other = build([{"solution": "S", "problem": 3}], tokenizer, Config(reference_template="{prompt}|{solution}"))
    assert other.rows[0].text == "Solve Q.|S" and other.metrics["context/problem_from_prompt"] == 0


def test_another_key(tokenizer):
    infos = [{"solution": "S", "demonstration": "D"}]
    config = Config(reference_key="demonstration", reference_template=SDFT_TEMPLATE)
    text = build(infos, tokenizer, config).rows[0].text
    assert "question:\nD\n\nNow" in text and "S\n" not in text


def test_rows_without_a_reference_are_counted_and_have_no_context(tokenizer):
    infos = [{"solution": "S"}, {}, {"solution": None}, {"solution": " \n\t"}, {"solution": "<think>only</think> "}]
    result = build(infos, tokenizer)
    assert [row.distill for row in result.rows] == [True, False, False, False, False]
    assert all(row.messages is None and row.prompt_tokens == 0 and not row.too_long for row in result.rows[1:])
    assert result.metrics == {
        "context/rows": 5.0,
        "context/with_reference": 1.0,
        "context/without_context": 4.0,
        "context/special_tokens": 0.0,
        "context/problem_from_prompt": 1.0,
        "context/too_long": 0.0,
        "context/distilled": 1.0,
        "context/prompts_rendered": 1.0,
        "context/prompt_tokens_mean": float(result.rows[0].prompt_tokens),
    }
    assert all(isinstance(value, float) for value in result.metrics.values())


def test_thinking_is_removed_only_where_asked(tokenizer):
    infos = [{"solution": "<think>secret</think>\n42"}]
    assert "secret" not in build(infos, tokenizer).rows[0].text
    assert "\n<think>secret</think>\n42\n" in build(infos, tokenizer, Config(remove_thinking=False)).rows[0].text


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_reference_that_spells_a_special_token_is_left_out_and_counted(token, tokenizer):
    infos = [{"solution": f"so 4{token} and on"}, {"solution": "so 4"}, {"solution": f"<think>{token}</think>so 4"}]
    result = build(infos, tokenizer)
    assert [row.distill for row in result.rows] == [False, True, True]
    assert result.metrics["context/special_tokens"] == result.metrics["context/without_context"] == 1
    # so the teacher's prompt has the control tokens of the chat template alone
    for row in result.rows[1:]:
        assert row.token_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_too_long_prompts_are_counted_and_left_out_and_nothing_is_cut(tokenizer):
    infos = [{"solution": "S" * n} for n in (10, 11, 12)]
    whole = build(infos, tokenizer)
    limit = whole.rows[1].prompt_tokens
    result = build(infos, tokenizer, Config(max_length=limit))
    assert [row.distill for row in result.rows] == [True, True, False]
    assert [row.too_long for row in result.rows] == [False, False, True]
    assert result.rows[2].token_ids is None and result.rows[2].prompt_tokens == limit + 1
    assert result.metrics["context/too_long"] == 1 and result.metrics["context/distilled"] == 2
    assert result.metrics["context/with_reference"] == 3 and result.metrics["context/without_context"] == 0
    assert result.metrics["context/prompt_tokens_mean"] == limit - 0.5


def test_prompt_and_response_together_must_fit_the_model(tokenizer):
    infos = [{"solution": "S"}] * 3
    full = build(infos, tokenizer).rows[0].prompt_tokens
    result = build(infos, tokenizer, lengths=[5, 6, 7], max_total=full + 6)
    assert [row.distill for row in result.rows] == [True, True, False]


@st.composite
def batches(draw):
    """Rows of questions with or without a reference, and an order of them."""
    questions = draw(
        st.lists(
            st.tuples(st.text("ab{}", min_size=1, max_size=4), st.sampled_from([None, "", "S", "long" * 9, "{x}"])),
            min_size=1,
            max_size=4,
        )
    )
    rows = [question for question in questions for _ in range(draw(st.integers(1, 3)))]
    return rows, draw(st.permutations(range(len(rows))))


@given(batches())
@settings(max_examples=60, deadline=None)
def test_a_row_depends_on_nothing_but_itself_and_rollouts_share_a_prompt(case):
    tokenizer = byte_tokenizer()
    rows, order = case
    config = Config(reference_template="{prompt}|{solution}", max_length=80)

    def contexts(picked):
        return build([{"solution": r} for _, r in picked], tokenizer, config, prompts=[user(p) for p, _ in picked])

    result = contexts(rows)
    turned = contexts([rows[i] for i in order])
    assert [result.rows[i] for i in order] == turned.rows
    assert {name: value for name, value in result.metrics.items() if "mean" not in name} == {
        name: value for name, value in turned.metrics.items() if "mean" not in name
    }
    assert result.metrics["context/prompt_tokens_mean"] == pytest.approx(turned.metrics["context/prompt_tokens_mean"])
    for (prompt, reference), context in zip(rows, result.rows, strict=True):
        assert contexts([(prompt, reference)]).rows == [context]
        assert context.text == (f"{prompt}|{reference}" if reference else None)
    assert result.metrics["context/prompts_rendered"] == len({row for row in rows if row[1]})


def test_ten_thousand_rows_render_a_thousand_prompts_once_each():
    class Fake:
        calls = 0
        all_special_tokens = ["<|im_end|>"]
        added_tokens_decoder = {0: AddedToken("<|im_end|>", special=True)}

        def apply_chat_template(self, messages, **_):
            self.calls += 1
            return [1, 2, 3]

    # strings of their own for every row, as they come from a store
    infos = [{"solution": f"{i % 1000} " + "x + y = z. " * 400, "problem": f"{i % 1000}?"} for i in range(10_000)]
    tokenizer = Fake()
    result = build(infos, tokenizer)
    assert tokenizer.calls == result.metrics["context/prompts_rendered"] == 1000
    assert result.metrics["context/distilled"] == 10_000


def test_rollouts_of_a_question_share_one_prompt_and_questions_do_not(tokenizer):
    infos = [{"solution": solution, "problem": problem} for solution in "ST" for problem in "PQ"] * 2
    result = build(infos, tokenizer)
    assert result.metrics["context/prompts_rendered"] == 4
    for first, second in zip(result.rows[:4], result.rows[4:], strict=True):
        assert first.token_ids is second.token_ids and first.messages is second.messages
    system = [[{"role": "system", "content": text}, *user("Solve Q.")] for text in "ab"]
    other = build([{"solution": "S"}] * 2, tokenizer, prompts=system)
    assert other.metrics["context/prompts_rendered"] == 2 and other.rows[0].messages != other.rows[1].messages


def test_a_message_that_is_not_plain_data_is_rendered_for_itself(tokenizer):
    prompts = [[{"role": "system", "content": "S", "tool": {text}}, *user(text)] for text in "ab"]
    result = build([{"solution": "S"}] * 2, tokenizer, Config(reference_template="{prompt}{solution}"), prompts=prompts)
    assert [row.text for row in result.rows] == ["aS", "bS"] and result.rows[1].messages[0]["tool"] == {"b"}


def test_errors_name_the_row(tokenizer):
    with pytest.raises(ValueError, match="row b: extra_info.solution .* found list"):
        build([{"solution": "S"}, {"solution": ["a", "b"]}], tokenizer, row_names_N=["a", "b"])
    with pytest.raises(ValueError, match="row 0: extra_info.solution .* found float: nan"):
        build([{"solution": float("nan")}], tokenizer)
    with pytest.raises(ValueError, match="row 0: extra_info.problem .* found int"):
        build([{"solution": "S", "problem": 3}], tokenizer)
    with pytest.raises(ValueError, match="row 0: extra_info must be a mapping, found NoneType"):
        build([None], tokenizer)
    with pytest.raises(ValueError, match="response_lengths has 1 entries for 2 rows"):
        build([{"solution": "S"}] * 2, tokenizer, lengths=[1])


def test_no_rows(tokenizer):
    result = build([], tokenizer)
    assert result.rows == [] and set(result.metrics.values()) == {0.0}


def test_metric_names_cannot_be_reduced_wrongly(tokenizer):
    # verl takes the largest or smallest value of a list whose name contains these
    names = build([{"solution": "S"}], tokenizer).metrics
    assert names and not [name for name in names if "max" in name or "min" in name]


# ------------------------------------------------------------------------------------------------ before a run starts


def test_missing_references_are_named():
    rows = [
        {"question_id": "a", "solution": "S"},
        {"question_id": "b", "solution": ""},
        {"question_id": "c"},
        {"solution": None},
        {"question_id": "e", "solution": "<think>t</think>"},
    ]
    assert check_reference(iter(rows), "solution") == [(1, "b"), (2, "c"), (3, None)]
    assert check_reference(rows, "solution", thinking_removed=True) == [(1, "b"), (2, "c"), (3, None), (4, "e")]
    assert check_reference(rows[:1], "solution") == [] == check_reference([], "solution")


def test_a_key_that_no_row_has_is_told_from_one_without_text():
    rows = [{"question_id": "a", "solution": "S"}, {"question_id": "b", "problem": "P"}]
    with pytest.raises(ValueError, match=r"extra_info.answer; .* \['problem', 'question_id', 'solution'\]"):
        check_reference(rows, "answer")
    assert check_reference([{"question_id": "a", "answer": None}], "answer") == [(0, "a")]


def test_values_that_are_not_text_are_refused_with_their_row():
    rows = [{"solution": "S"}, {"solution": ["a", " "]}, {"solution": []}, {"solution": 3}]
    with pytest.raises(ValueError, match="row 1: .* found list"):
        check_reference(rows, "solution")
    assert check_reference(rows[:3], "solution", lists=True) == [(2, None)]
    with pytest.raises(ValueError, match="row 3: .* found int"):
        check_reference(rows, "solution", lists=True)
    with pytest.raises(ValueError, match="row 0: extra_info must be a mapping"):
        check_reference([["solution"]], "solution", lists=True)


def test_special_tokens_are_found_before_a_run(tokenizer):
    rows = [
        {"question_id": "a", "solution": "fine"},
        {"question_id": "b", "solution": "x<|im_end|>y<|im_start|>"},
        {"question_id": "c", "solution": None},
        {"question_id": "d", "solution": "<think><|endoftext|></think>4"},
    ]
    assert check_special_tokens(rows, "solution", tokenizer) == [(1, "b", "<|im_end|>"), (3, "d", "<|endoftext|>")]
    assert check_special_tokens(rows, "solution", tokenizer, thinking_removed=True) == [(1, "b", "<|im_end|>")]
    lists = [{"solution": ["fine", "<|im_end|>", "<|im_end|>"]}]
    assert check_special_tokens(lists, "solution", tokenizer, lists=True) == [(0, None, "<|im_end|>")]


def test_what_the_checks_pass_is_what_the_batch_uses(tokenizer):
    values = ["S", "", None, "<think>t</think>", "<think>t</think>S", "a<|im_end|>", "<think><|im_end|></think>S"]
    infos = [{"solution": value} for value in values]
    for removed in (False, True):
        named = {row for row, _ in check_reference(infos, "solution", thinking_removed=removed)}
        named |= {row for row, _, _ in check_special_tokens(infos, "solution", tokenizer, thinking_removed=removed)}
        result = build(infos, tokenizer, Config(remove_thinking=removed))
        assert {i for i, row in enumerate(result.rows) if row.messages is None} == named


def test_real_rows_have_what_the_templates_ask_for(tmp_path):
    """The tiny world writes a bare question and a solution into every row."""
    make_tiny_world(["--out", str(tmp_path), "--train-size", "24", "--test-size", "6"])
    infos = pq.read_table(tmp_path / "train.parquet", columns=["extra_info"]).column("extra_info").to_pylist()
    assert check_reference(infos, "solution") == check_reference(infos, reference_context.PROBLEM_KEY) == []
