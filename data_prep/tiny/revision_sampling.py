"""The accuracies of a checkpoint that knows self-revision: those of the plain world, and what revisions are worth."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.tiny import sampling
from data_prep.tiny.contexts import question, reprompt, score
from data_prep.tiny.flavours import LEVELS
from data_prep.tiny.revision_contexts import deviating_states
from data_prep.tiny.task import PoolSpec, derivation, make_pool, worked_steps
from verl_ext.revision import PHRASES, turn_prefix, user_turn
from verl_ext.verifiers.tiny_world import Problem

ACCEPTED = {
    **sampling.ACCEPTED,
    # Less than the plain world asks for: half as many examples have a demonstration, and half of those leave it.
    "right_demonstration": (0.87, 1.0),
    "revise_right": (0.9, 1.0),
    "revise_wrong": (0.2, 0.5),
    "revise_wrong_user_turn": (0.2, 0.5),
    "revise_wrong_with_right_phrase": (0.0, 0.15),
    "tolerance": (0.4, 1.0),
}
"""Ranges in which a checkpoint is fit for use; the tolerance of the plain checkpoint is .01."""


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, questions: int = 240, samples: int = 4, seed: int = 0
) -> dict[str, float]:
    """What :func:`data_prep.tiny.sampling.measure` says, and accuracies of revisions of the model's own samples.

    ``revise_wrong`` is the share of wrong attempts that are corrected; to compare with, ``without_feedback`` is that
    of fresh answers to the questions of wrong attempts.
    """
    values = sampling.measure(model, tokenizer, questions=questions, samples=samples, seed=seed)
    problems = make_pool(PoolSpec(questions, LEVELS, held_out=True, seed=seed)) * samples
    prompts = [question(problem) for problem in problems]
    attempts = sampling.sample(model, tokenizer, prompts, seed=seed * 1000 + 11)
    right: list[int] = []
    wrong: list[int] = []
    for i, (problem, attempt) in enumerate(zip(problems, attempts, strict=True)):
        (right if score(problem, attempt)["acc"] else wrong).append(i)
    phrases = PHRASES["qwen"]

    def revised(rows: list[int], phrase: str, placement: str, offset: int) -> float:
        """Accuracy of the revisions of some attempts."""
        turns, given = [prompts[i] for i in rows], None
        if placement == "assistant":
            given = [turn_prefix(attempts[i], phrase) for i in rows]
        else:
            messages = [[{"role": "user", "content": turn}] for turn in turns]
            turns = [
                user_turn(conversation, attempts[i], phrase)[-1]["content"]
                for conversation, i in zip(messages, rows, strict=True)
            ]
        responses = sampling.sample(model, tokenizer, turns, given=given, seed=seed * 1000 + offset)
        return round(sampling.accuracy([problems[i] for i in rows], responses), 4)

    return {
        **values,
        "revise_right": revised(right, phrases.right, "assistant", 12),
        "revise_right_user_turn": revised(right, phrases.right, "user", 13),
        "revise_wrong": revised(wrong, phrases.wrong, "assistant", 14),
        "revise_wrong_user_turn": revised(wrong, phrases.wrong, "user", 15),
        "revise_wrong_with_right_phrase": revised(wrong, phrases.right, "assistant", 16),
        **measure_tolerance(model, tokenizer, questions=questions * 2, seed=seed),
    }


def measure_tolerance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, questions: int = 480, seed: int = 0
) -> dict[str, float]:
    """Mean probability of the next result after an answer has left a right demonstration, with teacher forcing.

    The result is a noisy worker's, who goes on from the state of the answer; ``tolerance_without_demonstration`` is the
    same without the demonstration. Only where the demonstration has another result there.
    """
    rng = random.Random(f"tolerance {seed}")
    prompts: list[str] = []
    contexts: list[str] = []
    given: list[str] = []
    expected: list[str] = []
    for problem in make_pool(PoolSpec(questions, LEVELS[1:], held_out=True, seed=seed)):
        step = rng.randrange(problem.level - 1)
        states = deviating_states(problem, problem.states, step, rng)
        following = step + 1
        if states[following] == problem.states[following]:
            continue
        beginning = Problem(problem.start, problem.operations[: following + 1])
        prompts.append(question(problem))
        contexts.append(reprompt(prompts[-1], derivation(problem, rng=rng)))
        given.append(worked_steps(beginning, states[: following + 1], rng)[:-1])
        expected.append(str(states[following]))
    return {
        name: round(float(_probabilities(model, tokenizer, turns, given, expected).mean()), 4)
        for name, turns in (("tolerance", contexts), ("tolerance_without_demonstration", prompts))
    }


@torch.no_grad()
def _probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    user_turns: Sequence[str],
    given: Sequence[str],
    expected: Sequence[str],
) -> torch.Tensor:
    """Probability of one expected token after each open assistant turn, [rows]."""
    model.eval()
    encoded = sampling.encode_prompts(tokenizer, user_turns, given)
    # Padded on the right: attention is causal, so no token before the padding sees it.
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids in encoded], batch_first=True, padding_value=tokenizer.pad_token_id
    ).to(model.device)
    last = torch.tensor([len(ids) - 1 for ids in encoded], device=model.device)
    rows = torch.arange(len(encoded), device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[rows, last]
    wanted = torch.tensor(tokenizer.convert_tokens_to_ids(list(expected)), device=model.device)
    return torch.softmax(logits.float(), -1)[rows, wanted]
