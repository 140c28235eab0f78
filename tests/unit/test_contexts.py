"""Teacher contexts: templates, thinking removal, choice of demonstrations, rendering, length limits."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl_ext import contexts
from verl_ext.contexts import (
    ContextTemplates,
    PromptTokenizer,
    build_contexts,
    check_prompt_parity,
    remove_thinking,
    render_context,
    select_demonstrations,
    usable_feedback,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so a prompt's length can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)


@dataclass
class Config:
    """Same attributes as ContextConfig, so that these tests need no other module of ours."""

    kind: str = "sibling"
    demonstration: str = "first"
    own_success: bool = False
    remove_thinking: bool = True
    success_threshold: float = 0.5
    feedback: bool = False
    feedback_only_without_solution: bool = True
    max_length: int = 10_000
    reprompt_template: str = contexts.REPROMPT_TEMPLATE
    solution_template: str = contexts.SOLUTION_TEMPLATE
    feedback_template: str = contexts.FEEDBACK_TEMPLATE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def one_group(successes: list[bool], tokenizer, config: Config | None = None, **overrides):
    """Contexts of one question whose rollout i answered 'answer i'."""
    rows = len(successes)
    arguments = {
        "raw_prompts_N": [user("Q?")] * rows,
        "responses_N": [f"answer {i}" for i in range(rows)],
        "feedback_N": None,
        "question_index_N": [0] * rows,
        "successes_N": successes,
        "rollout_index_N": list(range(rows)),
        "response_lengths_N": [5] * rows,
        "tokenizer": tokenizer,
        "config": config or Config(),
        "question_keys_Q": ["q"],
    }
    arguments.update(overrides)
    return build_contexts(
        arguments.pop("raw_prompts_N"), arguments.pop("responses_N"), arguments.pop("feedback_N"), **arguments
    )


# ---------------------------------------------------------------------------------------------------------- templates


def test_templates_are_sdpos_byte_for_byte():
    assert contexts.REPROMPT_TEMPLATE.encode() == (
        b"{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
    )
    assert contexts.SOLUTION_TEMPLATE.encode() == b"\nCorrect solution:\n\n{successful_previous_attempt}"
    assert contexts.FEEDBACK_TEMPLATE.encode() == (
        b"\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"
    )


def test_full_text_with_solution_and_feedback():
    rendered = render_context(user("What is 2+2?"), "It is 4.", "wrong: 5")
    assert rendered == user(
        "What is 2+2?\nCorrect solution:\n\nIt is 4."
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\nwrong: 5"
        "\n\nCorrectly solve the original question."
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"reprompt": "{prompt}{solution}{feedback}{hint}"}, "hint"),
        ({"reprompt": "{prompt}{feedback}"}, "solution"),
        ({"solution": "no place for it"}, "successful_previous_attempt"),
        ({"feedback": "{feedback_raw"}, "feedback_template"),
    ],
)
def test_a_bad_template_is_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        ContextTemplates(**changes)


# ----------------------------------------------------------------------------------------------------------- thinking


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain answer", "plain answer"),
        ("<think>a\nb</think>\n\n answer ", "answer "),
        ("x <think>a</think> y <think>b</think>\tz", "x y z"),
        ("<think>short</think>kept</think>", ""),  # the second closing tag is an orphan at the very end
        ("still thinking </think>\n answer", "answer"),
        ("a</think>b</think> c", "c"),
        ("answer <think>and then", "answer "),
        ("<think>never closed", ""),
        ("hidden</think>shown<think>hidden too", "shown"),
        ("", ""),
    ],
)
def test_remove_thinking(text, expected):
    assert remove_thinking(text) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", " ", "<thi", "nk>"]), max_size=12).map("".join))
def test_no_tag_survives_and_nothing_is_invented(text):
    cleaned = remove_thinking(text)
    assert "<think>" not in cleaned and "</think>" not in cleaned
    assert not Counter(cleaned) - Counter(text)
    assert remove_thinking(cleaned) == cleaned


# ----------------------------------------------------------------------------------------------------- demonstrations


def choose(question, success, rollout, *, lengths=None, choice="first", own=False, seed=0, step=0, keys=None):
    questions = max(question, default=-1) + 1
    return select_demonstrations(
        question,
        success,
        lengths or [1] * len(question),
        choice=choice,
        own_success=own,
        seed=seed,
        step=step,
        rollout_index_N=rollout,
        question_keys_Q=keys or [f"q{i}" for i in range(questions)],
    )


@pytest.mark.parametrize("choice", contexts.DEMONSTRATION_CHOICES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("successes", range(9))
def test_rows_with_a_demonstration_at_g_8(successes, own, choice):
    success = [i >= 8 - successes for i in range(8)]
    found = choose([0] * 8, success, list(range(8)), choice=choice, own=own)
    expected = {0: 0, 1: 8 if own else 7}.get(successes, 8)
    assert sum(row is not None for row in found) == expected
    assert all(row is None or success[row] for row in found)
    assert own or all(found[i] != i for i in range(8))


def test_first_is_first_in_rollout_order_and_the_first_success_gets_the_second():
    # rows arrive as rollouts 3, 0, 2, 1; rollouts 1 and 2 succeeded, so rows 3 and 2 are the pool, in that order
    assert choose([0] * 4, [False, False, True, True], [3, 0, 2, 1]) == [3, 3, 3, 2]
    assert choose([0] * 4, [False, False, True, True], [3, 0, 2, 1], own=True) == [3, 3, 3, 3]


def test_shortest_takes_the_fewest_tokens_then_the_earlier_rollout():
    found = choose([0] * 4, [True, True, True, False], [2, 1, 0, 3], lengths=[7, 7, 9, 1], choice="shortest")
    assert found == [1, 0, 1, 1]


def test_demonstrations_never_cross_questions():
    assert choose([0, 1, 0, 1], [True, False, False, False], [0, 0, 1, 1]) == [None, None, 0, None]


def test_random_spreads_over_the_candidates_and_changes_with_seed_and_step():
    questions, size = 300, 8
    question = [q for q in range(questions) for _ in range(size)]
    rollout = list(range(size)) * questions
    success = [r < 4 for r in rollout]
    found = choose(question, success, rollout, choice="random", seed=1)
    failed = Counter(found[i] % size for i in range(len(found)) if not success[i])
    # 1,200 draws over 4 candidates: 300 each, standard deviation 15
    assert set(failed) == {0, 1, 2, 3} and all(220 < count < 380 for count in failed.values())
    lone = Counter(found[i] % size for i in range(len(found)) if rollout[i] == 1)
    assert set(lone) == {0, 2, 3} and all(60 < count < 140 for count in lone.values())
    # each row draws on its own: all four failed rows of a question agree in 4 of 256 cases
    agreeing = sum(len(set(found[q * size + 4 : (q + 1) * size])) == 1 for q in range(questions))
    assert agreeing < 20
    assert found == choose(question, success, rollout, choice="random", seed=1)
    assert found != choose(question, success, rollout, choice="random", seed=2)
    assert found != choose(question, success, rollout, choice="random", seed=1, step=1)


@st.composite
def groups(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rows = [(q, draw(st.booleans()), draw(st.integers(1, 3)), r) for q, size in enumerate(sizes) for r in range(size)]
    return rows, draw(st.permutations(range(len(rows))))


@given(groups(), st.sampled_from(contexts.DEMONSTRATION_CHOICES), st.booleans(), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_choice_does_not_depend_on_row_order_and_equals_a_plain_search(case, choice, own, seed):
    rows, permutation = case

    def run(order):
        picked = [rows[i] for i in order]
        # question numbers follow first appearance, as they do in a real batch
        numbers: dict[int, int] = {}
        index = [numbers.setdefault(row[0], len(numbers)) for row in picked]
        found = choose(
            index,
            [row[1] for row in picked],
            [row[3] for row in picked],
            lengths=[row[2] for row in picked],
            choice=choice,
            own=own,
            seed=seed,
            keys=[f"q{q}" for q in numbers],
        )
        return {order[i]: None if row is None else order[row] for i, row in enumerate(found)}

    plain = run(list(range(len(rows))))
    assert run(list(permutation)) == plain
    for i, row in enumerate(rows):
        pool = [j for j, other in enumerate(rows) if other[0] == row[0] and other[1] and (own or j != i)]
        if choice == "shortest":
            pool.sort(key=lambda j: (rows[j][2], rows[j][3]))
        if not pool:
            assert plain[i] is None
        elif choice == "random":
            assert plain[i] in pool
        else:
            assert plain[i] == pool[0]


def test_a_large_batch_is_chosen_like_its_parts():
    # 100,000 rows, every question with its own pattern; each must get what it gets alone
    questions, size = 12_500, 8
    rollout = list(range(size)) * questions
    question = [q for q in range(questions) for _ in range(size)]
    success = [(q * 37 >> r) & 1 == 1 for q, r in zip(question, rollout, strict=True)]
    found = choose(question, success, rollout)
    assert len(found) == 100_000
    for q in (0, 1, 777, 6_001, 12_499):
        alone = choose([0] * size, success[q * size : (q + 1) * size], list(range(size)))
        assert found[q * size : (q + 1) * size] == [None if row is None else row + q * size for row in alone]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="'longest'"):
        choose([0], [True], [0], choice="longest")
    with pytest.raises(ValueError, match="rows 0 and 2 are both rollout 4"):
        choose([0, 0, 0], [True] * 3, [4, 1, 4])
    with pytest.raises(ValueError, match="2 successes"):
        choose([0], [True, True], [0])
    with pytest.raises(ValueError, match="row 1: question index -1"):
        choose([0, -1], [True, True], [0, 1])
    with pytest.raises(ValueError, match="random"):
        choose([0, 1], [True, True], [0, 0], choice="random", keys=["only one"])
    assert choose([], [], []) == []


# ---------------------------------------------------------------------------------------------------------- rendering


def test_earlier_turns_are_kept_and_the_prompt_is_not_changed():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "2+2?"},
    ]
    before = copy.deepcopy(messages)
    rendered = render_context(messages, "4", None)
    assert rendered[:-1] == before[:-1]
    assert rendered[-1] == {
        "role": "user",
        "content": "2+2?\nCorrect solution:\n\n4\n\nCorrectly solve the original question.",
    }
    rendered[0]["content"] = "changed"
    assert messages == before


@given(st.text(alphabet="{}promtsluin\\% 0", max_size=30), st.text(alphabet="{}feedback_raw! ", max_size=30))
def test_braces_in_values_are_plain_text(solution, feedback):
    prompt = "f(x) = {x}, {prompt}, {{}}"
    text = render_context(user(prompt), solution, feedback)[-1]["content"]
    assert text == (
        prompt
        + "\nCorrect solution:\n\n"
        + solution
        + "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
        + feedback
        + "\n\nCorrectly solve the original question."
    )


def test_no_context_without_solution_and_feedback():
    assert render_context(user("Q"), None, None) is None


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "just text",
        ["just text"],
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        [{"role": "user", "content": [{"type": "text", "text": "Q"}]}],
        [{"role": "user"}],
    ],
)
def test_a_prompt_that_cannot_be_used_names_its_row(messages):
    with pytest.raises(ValueError, match="row 17"):
        render_context(messages, "S", None, row=17)


@pytest.mark.parametrize(
    ("feedback", "has_solution", "only_without", "used"),
    [
        ("bad", False, True, True),
        ("bad", False, False, True),
        ("bad", True, True, False),
        ("bad", True, False, True),
        (" \n\t", False, False, False),
        ("", False, False, False),
        (None, False, False, False),
    ],
)
def test_feedback_rules(feedback, has_solution, only_without, used):
    found = usable_feedback(feedback, has_solution=has_solution, only_without_solution=only_without)
    assert found == (feedback if used else None)


def test_feedback_that_is_not_text_is_refused():
    with pytest.raises(ValueError, match="row 3.*float"):
        usable_feedback(float("nan"), has_solution=False, only_without_solution=True, row=3)


# ------------------------------------------------------------------------------------------------------- tokenisation


def test_prompt_ids_are_the_chat_templates_with_the_generation_prompt(tokenizer):
    ids = PromptTokenizer(tokenizer, {"enable_thinking": False})(user("Häh?"))
    assert tokenizer.decode(ids) == "[user]Häh?\n[assistant]<think></think>"
    assert tokenizer.decode(PromptTokenizer(tokenizer)(user("Häh?"))) == "[user]Häh?\n[assistant]"


def test_equal_prompts_are_tokenised_once(tokenizer):
    tokenize = PromptTokenizer(tokenizer)
    assert tokenize(user("a")) is tokenize(user("a")) and tokenize.calls == 1
    assert tokenize(user("b")) != tokenize(user("a")) and tokenize.calls == 2


def test_template_arguments_we_set_ourselves_are_refused(tokenizer):
    with pytest.raises(ValueError, match="add_generation_prompt"):
        PromptTokenizer(tokenizer, {"add_generation_prompt": False})


def test_parity_check_finds_another_generation_prompt(tokenizer):
    student = PromptTokenizer(tokenizer, {"enable_thinking": False})(user("Q"))
    check_prompt_parity(user("Q"), student, tokenizer, {"enable_thinking": False})
    with pytest.raises(ValueError, match="row 5.*first difference at token 19"):
        check_prompt_parity(user("Q"), student, tokenizer, {}, row=5)
    with pytest.raises(ValueError, match="first difference at token 6"):
        check_prompt_parity(user("R"), student, tokenizer, {"enable_thinking": False})


# ------------------------------------------------------------------------------------------------------ whole batches


@pytest.mark.parametrize(("successes", "own", "rows"), [(0, False, 0), (1, False, 7), (2, False, 8), (8, False, 8)])
def test_rows_distilled_at_g_8(successes, own, rows, tokenizer):
    result = one_group([i < successes for i in range(8)], tokenizer)
    assert sum(row.distill for row in result.rows) == rows == result.metrics["context/distilled"]
    assert result.metrics["context/lone_success"] == float(successes == 1)
    assert result.metrics["context/no_success"] == float(successes == 0)
    assert result.metrics["context/with_demonstration"] == rows
    assert result.metrics["context/without_context"] == 8 - rows


@pytest.mark.parametrize("successes", [1, 2, 8])
def test_rows_distilled_with_own_success(successes, tokenizer):
    result = one_group([i < successes for i in range(8)], tokenizer, Config(own_success=True))
    assert all(row.distill for row in result.rows)


def test_a_single_rollout_has_no_sibling(tokenizer):
    result = one_group([True], tokenizer)
    assert result.rows[0].token_ids is None and result.rows[0].messages is None


def test_teacher_prompt_of_a_row_holds_the_sibling_and_not_its_own_attempt(tokenizer):
    result = one_group([False, True, True], tokenizer)
    text = tokenizer.decode(result.rows[0].token_ids)
    assert text == ("[user]Q?\nCorrect solution:\n\nanswer 1\n\nCorrectly solve the original question.\n[assistant]")
    assert [row.demonstration for row in result.rows] == [1, 2, 1]
    assert result.rows[0].prompt_tokens == len(text)
    # rows 0 and 2 share one prompt, so two were rendered
    assert result.metrics["context/prompts_rendered"] == 2
    assert result.metrics["context/prompt_tokens_mean"] == len(text)


def test_thinking_is_removed_only_where_asked(tokenizer):
    responses = ["x", "<think>secret</think>\n42"]
    cleaned = one_group([False, True], tokenizer, responses_N=responses)
    assert "secret" not in cleaned.rows[0].text and "\n\n42\n\n" in cleaned.rows[0].text
    raw = one_group([False, True], tokenizer, Config(remove_thinking=False), responses_N=responses)
    assert "<think>secret</think>\n42" in raw.rows[0].text


def test_a_success_without_text_is_no_demonstration(tokenizer):
    responses = ["x", "<think>never ends", "good"]
    result = one_group([False, True, True], tokenizer, responses_N=responses)
    assert [row.demonstration for row in result.rows] == [2, 2, None]
    assert result.metrics["context/empty_demonstration"] == 1
    assert result.metrics["context/lone_success"] == 0  # two rows did succeed


def test_only_own_feedback_is_used(tokenizer):
    feedback = ["about row 0", "about row 1", "  "]
    config = Config(feedback=True)
    result = one_group([False, False, False], tokenizer, config, feedback_N=feedback)
    assert [row.used_feedback for row in result.rows] == [True, True, False]
    assert [row.distill for row in result.rows] == [True, True, False]
    assert "about row 1" in result.rows[1].text and "about row 0" not in result.rows[1].text
    assert "Correct solution" not in result.rows[1].text
    assert result.metrics["context/with_feedback"] == 2 and result.metrics["context/with_demonstration"] == 0


def test_feedback_beside_a_demonstration(tokenizer):
    feedback = ["about row 0", None]
    only = one_group([False, True], tokenizer, Config(feedback=True), feedback_N=feedback)
    assert not only.rows[0].used_feedback and "about row 0" not in only.rows[0].text
    both = one_group(
        [False, True], tokenizer, Config(feedback=True, feedback_only_without_solution=False), feedback_N=feedback
    )
    assert both.rows[0].used_feedback and both.rows[0].text.index("answer 1") < both.rows[0].text.index("about row 0")
    off = one_group([False, False], tokenizer, Config(feedback=False), feedback_N=feedback)
    assert not any(row.distill for row in off.rows)


def test_too_long_prompts_are_counted_and_left_out_and_nothing_is_cut(tokenizer):
    full = one_group([False, True, True], tokenizer).rows[0].prompt_tokens
    fits = one_group([False, True, True], tokenizer, Config(max_length=full))
    assert all(row.distill and len(row.token_ids) == full for row in fits.rows)
    over = one_group([False, True, True], tokenizer, Config(max_length=full - 1))
    assert not any(row.distill for row in over.rows) and all(row.too_long for row in over.rows)
    assert over.metrics["context/too_long"] == 3 and over.metrics["context/distilled"] == 0
    assert over.metrics["context/with_demonstration"] == 3
    assert over.rows[0].prompt_tokens == full  # what was found, for the message to the user


def test_prompt_and_response_together_must_fit_the_model(tokenizer):
    full = one_group([False, True, True], tokenizer).rows[0].prompt_tokens
    result = one_group([False, True, True], tokenizer, response_lengths_N=[5, 6, 7], max_total=full + 6)
    assert [row.distill for row in result.rows] == [True, True, False]
    assert result.metrics["context/too_long"] == 1


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = byte_tokenizer()

    def state():
        names = ("padding_side", "truncation_side", "chat_template", "model_max_length", "special_tokens_map")
        return [copy.deepcopy(getattr(tokenizer, name)) for name in names] + [tokenizer.backend_tokenizer.to_str()]

    before = state()
    one_group([False, True], tokenizer, Config(max_length=3))
    assert state() == before


def test_errors_name_the_row(tokenizer):
    prompts = [user("Q?"), [{"role": "system", "content": "S"}], user("Q?")]
    with pytest.raises(ValueError, match="row 1.*system"):
        one_group([True, False, False], tokenizer, raw_prompts_N=prompts)
    with pytest.raises(ValueError, match="row b: feedback"):
        one_group([False] * 3, tokenizer, Config(feedback=True), feedback_N=[None, 3, None], row_names_N=list("abc"))
    with pytest.raises(ValueError, match="responses has 1 entries for 3 rows"):
        one_group([False] * 3, tokenizer, responses_N=["x"])


def test_metric_names_cannot_be_reduced_wrongly(tokenizer):
    # verl takes the largest or smallest value of a list whose name contains these
    names = one_group([False, True], tokenizer).metrics
    assert names and not [name for name in names if "max" in name or "min" in name]


def test_custom_templates_reach_the_prompt(tokenizer):
    config = replace(
        Config(),
        reprompt_template="{feedback}|{solution}|{prompt}",
        solution_template="S={successful_previous_attempt}",
    )
    assert one_group([False, True], tokenizer, config).rows[0].text == "|S=answer 1|Q?"
