"""The accuracies of a checkpoint that knows the answer formats; for the box see :mod:`data_prep.tiny.sampling`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.tiny import revision_sampling, sampling
from data_prep.tiny.contexts import reprompt
from data_prep.tiny.flavours import FLAVOURS, LEVELS
from data_prep.tiny.formats import FORMATS, Asked
from data_prep.tiny.task import PoolSpec, make_pool

MAX_NEW_TOKENS = 64
ACCEPTED = {
    "multiple_choice": {"base": (0.28, 0.52), "right_demonstration": (0.9, 1.0), "foreign_demonstration": (0.1, 0.4)},
    "tool_call": {"base": (0.23, 0.47), "right_demonstration": (0.9, 1.0), "foreign_demonstration": (0.0, 0.25)},
}
"""Ranges in which a checkpoint is fit for use, by format; with a foreign demonstration chance is .25 and .1."""


def measure_flavour(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flavour: str) -> dict[str, float]:
    """The accuracies of a checkpoint of the given flavour; those of formats are named ``format/accuracy``."""
    if FLAVOURS[flavour].revises:
        return revision_sampling.measure(model, tokenizer)
    formats = FLAVOURS[flavour].formats
    if not formats:
        return sampling.measure(model, tokenizer)
    return {
        f"{name}/{key}": value
        for name in formats
        for key, value in measure_format(model, tokenizer, FORMATS[name]).items()
    }


def measure_format(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    form: type[Asked],
    *,
    questions: int = 240,
    samples: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracies on held-out questions at T = 1, by what is in context, and without context by level.

    ``feedback`` and ``without_feedback`` are on the same rows: the questions whose first samples were wrong.
    """
    rng = random.Random(f"measure {form.__name__} {seed}")
    pool = make_pool(PoolSpec(questions, LEVELS, held_out=True, seed=seed))
    asked = [form.draw(problem, rng) for problem in pool] * samples
    prompts = [one.question() for one in asked]
    right = [one.response(one.right_attempt(), rng) for one in asked]
    foreign = [_foreign_demonstration(one, asked, rng) for one in asked]
    varied = [sampling.varied_demonstrations(*pair) for pair in zip(prompts, right, strict=True)]

    def respond(turns: Sequence[str], offset: int) -> list[str]:
        return sampling.sample(model, tokenizer, turns, seed=seed * 1000 + offset, max_new_tokens=MAX_NEW_TOKENS)

    def accuracy(turns: Sequence[str], offset: int, of: Sequence[Asked] = asked) -> float:
        return mean([one.score(text)["acc"] for one, text in zip(of, respond(turns, offset), strict=True)])

    results = [one.score(text) for one, text in zip(asked, respond(prompts, 1), strict=True)]
    failed = [i for i, result in enumerate(results) if not result["acc"]]
    failed_asked = [asked[i] for i in failed]
    said = [results[i]["feedback"] for i in failed]
    values = {
        "base": mean([result["acc"] for result in results]),
        "format": mean([result["format"] for result in results]),
        "base_trailing_newline": accuracy([prompt + "\n" for prompt in prompts], 2),
        "right_demonstration": accuracy(list(map(reprompt, prompts, right)), 3),
        **{
            f"right_demonstration_{name}": accuracy([turns[name] for turns in varied], 4 + i)
            for i, name in enumerate(sampling.VARIATIONS)
        },
        "foreign_demonstration": accuracy(list(map(reprompt, prompts, foreign)), 7),
        "without_feedback": accuracy([prompts[i] for i in failed], 8, failed_asked),
        "feedback": accuracy(
            [reprompt(prompts[i], feedback=text) for i, text in zip(failed, said, strict=True)], 9, failed_asked
        ),
        "right_demonstration_and_feedback": accuracy(
            [reprompt(prompts[i], right[i], text) for i, text in zip(failed, said, strict=True)], 10, failed_asked
        ),
        **{
            f"base_level_{level}": mean(
                [result["acc"] for one, result in zip(asked, results, strict=True) if one.problem.level == level]
            )
            for level in LEVELS
        },
        "designed_base": mean([one.designed_pass_rate() for one in asked]),
    }
    return {name: round(value, 4) for name, value in values.items()}


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def _foreign_demonstration(one: Asked, others: Sequence[Asked], rng: random.Random) -> str:
    """A right response to another question of the same level."""
    foreign = rng.choice([o for o in others if o.problem.level == one.problem.level and o.problem != one.problem])
    return foreign.response(foreign.right_attempt(), rng)
