"""The kinds of examples with which a checkpoint learns self-revision (SD-Zero), and to tolerate its own errors.

The ability is imperfect on purpose: a right attempt is rewritten, a wrong one is only sometimes corrected, so that
training on verified revisions has something to gain. Attempt and phrase are given and not trained on; what stands
where is :mod:`verl_ext.revision`'s.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import partial

from data_prep.tiny import contexts
from data_prep.tiny.contexts import DEMONSTRATION_ERROR_SCALES, ENDS, EXACT_SHARE, Example, Kind, question
from data_prep.tiny.task import derivation, noisy_states, result_distribution
from verl_ext.revision import PHRASES, Phrases, turn_prefix, user_turn
from verl_ext.verifiers.tiny_world import Problem

REVISED_STEP_ERROR_SCALE = 0.5
"""Errors left in a revision at the attempt's first wrong step. With it a worker corrects 36% of its wrong attempts, 23%
without it: enough that the phrase is worth reading, and far from all, so that training on revisions has something to
gain."""
FAMILY_SHARES = {"qwen": 0.6, "paper": 0.2, "olmo": 0.2}  # whose phrases; the checkpoint is a Qwen, so mostly those
USER_PLACEMENT_SHARE = 0.25  # of the revisions follow a phrase in the user turn, as in the public code's second stage
USUAL_DRAWS = 20  # of an attempt that ends right or wrong, before the worker gets better or worse to make it possible

# Tokens of their own, for phrases are read on every row; sorted, for the ids depend on the order.
REVISION_PIECES = tuple(sorted({text for phrases in PHRASES.values() for text in (phrases.right, phrases.wrong)}))


def attempt_states(problem: Problem, right: bool, rng: random.Random, error_scale: float) -> tuple[int, ...]:
    """Step results of a noisy worker whose final answer is right (however it was reached), or is wrong.

    A worker that does not get there makes ever fewer or more errors.
    """
    draws = 0
    while True:
        states = noisy_states(problem, rng, error_scale)
        if (states[-1] == problem.answer) == right:
            return states
        draws += 1
        if draws % USUAL_DRAWS == 0:
            error_scale = error_scale / 2 if right else max(2 * error_scale, 0.1)


def first_wrong(problem: Problem, states: Sequence[int]) -> int | None:
    """Number of the first step whose result is wrong; None where all are right."""
    pairs = enumerate(zip(states, problem.states, strict=True))
    return next((step for step, (written, right) in pairs if written != right), None)


def revised_states(
    problem: Problem, states: Sequence[int], rng: random.Random, error_scale: float = 1.0
) -> tuple[int, ...]:
    """Step results of a fresh answer to a problem whose attempt had the given ones.

    Every step goes on from the answer's own state, as always; only at the attempt's first wrong step are errors rarer.
    """
    wrong = first_wrong(problem, states)
    scales = [error_scale * (REVISED_STEP_ERROR_SCALE if i == wrong else 1.0) for i in range(problem.level)]
    return noisy_states(problem, rng, scales)


def deviating_states(
    problem: Problem, shown: Sequence[int], step: int, rng: random.Random, error_scale: float = 1.0
) -> tuple[int, ...]:
    """Step results that follow those shown, differ from them at one step, and then go on from their own state.

    Where the way comes back to a state of the demonstration it follows that again: the same step is shown there.
    """
    states = [*shown[:step], rng.choice([digit for digit in range(10) if digit != shown[step]])]
    for i in range(step + 1, problem.level):
        if states[-1] == shown[i - 1]:
            states.append(shown[i])
        else:
            op, x = problem.operations[i]
            states += rng.choices(range(10), weights=result_distribution(op, states[-1], x, error_scale))
    return tuple(states)


def result_span(response: str, step: int) -> tuple[int, int]:
    """Where the result of a step stands in a response, as character positions [start, end)."""
    start = [match.end() for match in re.finditer("=", response)][step]
    return start, start + 1


def _phrases(rng: random.Random) -> Phrases:
    return PHRASES[rng.choices(list(FAMILY_SHARES), weights=list(FAMILY_SHARES.values()))[0]]


def _example(problem: Problem, attempt: str, phrase: str, revision: str, rng: random.Random) -> Example:
    """Attempt and phrase in the open assistant turn, or at the end of the user turn (there with other ends too)."""
    messages = [{"role": "user", "content": question(problem)}]
    if rng.random() >= USER_PLACEMENT_SHARE:
        return Example(messages, revision, given=turn_prefix(attempt, phrase))
    messages = user_turn(messages, attempt, phrase)
    if rng.random() >= EXACT_SHARE:
        messages[-1]["content"] += rng.choice(ENDS)
    return Example(messages, revision)


def revise_right(problem: Problem, rng: random.Random, error_scale: float) -> Example:
    """An attempt whose final answer is right; the revision follows its step results."""
    states = attempt_states(problem, True, rng, error_scale)
    attempt, revision = derivation(problem, states, rng), derivation(problem, states, rng)
    return _example(problem, attempt, _phrases(rng).right, revision, rng)


def revise_wrong(problem: Problem, rng: random.Random, error_scale: float) -> Example:
    """An attempt whose final answer is wrong; the revision is a fresh answer, now and then a right one."""
    states = attempt_states(problem, False, rng, error_scale)
    revision = derivation(problem, revised_states(problem, states, rng, error_scale), rng)
    return _example(problem, derivation(problem, states, rng), _phrases(rng).wrong, revision, rng)


def tolerant_sibling(problem: Problem, rng: random.Random, error_scale: float) -> Example:
    """A demonstration in context; the response leaves it at one step, untrained, and goes on from its own state.

    A teacher that has only ever reproduced its demonstration jumps back to the demonstration's state after a student's
    error, and students unlearn to carry their own.
    """
    shown = noisy_states(problem, rng, error_scale * rng.choice(DEMONSTRATION_ERROR_SCALES))
    user = contexts.user_turn(partial(question, problem), rng, solution=derivation(problem, shown, rng))
    step = rng.randrange(problem.level)
    response = derivation(problem, deviating_states(problem, shown, step, rng, error_scale), rng)
    return Example([{"role": "user", "content": user}], response, untrained=(result_span(response, step),))


KINDS: dict[str, Kind] = {
    "tolerant_sibling": tolerant_sibling,
    "revise_right": revise_right,
    "revise_wrong": revise_wrong,
}
