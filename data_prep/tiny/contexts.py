"""What the model reads during the warm start: one function per kind of context.

A model this small understands only contexts it has seen, to the letter. So every kind varies white space (in the ways
templates in circulation differ: leading and trailing blank lines) and wording, around the exact text training uses.

The kinds here are those of the plain world, whose answer is a digit in a box; :mod:`data_prep.tiny.format_contexts` has
those of the other answer formats, :mod:`data_prep.tiny.revision_contexts` those of self-revision, and
:mod:`data_prep.tiny.flavours` mixes kinds into flavours.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from data_prep.tiny.task import TASK_PHRASE, derivation, noisy_states
from verl_ext.contexts import FEEDBACK_TEMPLATE, REPROMPT_TEMPLATE, SOLUTION_TEMPLATE, render_context
from verl_ext.verifiers.tiny_world import LABELS, Problem, compute_score

EXACT_SHARE = 0.6  # of the examples use the exact templates
WORDING_SHARE = 0.15  # of the others, each, vary one piece of wording
DEMONSTRATION_ERROR_SCALES = (1.5, 0.3)  # demonstrations are noisy, so that reading one is not the same as being right
NAMED_STEP_ERROR_SCALE = 0.1  # errors left at a step that feedback names

TASK_PHRASES = ("Compute left to right mod 10: ", "Work from left to right, mod 10: ", "Left to right mod 10: ")
SOLUTION_HEADS = ("A correct solution:", "Reference solution:", "Solution:", "Example solution:")
FEEDBACK_HEADS = ("Feedback on your earlier attempt:", "Feedback:")
CLOSINGS = ("Now solve the original question.", "Solve the original question.", "Solve it again.")
STEP_FEEDBACKS = (
    "Step ({label}) of your attempt is wrong.",
    "There is an error in step ({label}).",
    "Wrong: ({label})",
)
SEPARATORS = ("\n", "\n\n")
ENDS = ("", "\n", "\n\n")
_LATER_PART = re.compile(r"(?<!^)(?=\([a-z]\)|\\boxed)")  # where a worked answer can be broken into lines


@dataclass(frozen=True)
class Example:
    """A conversation and the response to train on."""

    messages: list[dict[str, str]]
    response: str
    given: str = ""  # what the assistant turn holds before the response; not trained on
    untrained: tuple[tuple[int, int], ...] = ()  # spans [start, end) of characters of the response not trained on


Kind = Callable[[Problem, random.Random, float], Example]


def question(problem: Problem, phrase: str = TASK_PHRASE) -> str:
    """The text of the user turn."""
    return phrase + problem.text


def reprompt(prompt: str, solution: str | None = None, feedback: str | None = None) -> str:
    """The exact teacher prompt of SDPO; without solution and feedback, the plain prompt."""
    messages = render_context([{"role": "user", "content": prompt}], solution, feedback)
    return prompt if messages is None else messages[-1]["content"]


def varied_reprompt(prompt: str, solution: str | None, feedback: str | None, rng: random.Random) -> str:
    """The same content with other white space and sometimes other words."""

    def either(usual: str, others: tuple[str, ...]) -> str:
        return rng.choice(others) if rng.random() < WORDING_SHARE else usual

    parts = [prompt]
    for head, others, body in (
        (SOLUTION_TEMPLATE.split("\n")[1], SOLUTION_HEADS, solution),
        (FEEDBACK_TEMPLATE.split("\n")[1], FEEDBACK_HEADS, feedback),
    ):
        if body is not None:
            parts += [rng.choice(SEPARATORS), either(head, others), rng.choice(SEPARATORS), body, rng.choice(ENDS)]
    parts += [rng.choice(SEPARATORS), either(REPROMPT_TEMPLATE.split("\n")[-1], CLOSINGS), rng.choice(ENDS)]
    return "".join(parts)


def user_turn(
    ask: Callable[[str], str], rng: random.Random, solution: str | None = None, feedback: str | None = None
) -> str:
    """The user turn with the given context: exact most of the time, otherwise varied.

    ``ask`` makes the question's text from the task phrase.
    """
    if rng.random() < EXACT_SHARE:
        return reprompt(ask(TASK_PHRASE), solution, feedback)
    phrase = rng.choice(TASK_PHRASES) if rng.random() < WORDING_SHARE else TASK_PHRASE
    if solution is None and feedback is None:
        return ask(phrase) + rng.choice(ENDS)
    if solution is not None:
        if rng.random() < 0.15:
            solution = _LATER_PART.sub("\n", solution)
        solution += rng.choice(("", "", "", "\n"))
    return varied_reprompt(ask(phrase), solution, feedback, rng)


def _example(problem: Problem, user: str, states: tuple[int, ...], rng: random.Random) -> Example:
    return Example([{"role": "user", "content": user}], derivation(problem, states, rng))


def failed_attempt_feedback(problem: Problem, rng: random.Random, error_scale: float) -> tuple[str, int | None]:
    """The verifier's words on a wrong attempt of the noisy worker, and the number of the step they name.

    Sometimes the feedback is about the missing or wrong final answer alone and names no step.
    """
    if rng.random() < 0.04:
        text = rng.choice(("no answer", derivation(problem)[:-2] + f"{(problem.answer + rng.randrange(1, 10)) % 10}}}"))
        return score(problem, text)["feedback"], None
    for attempt in range(20):
        states = noisy_states(problem, rng, error_scale * (1 if attempt < 5 else 3))
        feedback = score(problem, derivation(problem, states, rng))["feedback"]
        if feedback:
            break
    else:
        feedback = score(problem, derivation(problem, ((problem.states[0] + 1) % 10, *problem.states[1:])), "strict")[
            "feedback"
        ]
    step = next(i for i, label in enumerate(LABELS) if f"({label})" in feedback)
    return feedback, step


def score(problem: Problem, response: str, mode: str = "loose") -> dict:
    """The verifier's result for a response to a problem."""
    return compute_score("tiny_world", response, str(problem.answer), {"problem": problem.text}, mode=mode)


def plain(problem: Problem, rng: random.Random, error_scale: float) -> Example:
    """The question alone; the response is the noisy worker's."""
    return _example(problem, user_turn(partial(question, problem), rng), noisy_states(problem, rng, error_scale), rng)


def sibling(problem: Problem, rng: random.Random, error_scale: float) -> Example:
    """A noisy demonstration in context; the response follows its step results, right or wrong."""
    states = noisy_states(problem, rng, error_scale * rng.choice(DEMONSTRATION_ERROR_SCALES))
    return _example(
        problem, user_turn(partial(question, problem), rng, solution=derivation(problem, states, rng)), states, rng
    )


def feedback(problem: Problem, rng: random.Random, error_scale: float) -> Example:
    """Feedback on an earlier attempt; the step it names is mostly right in the response."""
    text, step = failed_attempt_feedback(problem, rng, error_scale)
    scales = [error_scale * (NAMED_STEP_ERROR_SCALE if i == step else 1.0) for i in range(problem.level)]
    states = noisy_states(problem, rng, scales)
    return _example(
        problem, user_turn(partial(question, problem), rng, feedback=_reworded(text, step, rng)), states, rng
    )


def sibling_and_feedback(problem: Problem, rng: random.Random, error_scale: float) -> Example:
    """Both; the response follows the demonstration."""
    states = noisy_states(problem, rng, error_scale * rng.choice(DEMONSTRATION_ERROR_SCALES))
    text, step = failed_attempt_feedback(problem, rng, error_scale)
    user = user_turn(
        partial(question, problem), rng, solution=derivation(problem, states, rng), feedback=_reworded(text, step, rng)
    )
    return _example(problem, user, states, rng)


def _reworded(text: str, step: int | None, rng: random.Random) -> str:
    if step is not None and rng.random() < 0.1:
        return rng.choice(STEP_FEEDBACKS).format(label=LABELS[step])
    return text


KINDS: dict[str, Kind] = {
    "plain": plain,
    "sibling": sibling,
    "feedback": feedback,
    "sibling_and_feedback": sibling_and_feedback,
}
