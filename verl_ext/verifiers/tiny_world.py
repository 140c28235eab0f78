"""Verifier of the tiny world: chains of one-digit operations, worked left to right modulo 10.

A problem is written ``6(a)-0(b)-8(c)-6`` and a complete response ``(a)6-0=6(b)6-8=8(c)8-6=2\\boxed{2}``.

``verifier.options.mode`` chooses what counts as right:

* ``loose`` (default): the digit in the last box is the ground truth, however it was reached;
* ``strict``: every step is right as well (a digit guessed right after a wrong step does not count).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from verl_ext.verifiers.result import failure, verdict

MODES = ("loose", "strict")
LABELS = "abcdefghijklmnopqrstuvwxyz"
COMMUTATIVE = "+*"

STEP_FEEDBACK = "Step ({label}) is wrong."
NO_ANSWER_FEEDBACK = "No final answer was found."
BOX_FEEDBACK = "The final answer is wrong."

_PROBLEM = re.compile(r"[0-9](?:\([a-z]\)[-+*][0-9])+")
_PROBLEM_STEP = re.compile(r"\(([a-z])\)([-+*])([0-9])")
_STEP = re.compile(r"\(([a-z])\)([0-9])([-+*])([0-9])=([0-9])")
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_RESPONSE = re.compile(r"(?:\([a-z]\)[0-9][-+*][0-9]=[0-9])+\\boxed\{[0-9]\}")


class Problem(NamedTuple):
    """A start digit and the operations applied to it, in order, as (operator, digit)."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def level(self) -> int:
        """Number of steps."""
        return len(self.operations)

    @property
    def text(self) -> str:
        """The labelled form, e.g. ``6(a)-0(b)-8(c)-6``."""
        return str(self.start) + "".join(f"({LABELS[i]}){op}{x}" for i, (op, x) in enumerate(self.operations))

    @property
    def states(self) -> tuple[int, ...]:
        """The right result of every step; the last one is the answer."""
        state, states = self.start, []
        for op, x in self.operations:
            state = apply_operation(op, state, x)
            states.append(state)
        return tuple(states)

    @property
    def answer(self) -> int:
        """The result of the last step."""
        return self.states[-1]


def apply_operation(op: str, a: int, b: int) -> int:
    """``a op b`` modulo 10."""
    if op == "+":
        return (a + b) % 10
    if op == "-":
        return (a - b) % 10
    if op == "*":
        return (a * b) % 10
    raise ValueError(f"unknown operator {op!r}, expected one of + - *")


def parse_problem(text: str) -> Problem:
    """Read the labelled form of a problem; ValueError where it is malformed."""
    if not isinstance(text, str) or not _PROBLEM.fullmatch(text):
        raise ValueError(f"not a tiny-world problem: {text!r}; expected e.g. '6(a)-0(b)-8'")
    steps = _PROBLEM_STEP.findall(text)
    labels = "".join(label for label, _, _ in steps)
    if labels != LABELS[: len(steps)]:
        raise ValueError(f"step labels of {text!r} are {labels!r}, expected {LABELS[: len(steps)]!r}")
    return Problem(int(text[0]), tuple((op, int(x)) for _, op, x in steps))


def first_wrong_step(problem: Problem, response: str) -> str | None:
    """Label of the first step that is wrong, missing or too many; None where all steps are right.

    White space is ignored; the operands of + and * may come in either order.
    """
    steps = _STEP.findall("".join(response.split()))
    state = problem.start
    for i, ((op, x), right) in enumerate(zip(problem.operations, problem.states, strict=True)):
        if i >= len(steps):
            return LABELS[i]
        label, left, written_op, operand, result = steps[i]
        operands = (int(left), int(operand))
        operands_right = operands == (state, x) or (op in COMMUTATIVE and operands == (x, state))
        if label != LABELS[i] or written_op != op or not operands_right or int(result) != right:
            return LABELS[i]
        state = right
    if len(steps) > problem.level:
        return LABELS[min(problem.level, len(LABELS) - 1)]
    return None


def wrong_result(prompt: str, response: str) -> tuple[int, int] | None:
    """Characters [start, end) of the first wrong result of a response, the digit behind its ``=``.

    None where every step is right, the wrong one is missing, or the prompt holds no problem. For
    :mod:`verl_ext.localisation`.
    """
    found = _PROBLEM.search(prompt)
    label = first_wrong_step(parse_problem(found.group()), response) if found else None
    step = label and next((step for step in _STEP.finditer(response) if step.group(1) == label), None)
    return step.span(5) if step else None


def _parse_ground_truth(ground_truth: Any) -> str:
    """The gold digit as a string; ValueError where it is none."""
    text = str(ground_truth).strip()
    if isinstance(ground_truth, bool) or not re.fullmatch(r"[0-9]", text):
        raise ValueError(f"ground truth {ground_truth!r} is not one digit")
    return text


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | int,
    extra_info: dict[str, Any] | None = None,
    mode: str = "loose",
    **kwargs: Any,
) -> dict[str, Any]:
    """Score one response.

    Args:
        data_source: name of the data set; not used.
        solution_str: the decoded response.
        ground_truth: the right digit.
        extra_info: of the row; ``problem`` is read for the strict mode and for feedback that names a step.
        mode: ``loose`` or ``strict`` (see the module); any other value raises ValueError.
        kwargs: whatever else verl hands over; not used.

    Returns:
        A dict in the shape of :mod:`verl_ext.verifiers.result`: ``pred`` is the content of the last box, ``format`` 1.0
        where the response has exactly the expected shape, ``feedback`` never a digit, hence never the answer; status
        ``error`` where the row itself is broken.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not allowed; expected one of {MODES}")
    try:
        gold = _parse_ground_truth(ground_truth)
        problem_text = (extra_info or {}).get("problem")
        problem = None if problem_text is None else parse_problem(problem_text)
        if problem is not None and str(problem.answer) != gold:
            raise ValueError(f"ground truth {gold} is not the answer of {problem.text}")
        if problem is None and mode == "strict":
            raise ValueError("the strict mode needs extra_info['problem']")
        if not isinstance(solution_str, str):
            raise ValueError(f"the response is of type {type(solution_str).__name__}, expected str")
    except ValueError as error:
        return failure(str(error))

    compact = "".join(solution_str.split())
    boxes = _BOX.findall(compact)
    if not boxes:
        return verdict(False, pred="", well_formed=False, feedback=NO_ANSWER_FEEDBACK)
    pred = boxes[-1]
    well_formed = _RESPONSE.fullmatch(compact) is not None
    wrong_step = None
    if problem is not None:
        wrong_step = first_wrong_step(problem, compact)
        labels = "".join(step[0] for step in _STEP.findall(compact))
        well_formed = well_formed and labels == LABELS[: problem.level]
    right = pred == gold and (mode == "loose" or wrong_step is None)
    if right:
        feedback = ""
    elif wrong_step is not None:
        feedback = STEP_FEEDBACK.format(label=wrong_step)
    else:
        feedback = BOX_FEEDBACK
    return verdict(right, pred=pred, well_formed=well_formed, feedback=feedback)
