"""The tiny world's other answer formats: their data, the real verifiers on them, and the checkpoint that knows them."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import schema, tiny_world
from data_prep.tiny import contexts, flavours, format_contexts, format_sampling, formats, task, warm_start
from data_prep.tiny.tokenizer import VOCAB_SIZE, build_tokenizer
from verl_ext.verifiers.tiny_world import first_wrong_step, parse_problem

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "models" / "tiny_world" / "formats"
PRESETS = {"multiple_choice": "tiny_world_mcq", "tool_call": "tiny_world_tools"}
EXAMPLE = parse_problem("6(a)-0(b)-8(c)-6")
STEPS = "(a)6-0=6(b)6-8=8(c)8-6=2"
FORMATS = sorted(formats.FORMATS)

by_format = pytest.mark.parametrize("name", FORMATS)


def preset(name: str) -> Any:
    return OmegaConf.load(ROOT / "conf" / "data" / f"{PRESETS[name]}.yaml")


def verifier(name: str) -> Callable[..., dict[str, Any]]:
    """The function that the preset names."""
    module, function = preset(name).verifier.function.split(":")
    return getattr(importlib.import_module(module), function)


def ask(name: str, seed: int = 0, problem: Any = EXAMPLE) -> formats.Asked:
    return formats.FORMATS[name].draw(problem, random.Random(seed))


def pool(size: int = 120, held_out: bool = False) -> list[Any]:
    return task.make_pool(task.PoolSpec(size, flavours.LEVELS, held_out, seed=0))


# Data


@by_format
def test_data_files(name, tmp_path):
    sizes = {"train": 60, "test": 30}
    for folder, seed in (("one", "0"), ("two", "0"), ("other", "1")):
        arguments = ["--flavour", name, "--out", str(tmp_path / folder), "--seed", seed]
        assert tiny_world.main([*arguments, "--train-size", "60", "--test-size", "30"]) == 0
    rows = {}
    for split, size in sizes.items():
        path = tmp_path / "one" / f"{split}.parquet"
        assert path.read_bytes() == (tmp_path / "two" / f"{split}.parquet").read_bytes()
        rows[split] = pq.read_table(path).to_pylist()
        assert set(Counter(row["extra_info"]["level"] for row in rows[split]).values()) == {size // 6}
        for index, row in enumerate(rows[split]):
            schema.check_row(row)
            assert (row["extra_info"]["split"], row["extra_info"]["index"]) == (split, index)
            assert row["data_source"] == PRESETS[name]
            assert row["prompt"][0]["content"].startswith(task.TASK_PHRASE + row["extra_info"]["problem"] + "\n")
            assert 0 < row["extra_info"]["designed_pass_rate"] < 1
    ids = {split: {row["extra_info"]["question_id"] for row in rows[split]} for split in rows}
    assert {split: len(found) for split, found in ids.items()} == sizes and not ids["train"] & ids["test"]
    problems = {split: {parse_problem(row["extra_info"]["problem"]) for row in rows[split]} for split in rows}
    assert not any(map(task.is_held_out, problems["train"])) and all(map(task.is_held_out, problems["test"]))
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert (manifest["data_source"], manifest["splits"]["test"]["questions"]) == (PRESETS[name], 30)

    # A problem that another seed draws too is the same question there.
    known = {row["extra_info"]["problem"]: row["extra_info"]["question_id"] for row in rows["train"]}
    other = pq.read_table(tmp_path / "other" / "train.parquet").to_pylist()
    shared = [row["extra_info"] for row in other if row["extra_info"]["problem"] in known]
    assert shared and all(info["question_id"] == known[info["problem"]] for info in shared)


@by_format
def test_question_ids_are_stable_for_good(name):
    """A published pass-rate file refers to questions by these ids."""
    row = tiny_world.make_rows([EXAMPLE], "train", flavour=name)[0]
    assert (
        row["extra_info"]["question_id"]
        == {
            "multiple_choice": "2c6899aa68562e0ade60b3572e80b6f0",
            "tool_call": "3a864832e3f6a605282edf462e82c3fb",
        }[name]
    )


@by_format
def test_gold_answers_score_one_and_others_zero(name):
    compute_score = verifier(name)
    for row in tiny_world.make_rows(pool(), "train", flavour=name):
        info, gold = row["extra_info"], row["reward_model"]["ground_truth"]

        def judge(response: str, row: dict = row) -> dict[str, Any]:
            return compute_score(
                row["data_source"], response, row["reward_model"]["ground_truth"], dict(row["extra_info"])
            )

        result = judge(info["solution"])
        assert (result["score"], result["format"], result["status"]) == (1.0, 1.0, "ok"), result
        answer = parse_problem(info["problem"]).answer
        if name == "multiple_choice":
            options = dict(line.split(": ") for line in row["prompt"][0]["content"].split("\n")[1:])
            assert list(options) == list(info["choices"]) == list("ABCD")
            assert len(set(options.values())) == 4 and options[gold] == str(answer)
            wrong = [info["solution"].replace(f">{gold}<", f">{letter}<") for letter in options if letter != gold]
        else:
            tool, other = ("even", "odd") if answer % 2 == 0 else ("odd", "even")
            assert json.loads(gold) == [{"Action": tool, "Action_Input": f'{{"result": {answer}}}'}]
            assert sorted(row["prompt"][0]["content"].rpartition("Tools: ")[2].split(", ")) == ["even", "odd"]
            wrong = [info["solution"].replace(f"Action: {tool}", f"Action: {other}")]
            wrong += [
                info["solution"].replace(f": {answer}}}", f": {digit}}}") for digit in range(10) if digit != answer
            ]
        for response in wrong:
            assert response != info["solution"]
            result = judge(response)
            assert (result["score"], result["format"], result["status"]) == (0.0, 1.0, "ok"), result
            assert result["feedback"]


@by_format
def test_presets_name_files_and_a_checkpoint_that_exist(name):
    found = preset(name)
    for key in ("train_files", "val_files"):
        assert OmegaConf.to_container(found.data)[key].startswith(f"${{project:data/{PRESETS[name]}/")
    path = OmegaConf.to_container(found.actor_rollout_ref)["model"]["path"]
    assert path == "${project:models/tiny_world/formats}" and (CHECKPOINT / "model.safetensors").is_file()


def test_a_mixture_has_no_data_set(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny_world.main(["--flavour", "formats", "--out", str(tmp_path / "x")])
    assert "multiple_choice" in capsys.readouterr().err and not (tmp_path / "x").exists()


# Formats


def test_texts_of_multiple_choice():
    asked = formats.MultipleChoice(EXAMPLE, (0, 2, 6, 8))
    assert asked.question() == "Work left to right mod 10: 6(a)-0(b)-8(c)-6\nA: 0\nB: 2\nC: 6\nD: 8"
    assert (asked.ground_truth, asked.extra_info()) == ("B", {"choices": ["A", "B", "C", "D"]})
    assert asked.response(asked.right_attempt()) == f"{STEPS}<answer>B</answer>"
    rng = random.Random(0)
    ways = {asked.response(asked.right_attempt(), rng).removeprefix(STEPS) for _ in range(200)}
    assert len(ways) == 3 and all(asked.score(STEPS + way)["format"] == 1.0 for way in ways)
    with pytest.raises(ValueError, match="not among the options"):
        asked.choice_for(9)


def test_texts_of_tool_call():
    asked = formats.ToolCall(EXAMPLE, ("odd", "even"))
    assert asked.question() == "Work left to right mod 10: 6(a)-0(b)-8(c)-6\nTools: odd, even"
    assert asked.response(asked.right_attempt()) == f'{STEPS}\nAction: even\nAction Input: {{"result": 2}}'
    assert asked.ground_truth == '[{"Action": "even", "Action_Input": "{\\"result\\": 2}"}]'


def test_options_hold_the_digits_of_the_systematic_bugs():
    """6-0-8-6: reversing one step gives 4-8-6=0, 6 then 8-6=2 and 2-6=6, 8 then 6-8=8."""
    for seed in range(50):
        asked = ask("multiple_choice", seed)
        assert asked.digits == (0, 2, 6, 8)
    letters = Counter(ask("multiple_choice", seed, problem).ground_truth for seed, problem in enumerate(pool(600)))
    assert set(letters) == set("ABCD") and min(letters.values()) > 100
    orders = Counter(ask("tool_call", seed).tools for seed in range(200))
    assert set(orders) == {("even", "odd"), ("odd", "even")} and min(orders.values()) > 60


@by_format
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_designed_pass_rate_is_that_of_the_noisy_worker(name, scale):
    compute_score = verifier(name)
    rng = random.Random(1)
    asked = ask(name, 3, parse_problem("7(a)*8(b)-9(c)+6"))
    right = 0.0
    for _ in range(6000):
        response = asked.response(asked.noisy_attempt(rng, scale), rng)
        right += compute_score(asked.data_source, response, asked.ground_truth, dict(asked.extra_info()))["score"]
    assert right / 6000 == pytest.approx(asked.designed_pass_rate(scale), abs=0.025)
    assert asked.designed_pass_rate(0.0) == pytest.approx(1.0)


@by_format
def test_difficulty_is_graded(name):
    rates = {level: [] for level in flavours.LEVELS}
    for seed, problem in enumerate(pool(300)):
        rates[problem.level].append(ask(name, seed, problem).designed_pass_rate())
    means = {level: sum(values) / len(values) for level, values in rates.items()}
    assert means[1] > means[2] > means[3] and means[2] > means[6]
    assert 0.3 < sum(means.values()) / 6 < 0.5


# Contexts and tokenizer


def test_warm_start_examples():
    """No held-out question, no unknown token, nothing longer than the presets allow for."""
    flavour = flavours.FLAVOURS["formats"]
    tokenizer = build_tokenizer(flavour.extra_pieces)
    assert len(tokenizer) <= VOCAB_SIZE
    assert sum(share for share, _ in flavour.kinds.values()) == pytest.approx(1.0)
    limits = [preset(name).data for name in FORMATS]
    rng = random.Random(0)
    seen = Counter()
    for _ in range(1500):
        example = flavours.random_example(flavour, rng)
        user = example.messages[0]["content"]
        problem = parse_problem(user.partition("mod 10: ")[2].split("\n")[0])
        assert not task.is_held_out(problem)
        kinds = "options" if "\nA: " in user else "tools"
        seen[kinds, problem.level, "solution:\n" in user, "<answer>" in example.response] += 1
        for text in (user, example.response):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
        assert len(tokenizer.encode(example.response)) < min(limit.max_response_length for limit in limits)
        prompt = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=False)
        assert len(prompt) <= 240
    assert len({key[:3] for key in seen}) == 2 * 6 * 2, "every format, level, with and without a demonstration"
    assert {(key[0], key[3]) for key in seen} == {("options", True), ("tools", False)}


@by_format
def test_prompts_fit_the_presets(name):
    tokenizer = build_tokenizer(flavours.FLAVOURS["formats"].extra_pieces)
    problem = task.random_problem(6, random.Random(0))
    asked = ask(name, 0, problem)
    solution = asked.response(asked.right_attempt())
    lengths = []
    for turn in (asked.question(), contexts.reprompt(asked.question(), solution)):
        messages = [{"role": "user", "content": turn}]
        lengths.append(len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)))
    lengths.append(len(tokenizer.encode(solution + tokenizer.eos_token)))
    assert lengths == {"multiple_choice": [40, 86, 40], "tool_call": [40, 91, 45]}[name]
    assert lengths[0] <= preset(name).data.max_prompt_length


@by_format
def test_demonstrations_are_followed_right_or_wrong(name):
    def written(text: str) -> list[Any]:
        results = re.findall(r"\([a-f]\)\d[-+*]\d=(\d)", text)
        return [results, re.findall(r"<answer>\s*(.)\s*</answer>|Action: (.*)\nAction Input: (.*)", text)]

    rng = random.Random(0)
    right = 0
    for _ in range(300):
        problem = task.random_problem(3, rng, held_out=False)
        example = format_contexts.kinds_of(name)["sibling"](problem, rng, 1.0)
        shown = written(example.messages[0]["content"])
        assert shown == written(example.response) and len(shown[0]) == 3 and len(shown[1]) == 1
        right += first_wrong_step(problem, example.response) is None
    assert 0.2 < right / 300 < 0.8


@by_format
def test_feedback_is_the_verifier_s_and_the_next_attempt_heeds_it(name):
    rng = random.Random(0)
    compute_score = verifier(name)
    said = Counter()
    unreadable = {compute_score("x", ask(name).malformed(rng), ask(name).ground_truth)["feedback"] for _ in range(50)}
    for problem in pool(300) * 2:
        asked = ask(name, 0, problem)
        failed, text = format_contexts.failed_attempt(asked, rng, 1.0)
        said[text] += 1
        following = format_contexts.next_attempt(asked, failed, text, rng, 1.0)
        if failed is None:
            assert text in unreadable
            continue
        response = asked.response(failed, rng)
        judged = compute_score(asked.data_source, response, asked.ground_truth, dict(asked.extra_info()))
        assert (judged["score"], judged["feedback"]) == (0.0, text)
        assert (following.choice, following.states[-1]) != (failed.choice, failed.states[-1])
        if name == "multiple_choice" or "tools called" in text:
            assert following.choice != failed.choice
        else:
            assert following.choice == failed.choice
    assert set(said) >= unreadable and len(said) == len(unreadable) + (1 if name == "multiple_choice" else 2)
    assert "" not in said


# Checkpoint


@pytest.fixture(scope="module")
def shipped() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two spinning threads are many times slower on a busy machine
    yield AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    torch.set_num_threads(threads)


def test_checkpoint_is_of_the_same_shape_as_the_plain_one(shipped):
    model, tokenizer = shipped
    plain = AutoModelForCausalLM.from_pretrained(CHECKPOINT.parent / "plain")
    shapes = [{key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (model, plain)]
    assert shapes[0] == shapes[1] and sum(p.numel() for p in model.parameters()) == 459_840
    manifest = json.loads((CHECKPOINT / "manifest.json").read_text())
    flavour = flavours.FLAVOURS["formats"]
    assert warm_start.WarmStart(**manifest["settings"]) == warm_start.WarmStart(
        flavour="formats", steps=flavour.steps, threads=1
    )
    fresh = build_tokenizer(flavour.extra_pieces)
    assert fresh.get_vocab() == tokenizer.get_vocab(), "words of a verifier have changed: train the checkpoint again"


@by_format
def test_checkpoint_accuracies(shipped, name):
    """Other random numbers and other questions than the manifest's, so the margins are wide."""
    values = format_sampling.measure_format(*shipped, formats.FORMATS[name], questions=150, samples=1, seed=1)
    for key, (low, high) in format_sampling.ACCEPTED[name].items():
        assert low <= values[key] <= high, (key, values)
    assert values["format"] >= 0.97
    for variation in ("trailing_newlines", "blank_lines", "reworded", "and_feedback"):
        assert values[f"right_demonstration_{variation}"] >= 0.88, (variation, values)
    assert values["base_level_1"] > values["base_level_6"]
    recorded = json.loads((CHECKPOINT / "manifest.json").read_text())["accuracies"]
    assert abs(recorded[f"{name}/base"] - values["base"]) <= 0.12
