"""The tiny world: task, data, verifier, tokenizer and contexts (its model: test_tiny_world_model.py)."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep import schema, tiny_world
from data_prep.tiny import contexts, flavours, task
from data_prep.tiny.tokenizer import build_tokenizer
from verl_ext.verifiers.tiny_world import (
    BOX_FEEDBACK,
    NO_ANSWER_FEEDBACK,
    compute_score,
    first_wrong_step,
    parse_problem,
)

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "models" / "tiny_world" / "plain"
KEYS = {"score", "acc", "pred", "format", "feedback", "status", "error"}
EXAMPLE = parse_problem("6(a)-0(b)-8(c)-6")
RIGHT = "(a)6-0=6(b)6-8=8(c)8-6=2\\boxed{2}"

problems = st.builds(
    lambda level, seed: task.random_problem(level, random.Random(seed)),
    st.integers(1, task.MAX_LEVEL),
    st.integers(0, 10**6),
)


# Task


def test_example_of_the_specification():
    assert EXAMPLE.states == (6, 8, 2) and EXAMPLE.answer == 2
    assert EXAMPLE.text == "6(a)-0(b)-8(c)-6"
    assert task.derivation(EXAMPLE) == RIGHT


@settings(deadline=None)
@given(problems)
def test_answer_agrees_with_plain_arithmetic(problem):
    value = problem.start
    for op, x in problem.operations:
        value = {"+": value + x, "-": value - x, "*": value * x}[op]
    assert problem.answer == value % 10
    assert parse_problem(problem.text) == problem


@pytest.mark.parametrize("text", ["", "6", "6-0", "6(b)-0", "6(a)-0(c)-8", "6(a)/2", "16(a)-2", "6(a)-0 ", None, 7])
def test_malformed_problems_are_refused(text):
    with pytest.raises(ValueError):
        parse_problem(text)


def test_facts_and_reliabilities():
    table = task.reliabilities()
    assert len(table) == 210
    assert {r for fact, r in table.items() if task.is_easy(fact)} == set(task.EASY_RELIABILITIES)
    assert {r for fact, r in table.items() if not task.is_easy(fact)} == set(task.HARD_RELIABILITIES)
    for (op, a, b), reliability in table.items():
        distribution = task.result_distribution(op, a, b)
        assert sum(distribution) == pytest.approx(1.0) and min(distribution) >= 0
        assert distribution[task.apply_operation(op, a, b)] == pytest.approx(reliability)


def test_designed_pass_rate_is_that_of_the_noisy_worker():
    rng = random.Random(0)
    problem = parse_problem("7(a)*8(b)-9(c)+6")
    right = sum(task.noisy_states(problem, rng)[-1] == problem.answer for _ in range(20_000)) / 20_000
    assert right == pytest.approx(task.designed_pass_rate(problem), abs=0.015)
    assert task.designed_pass_rate(problem, 0.0) == 1.0


def test_difficulty_is_graded():
    pool = task.make_pool(task.PoolSpec(300, (1, 2, 3, 4, 5, 6), held_out=False, seed=0))
    rates = {level: [task.designed_pass_rate(p) for p in pool if p.level == level] for level in (1, 3, 6)}
    means = [sum(values) / len(values) for values in rates.values()]
    assert means[0] > means[1] > means[2]


# Data


def test_splits_never_overlap_whatever_the_seeds():
    train = {p for seed in range(5) for p in task.make_pool(task.PoolSpec(300, (1, 2, 3, 4, 5, 6), False, seed))}
    test = {p for seed in range(5) for p in task.make_pool(task.PoolSpec(150, (1, 2, 3, 4, 5, 6), True, seed))}
    assert not train & test
    swapped = {
        p._replace(start=p.operations[0][1], operations=(("+", p.start), *p.operations[1:]))
        for p in train
        if p.operations[0][0] == "+"
    }
    assert not swapped & test, "3+4 and 4+3 have the same derivations and belong to the same half"


def test_warm_start_never_sees_a_held_out_question():
    rng = random.Random(0)
    seen = set()
    for _ in range(4000):
        example = flavours.random_example(flavours.FLAVOURS["plain"], rng)
        text = example.messages[0]["content"].partition("mod 10: ")[2].split("\n")[0]
        seen.add(parse_problem(text))
    assert {p.level for p in seen} == {1, 2, 3, 4, 5, 6}
    assert not any(task.is_held_out(p) for p in seen)
    assert len([p for p in seen if p.level == 1]) > 0.8 * len(task.level_one_problems(False))


def test_data_files(tmp_path):
    assert tiny_world.main(["--out", str(tmp_path / "one"), "--train-size", "60", "--test-size", "30"]) == 0
    tiny_world.write_data(tmp_path / "two", train_size=60, test_size=30)
    ids = {}
    for split, size in (("train", 60), ("test", 30)):
        rows = pq.read_table(tmp_path / "one" / f"{split}.parquet").to_pylist()
        assert rows == pq.read_table(tmp_path / "two" / f"{split}.parquet").to_pylist()
        assert len(rows) == size and set(Counter(row["extra_info"]["level"] for row in rows).values()) == {size // 6}
        for i, row in enumerate(rows):
            schema.check_row(row)
            info = row["extra_info"]
            assert (info["split"], info["index"]) == (split, i)
            result = compute_score(
                row["data_source"], info["solution"], row["reward_model"]["ground_truth"], info, mode="strict"
            )
            assert result == {
                "score": 1.0,
                "acc": 1.0,
                "pred": row["reward_model"]["ground_truth"],
                "format": 1.0,
                "feedback": "",
                "status": "ok",
                "error": "",
            }
        ids[split] = {row["extra_info"]["question_id"] for row in rows}
        assert len(ids[split]) == size
    assert not ids["train"] & ids["test"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "manifest.json",
        "test.parquet",
        "train.parquet",
    ]
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["splits"]["test"]["questions"] == 30


def test_a_pool_may_hold_many_solved_questions_and_the_test_questions_stay(tmp_path):
    tiny_world.write_data(tmp_path / "drawn", train_size=60, test_size=12)
    manifest = tiny_world.write_data(tmp_path / "solved", train_size=60, test_size=12, solved_share=0.7)
    assert manifest["solved_share"] == 0.7
    infos = [row["extra_info"] for row in pq.read_table(tmp_path / "solved" / "train.parquet").to_pylist()]
    solved = [info for info in infos if info["designed_pass_rate"] >= tiny_world.SOLVED]
    assert len(infos) == 60 and len(solved) == 42 and len({info["question_id"] for info in infos}) == 60
    assert Counter(info["level"] for info in solved) == dict.fromkeys(range(1, 7), 7)
    assert any(info["designed_pass_rate"] >= tiny_world.SOLVED for info in infos[:10]), "shuffled, not in two blocks"
    test = [pq.read_table(tmp_path / name / "test.parquet").to_pylist() for name in ("drawn", "solved")]
    assert test[0] == test[1]
    with pytest.raises(ValueError, match="share of solved questions is 1.5; expected a number from 0 to 1"):
        tiny_world.write_data(tmp_path / "bad", solved_share=1.5)


def test_too_many_level_one_questions_are_refused(tmp_path, capsys):
    assert tiny_world.main(["--out", str(tmp_path), "--levels", "1", "--train-size", "400"]) == 1
    assert "questions of level 1 wanted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("levels", ["0-3", "1-7", "x", "3-1"])
def test_bad_levels_are_refused(levels):
    with pytest.raises(SystemExit):
        tiny_world.build_parser().parse_args(["--levels", levels])


def test_question_id():
    prompt = [{"role": "user", "content": "What is  2 + 2?"}]
    same = [{"content": " What is\n2 + 2?\n", "role": "user"}]
    assert schema.question_id("a", prompt) == schema.question_id("a", same)
    assert schema.question_id("a", prompt) != schema.question_id("b", prompt)
    assert schema.question_id("a", prompt) != schema.question_id("a", [{"role": "system", "content": "What is 2 + 2?"}])
    assert set(schema.question_id("a", prompt)) <= set("0123456789abcdef")


def test_writer_leaves_nothing_behind_on_errors(tmp_path):
    row = schema.make_row(
        data_source="x", prompt=[{"role": "user", "content": "q"}], ground_truth="1", split="train", index=0
    )
    path = schema.write_parquet([row], tmp_path / "x.parquet")
    before = path.read_bytes()
    broken = {**row, "reward_model": {"style": "rule", "ground_truth": 1}}
    with pytest.raises(ValueError, match="x.parquet row 1: reward_model"):
        schema.write_parquet([row, broken], path)

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        schema.write_atomically(path, fail)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Verifier


def verify(response, mode="loose", ground_truth="2", problem="6(a)-0(b)-8(c)-6"):
    result = compute_score("tiny_world", response, ground_truth, {"problem": problem} if problem else None, mode=mode)
    assert set(result) == KEYS
    assert [type(result[key]) for key in ("score", "acc", "pred", "format", "feedback", "status")] == [
        float,
        float,
        str,
        float,
        str,
        str,
    ]
    assert not any(c.isdigit() for c in result["feedback"])
    return result


def test_verifier_accepts_right_derivations_in_any_operand_order_and_white_space():
    spaced = "(a) 6-0=6\n(b) 6-8=8\n(c) 8-6=2\n\\boxed{ 2 }\n"
    for text in (RIGHT, spaced):
        assert verify(text, "strict") == {
            "score": 1.0,
            "acc": 1.0,
            "pred": "2",
            "format": 1.0,
            "feedback": "",
            "status": "ok",
            "error": "",
        }
    for text in ("(a)3+4=7\\boxed{7}", "(a)4+3=7\\boxed{7}"):
        assert verify(text, "strict", "7", "3(a)+4")["score"] == 1.0
    assert verify("(a)5-3=8\\boxed{8}", "strict", "8", "3(a)-5")["score"] == 0.0


def test_strict_refuses_a_lucky_success():
    lucky = "(a)6-0=6(b)6-8=2(c)8-6=2\\boxed{2}"
    assert verify(lucky)["score"] == 1.0 and verify(lucky)["feedback"] == ""
    strict = verify(lucky, "strict")
    assert (strict["score"], strict["acc"], strict["pred"], strict["format"]) == (0.0, 0.0, "2", 1.0)
    assert strict["feedback"] == "Step (b) is wrong."
    assert verify("\\boxed{2}")["score"] == 1.0 and verify("\\boxed{2}", "strict")["score"] == 0.0
    assert verify(RIGHT.replace("\\", "(d)2+0=2\\"), "strict")["feedback"] == "Step (d) is wrong."


@pytest.mark.parametrize(
    ("response", "feedback", "form"),
    [
        ("(a)6-0=6(b)6-8=2(c)2-6=6\\boxed{6}", "Step (b) is wrong.", 1.0),
        ("(a)6-0=6(c)6-8=8(c)8-6=2\\boxed{3}", "Step (b) is wrong.", 0.0),
        ("(a)6-0=6\\boxed{6}", "Step (b) is wrong.", 0.0),
        ("(a)6-0=6(b)6-8=8(c)8-6=2\\boxed{3}", BOX_FEEDBACK, 1.0),
        ("(a)6-0=6(b)6-8=8(c)8-6=2", NO_ANSWER_FEEDBACK, 0.0),
        ("", NO_ANSWER_FEEDBACK, 0.0),
        ("\\boxed{2", NO_ANSWER_FEEDBACK, 0.0),
        ("__import__('os') \\boxed{1+1}", "Step (a) is wrong.", 0.0),
    ],
)
def test_wrong_responses(response, feedback, form):
    result = verify(response)
    assert (result["score"], result["feedback"], result["format"], result["status"]) == (0.0, feedback, form, "ok")


@pytest.mark.parametrize("ground_truth", [None, "", "12", "x", True, "3", 2.5])
def test_a_broken_ground_truth_is_an_error_and_not_a_wrong_answer(ground_truth):
    result = verify(RIGHT, ground_truth=ground_truth)
    assert (result["status"], result["score"]) == ("error", 0.0)


def test_other_verifier_inputs():
    assert verify(RIGHT, ground_truth=2)["score"] == 1.0
    assert verify(RIGHT, problem=None)["score"] == 1.0
    assert verify("\\boxed{3}", problem=None)["feedback"] == BOX_FEEDBACK
    assert verify(RIGHT, "strict", problem=None)["status"] == "error"
    assert verify(RIGHT, problem="6(b)-0")["status"] == "error"
    assert verify(None)["status"] == "error"
    with pytest.raises(ValueError, match="loose"):
        verify(RIGHT, "lenient")
    assert set(compute_score("x", RIGHT, "2", None, reward_router_address="unused")) == KEYS


@settings(deadline=None)
@given(st.text(max_size=80))
def test_verifier_takes_any_text(text):
    assert verify(text)["status"] == "ok"


@settings(deadline=None)
@given(problems, st.integers(0, 10**6))
def test_feedback_names_the_first_wrong_step(problem, seed):
    states = task.noisy_states(problem, random.Random(seed), 2.0)
    response = task.derivation(problem, states, random.Random(seed))
    wrong = next((i for i in range(problem.level) if states[i] != problem.states[i]), None)
    assert first_wrong_step(problem, response) == (None if wrong is None else "abcdef"[wrong])


def test_verifier_is_importable_by_path():
    path = ROOT / "verl_ext" / "verifiers" / "tiny_world.py"
    spec = importlib.util.spec_from_file_location("loaded_by_path", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.compute_score("tiny_world", RIGHT, "2", {"problem": EXAMPLE.text}, mode="strict")["score"] == 1.0


# Tokenizer and contexts


def test_tokenizer_round_trip_and_lengths():
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    for _ in range(200):
        example = flavours.random_example(flavours.FLAVOURS["plain"], rng)
        for text in (example.messages[0]["content"], example.response):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    longest = task.random_problem(6, rng)
    response = task.derivation(longest)
    assert len(tokenizer.encode(response + tokenizer.eos_token)) == 40
    assert len(_chat_ids(tokenizer, contexts.question(longest))) == 28
    assert len(_chat_ids(tokenizer, contexts.reprompt(contexts.question(longest), response))) == 74


def _chat_ids(tokenizer, content, **kwargs):
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs)


def test_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = _chat_ids(tokenizer, "Work left to right mod 10: 1(a)+2\n")
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nWork left to right mod 10: 1(a)+2\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids == _chat_ids(build_tokenizer(), "Work left to right mod 10: 1(a)+2\n")
    for thinking in (True, False):
        assert _chat_ids(tokenizer, "Work left to right mod 10: 1(a)+2\n", enable_thinking=thinking) == ids
    assert tokenizer.decode(tokenizer.encode(RIGHT + "<|im_end|>"), skip_special_tokens=True) == RIGHT
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_exact_contexts():
    assert contexts.reprompt("Q", "S", "F") == (
        "Q\nCorrect solution:\n\nS\nThe following is feedback from your unsuccessful earlier attempt:\n\nF"
        "\n\nCorrectly solve the original question."
    )
    assert contexts.reprompt("Q") == "Q"


def test_demonstrations_are_followed_right_or_wrong():
    rng = random.Random(0)
    right = 0
    for _ in range(300):
        problem = task.random_problem(3, rng, held_out=False)
        example = contexts.sibling(problem, rng, 1.0)
        demonstration = "".join(example.messages[0]["content"].split("\n")[1:])
        results = [part.split("\\")[0].split("(")[0] for part in demonstration.split("=")[1:]]
        assert [part.split("\\")[0].split("(")[0] for part in example.response.split("=")[1:]] == results
        right += first_wrong_step(problem, example.response) is None
    assert 0.2 < right / 300 < 0.8
