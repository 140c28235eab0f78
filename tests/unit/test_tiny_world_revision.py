"""The tiny world's self-revision: its contexts to the letter, what is trained on, and the checkpoint."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import tiny_world
from data_prep.tiny import contexts, flavours, revision_contexts, revision_sampling, sampling, task, warm_start
from data_prep.tiny.tokenizer import VOCAB_SIZE, build_tokenizer
from verl_ext.revision import PHRASES, RevisionPrompts, turn_prefix, user_turn
from verl_ext.verifiers.tiny_world import Problem, parse_problem

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "models" / "tiny_world" / "revision"
FLAVOUR = flavours.FLAVOURS["revision"]
EXAMPLE = parse_problem("6(a)-0(b)-8(c)-6")  # right results 6, 8, 2
RESPONSE = re.compile(r"(?:\([a-f]\)\d[-+*]\d=\d)+\\boxed\{\d\}")
DRAWS = 300


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(FLAVOUR.extra_pieces)


def problems(count: int = DRAWS) -> list[Problem]:
    rng = random.Random(1)
    return [task.random_problem(rng.choice(flavours.LEVELS), rng, held_out=False) for _ in range(count)]


def results(text: str) -> tuple[int, ...]:
    """The results of the steps of a worked answer."""
    return tuple(int(digit) for digit in re.findall(r"=(\d)", text))


def carries_its_own_state(problem: Problem, text: str) -> bool:
    """Whether every step starts from the result before and the box holds the last one, operands in any order."""
    states = results(text)
    return len(states) == problem.level and in_order(text) == in_order(task.derivation(problem, states))


def in_order(text: str) -> str:
    """With the smaller operand of + and * first."""
    return re.sub(r"(\d)([+*])(\d)", lambda match: match[2].join(sorted((match[1], match[3]))), text)


def taken_apart(example: contexts.Example) -> tuple[str, str]:
    """Attempt and phrase of an example of a revision; fails where it is in neither placement, to the letter."""
    (user,) = example.messages
    attempt = RESPONSE.search(example.given or user["content"])[0]
    phrase = next(text for text in sorted(PHRASE_TEXTS) if text in (example.given or user["content"]))
    plain = [{"role": "user", "content": user["content"].split("\n")[0]}]
    if example.given:
        assert example.given == turn_prefix(attempt, phrase) and example.messages == plain
    else:
        (expected,) = user_turn(plain, attempt, phrase)
        assert user["content"].removeprefix(expected["content"]) in contexts.ENDS
    return attempt, phrase


PHRASE_TEXTS = set(revision_contexts.REVISION_PIECES)


# Flavours that were there before


@pytest.mark.parametrize(
    ("flavour", "digest"),
    [
        ("plain", "38ae6f8b899af273"),
        ("multiple_choice", "78d33ecdb35e116d"),
        ("tool_call", "91622768e03eafa4"),
        ("formats", "4c4b45aaf3c1eb84"),
    ],
)
def test_batches_of_the_other_flavours_are_what_their_checkpoints_were_trained_on(flavour, digest):
    """Digests of the code at b9f7ac9, which knew no given text."""
    settings = warm_start.WarmStart(flavour=flavour, batch_size=16, batches_per_bucket=3)
    tokens, labels = next(warm_start.batches(settings, build_tokenizer(flavours.FLAVOURS[flavour].extra_pieces)))
    assert hashlib.sha256(tokens.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16] == digest


# Tokens and what is trained


def test_phrases_are_single_tokens_and_come_back(tokenizer):
    assert len(tokenizer) <= VOCAB_SIZE and set(PHRASES["qwen"].__dict__.values()) <= PHRASE_TEXTS
    for phrase in PHRASE_TEXTS:
        (token,) = tokenizer.encode(phrase, add_special_tokens=False)
        assert tokenizer.decode([token]) == phrase
        ids = tokenizer.encode(turn_prefix("\\boxed{2}", phrase), add_special_tokens=False)
        assert len(ids) == 3 + 2 + 1 + 2 and tokenizer.decode(ids) == turn_prefix("\\boxed{2}", phrase)


@pytest.mark.parametrize("kind", ["revise_right", "revise_wrong"])
def test_only_the_revision_is_trained_and_the_prompt_is_that_of_training(tokenizer, kind):
    for seed, problem in enumerate(problems(40)):
        example = revision_contexts.KINDS[kind](problem, random.Random(seed), 1.0)
        attempt, phrase = taken_apart(example)
        (encoded,) = warm_start.encode(tokenizer, [example])
        revision = tokenizer.encode(example.response + tokenizer.eos_token, add_special_tokens=False)
        trained = [token for token in encoded.labels if token != warm_start.IGNORED]
        assert trained == revision == encoded.tokens[-len(revision) :] == encoded.labels[-len(revision) :]
        prompts = RevisionPrompts(tokenizer, PHRASES["qwen"], "assistant" if example.given else "user")
        prompts.phrases = type(prompts.phrases)(phrase, phrase)
        expected = prompts([{"role": "user", "content": contexts.question(problem)}], attempt, True)
        prompt = encoded.tokens[: -len(revision)]
        if not example.given:  # other ends: white space before the end of the turn
            prompt = [token for i, token in enumerate(prompt) if not _is_end(tokenizer, prompt, i)]
            expected = [token for i, token in enumerate(expected) if not _is_end(tokenizer, expected, i)]
        assert prompt == expected


def _is_end(tokenizer: Any, ids: list[int], position: int) -> bool:
    rest = tokenizer.decode(ids[position:])
    return rest[0] == "\n" and rest.lstrip("\n").startswith("<|im_end|>")


def test_a_revision_to_the_letter(tokenizer):
    example = contexts.Example(
        [{"role": "user", "content": "Work left to right mod 10: 3(a)+4"}],
        "(a)4+3=7\\boxed{7}",
        given=turn_prefix("(a)3+4=8\\boxed{8}", PHRASES["qwen"].wrong),
        untrained=((7, 8),),
    )
    (encoded,) = warm_start.encode(tokenizer, [example])
    assert tokenizer.decode(encoded.tokens) == (
        "<|im_start|>user\nWork left to right mod 10: 3(a)+4<|im_end|>\n<|im_start|>assistant\n"
        "(a)3+4=8\\boxed{8}\n\nWait, this response is wrong. Let me correct it.\n\n(a)4+3=7\\boxed{7}<|im_end|>"
    )
    shown = ["" if label == warm_start.IGNORED else tokenizer.decode([label]) for label in encoded.labels]
    assert shown[-10:] == ["(a)", "4", "+", "3", "=", "", "\\boxed{", "7", "}", "<|im_end|>"]
    assert not any(shown[:-10])


def test_flavour(tokenizer):
    assert sum(share for share, _ in FLAVOUR.kinds.values()) == pytest.approx(1.0)
    assert {"plain", "sibling", "feedback", *revision_contexts.KINDS} <= set(FLAVOUR.kinds)
    assert sum(revision_contexts.FAMILY_SHARES.values()) == pytest.approx(1.0)
    assert set(revision_contexts.FAMILY_SHARES) == set(PHRASES)
    rng = random.Random(0)
    placements: Counter[str] = Counter()
    for _ in range(600):
        example = flavours.random_example(FLAVOUR, rng)
        user = example.messages[0]["content"]
        assert not task.is_held_out(parse_problem(user.partition("mod 10: ")[2].split("\n")[0]))
        (encoded,) = warm_start.encode(tokenizer, [example])
        assert tokenizer.unk_token_id not in encoded.tokens and len(encoded.tokens) <= 160
        if any(phrase in user or phrase in example.given for phrase in PHRASE_TEXTS):
            placements["assistant" if example.given else "user"] += 1
    assert 0.15 < placements["user"] / placements.total() < 0.35


# Attempts, revisions, deviations


@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("right", [True, False])
def test_attempts_end_as_asked_for(scale, right):
    rng = random.Random(0)
    for problem in problems(60):
        states = revision_contexts.attempt_states(problem, right, rng, scale)
        assert (states[-1] == problem.answer) == right


def test_first_wrong_step():
    for states, expected in (((6, 8, 2), None), ((5, 8, 2), 0), ((6, 2, 2), 1), ((6, 8, 3), 2), ((0, 0, 0), 0)):
        assert revision_contexts.first_wrong(EXAMPLE, states) == expected


def test_a_right_attempt_is_rewritten():
    phrases: Counter[str] = Counter()
    orders = 0
    for seed, problem in enumerate(problems()):
        example = revision_contexts.revise_right(problem, random.Random(seed), 1.0)
        attempt, phrase = taken_apart(example)
        phrases[phrase] += 1
        assert results(attempt) == results(example.response) and results(attempt)[-1] == problem.answer
        assert carries_its_own_state(problem, attempt) and carries_its_own_state(problem, example.response)
        orders += attempt != example.response
    assert set(phrases) == {PHRASES["qwen"].right} and orders > DRAWS / 4


def test_a_wrong_attempt_is_sometimes_corrected():
    phrases: Counter[str] = Counter()
    corrected = 0
    for seed, problem in enumerate(problems()):
        example = revision_contexts.revise_wrong(problem, random.Random(seed), 1.0)
        attempt, phrase = taken_apart(example)
        phrases[phrase] += 1
        assert results(attempt)[-1] != problem.answer and not example.untrained
        assert carries_its_own_state(problem, attempt) and carries_its_own_state(problem, example.response)
        corrected += results(example.response)[-1] == problem.answer
    assert 0.35 < corrected / DRAWS < 0.6, "of attempts at all questions alike, the easy ones included"
    assert set(phrases) == {family.wrong for family in PHRASES.values()}
    assert phrases[PHRASES["qwen"].wrong] > DRAWS / 2


def test_the_designed_share_of_corrected_attempts():
    rng = random.Random(0)
    attempts = [(problem, task.noisy_states(problem, rng)) for problem in problems(3000)]
    wrong = [(problem, states) for problem, states in attempts if states[-1] != problem.answer]
    for revise, expected in (
        (lambda problem, states: revision_contexts.revised_states(problem, states, rng), 0.36),
        (lambda problem, _: task.noisy_states(problem, rng), 0.23),
    ):
        corrected = sum(revise(*pair)[-1] == pair[0].answer for pair in wrong)
        assert corrected / len(wrong) == pytest.approx(expected, abs=0.04)


def test_only_the_first_wrong_step_is_less_often_wrong():
    """2*7 is a fact that the worker knows badly; its mistake there is 1, the tens digit."""
    problem = parse_problem("2(a)*7(b)*7")
    right = task.result_distribution("*", 2, 7)[4]
    rng = random.Random(0)
    for attempt, expected in (
        ((1, 7), 1 - (1 - right) * revision_contexts.REVISED_STEP_ERROR_SCALE),
        ((4, 0), right),
    ):
        revisions = [revision_contexts.revised_states(problem, attempt, rng) for _ in range(2000)]
        assert sum(states[0] == 4 for states in revisions) / 2000 == pytest.approx(expected, abs=0.05)


def test_a_tolerant_sibling_leaves_its_demonstration_once_and_goes_on_from_there(tokenizer):
    steps: Counter[int] = Counter()
    for seed, problem in enumerate(problems()):
        example = revision_contexts.tolerant_sibling(problem, random.Random(seed), 1.0)
        user, response = example.messages[0]["content"], example.response
        shown, written = results(user.split("\n", 1)[1]), results(response)
        assert carries_its_own_state(problem, response) and not example.given
        ((start, end),) = example.untrained
        step = response[:start].count("=") - 1
        assert response[start - 1] == "=" and end == start + 1
        assert written[:step] == shown[:step] and written[step] != shown[step]
        for i in range(step + 1, problem.level):
            assert written[i - 1] != shown[i - 1] or written[i] == shown[i], "back on the way, it follows it again"
        (encoded,) = warm_start.encode(tokenizer, [example])
        trained = sum(label != warm_start.IGNORED for label in encoded.labels)
        assert trained == len(tokenizer.encode(response + tokenizer.eos_token, add_special_tokens=False)) - 1
        steps[step] += 1
    assert set(steps) == set(range(6))


# Command, preset and checkpoint


def test_the_flavour_has_no_data_of_its_own(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny_world.main(["--flavour", "revision", "--out", str(tmp_path)])
    assert "revision has no data set" in capsys.readouterr().err


def test_preset_inherits_that_of_the_plain_world_and_names_this_checkpoint():
    """That it composes is tested with all presets, in tests/contract/test_config.py."""
    preset = yaml.safe_load((ROOT / "conf" / "model" / "tiny_revision.yaml").read_text())
    assert preset["defaults"] == ["tiny", "_self_"]
    assert preset["actor_rollout_ref"] == {"model": {"path": "${project:models/tiny_world/revision}"}}
    assert (CHECKPOINT / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def shipped() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two spinning threads are many times slower on a busy machine
    yield AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    torch.set_num_threads(threads)


def test_sampling_continues_an_assistant_turn(shipped):
    turns = [contexts.question(problem) for problem in problems(12)]
    whole = sampling.sample(*shipped, turns, temperature=0.0)
    assert sampling.sample(*shipped, turns, given=[""] * 12, temperature=0.0) == whole
    begun = [text[:8] for text in whole]  # the first step
    rest = sampling.sample(*shipped, turns, given=begun, temperature=0.0)
    assert [start + end for start, end in zip(begun, rest, strict=True)] == whole
    with pytest.raises(ValueError, match="zip"):
        sampling.sample(*shipped, turns, given=[""])


def test_checkpoint_is_of_the_recipe(shipped, tokenizer):
    model, saved = shipped
    assert sum(p.numel() for p in model.parameters()) == 459_840 and model.config.vocab_size == VOCAB_SIZE
    assert saved.get_vocab() == tokenizer.get_vocab(), "a phrase has changed: train the checkpoint again"
    settings = json.loads((CHECKPOINT / "manifest.json").read_text())["settings"]
    assert warm_start.WarmStart(**settings) == warm_start.WarmStart(flavour="revision", steps=FLAVOUR.steps)


def test_checkpoint_accuracies(shipped):
    """Other random numbers, and fewer and other questions than the manifest's: wide margins."""
    recorded = json.loads((CHECKPOINT / "manifest.json").read_text())["accuracies"]
    values = revision_sampling.measure(*shipped, questions=90, samples=1, seed=1)
    for name, (low, high) in revision_sampling.ACCEPTED.items():
        assert low <= recorded[name] <= high, (name, recorded)
        assert low - 0.08 <= values[name] <= high + 0.08, (name, values)
    assert recorded["format"] >= 0.98 and values["format"] >= 0.97
    assert recorded["feedback"] >= recorded["without_feedback"] + 0.04
    assert recorded["revise_wrong"] >= recorded["without_feedback"]
