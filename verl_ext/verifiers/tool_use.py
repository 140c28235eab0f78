"""Verifier of tool calls written as ``Action: <name>`` and ``Action Input: <JSON object>`` lines.

The format is that of the ToolAlpaca rows that SDPO and SDFT use (repository lasgroup/SDPO at 0e6d510, arXiv
2601.20802). The gold answer is a JSON list of ``{"Action": name, "Action_Input": "<JSON object as a string>"}``.

Two rules for what counts as right:

* ``calls`` (default): the multiset of (name, input) pairs equals that of the gold answer;
* ``merged``: SDPO's rule, for faithful runs: the multiset of names and the dictionary that results from merging all
  inputs in their order. It cannot tell which argument went to which call, and a key that occurs twice is kept once.

Deliberate differences from that repository's grader under both rules: inputs are read with a JSON decoder (its pattern
cannot read nested objects, so it rejects 2 of the 68 gold answers of the test set), an input that cannot be read never
equals anything (there it equals an empty gold input), and feedback names neither expected tools nor expected values.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from typing import Any, NamedTuple

from verl_ext.verifiers.result import failure, same_text, verdict

MATCHES = ("calls", "merged")
LONGEST_NUMBER = 400
"""Characters of the longest number literal that is read (a double has at most 309 digits before the point)."""
LONGEST_PRED = 4096
"""Characters of the longest ``pred`` that is kept as it is; a longer one is replaced by its hash."""

NO_ACTION_FEEDBACK = 'No action was found. Write lines "Action: <tool name>" and "Action Input: <JSON object>".'
UNNAMED_FEEDBACK = 'Call {number} does not name a tool after "Action:".'
NO_INPUT_FEEDBACK = 'Call {number} has no line "Action Input:" with a JSON object.'
UNREADABLE_FEEDBACK = "The input of call {number} is not one valid JSON object with nothing after it on its line."
WRONG_TOOLS_FEEDBACK = "The tools called, or the number of calls, are wrong."
WRONG_ARGUMENTS_FEEDBACK = "The tools are right, but the argument names or values of at least one call are wrong."

_LABEL = re.compile(r"^[ \t]*(Action|Action Input):", re.MULTILINE)
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_REST_OF_LINE = re.compile(r"[^\n]*")


class Call(NamedTuple):
    """One call as written; ``key`` is the canonical JSON of (name, arguments), None where it cannot be read."""

    name: str
    arguments: dict[str, Any] | None
    problem: str = ""

    @property
    def key(self) -> str | None:
        """Equal calls, and only they, have equal keys."""
        return None if self.arguments is None or not self.name else canonical([self.name, self.arguments])


def _read_number(text: str) -> int | float:
    """A JSON number; integral floats become integers, so that 1, 1.0 and 1e0 are one value (True is another)."""
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters; the limit is {LONGEST_NUMBER}")
    if not any(mark in text for mark in ".eE"):
        return int(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a double")
    return int(value) if value.is_integer() else value


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not valid JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


_DECODER = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates,
    parse_float=_read_number,
    parse_int=_read_number,
    parse_constant=_refuse_constant,
)


def canonical(value: Any) -> str:
    """JSON text that is equal for equal values whatever the order of keys; ASCII, so lone surrogates survive."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def decode_object(text: str, start: int = 0) -> tuple[dict[str, Any], int]:
    """Read the JSON object that begins at ``start``, white space apart; return it and the place after it.

    Raises:
        ValueError: what is there is not a JSON object, has a key twice, NaN or Infinity, too long a number, or is
            nested too deeply for the decoder.
    """
    start = _JSON_SPACE.match(text, start).end()
    try:
        value, end = _DECODER.raw_decode(text, start)
        canonical(value)  # what cannot be written again cannot be compared: the same limit on nesting
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object")
    return value, end


def parse_calls(text: str) -> list[Call]:
    """The calls in a response, in order, up to the first that cannot be read, which is the last one returned.

    Labels count at the start of a line. An ``Action Input:`` belongs to the ``Action:`` before it; one without an
    action is a call without a name. Stopping early keeps hostile text linear: an error of the decoder counts the lines
    before it.
    """
    calls: list[Call] = []
    name: str | None = None
    position = 0
    for label in _LABEL.finditer(text):
        if label.start() < position:
            continue  # inside the JSON object just read
        if label[1] == "Action":
            if name is not None:
                return [*calls, Call(name, None, NO_INPUT_FEEDBACK)]
            name = _REST_OF_LINE.match(text, label.end())[0].strip()
            continue
        try:
            arguments, end = decode_object(text, label.end())
            if _REST_OF_LINE.match(text, end)[0].strip():
                raise ValueError("text after the object")
        except ValueError:
            return [*calls, Call(name or "", None, UNREADABLE_FEEDBACK)]
        if not name:
            return [*calls, Call("", arguments, UNNAMED_FEEDBACK)]
        calls.append(Call(name, arguments))
        name, position = None, end
    if name is not None:
        calls.append(Call(name, None, NO_INPUT_FEEDBACK))
    return calls


def parse_gold(ground_truth: Any) -> list[Call]:
    """The calls of a gold answer.

    Raises:
        ValueError: it is not a non-empty JSON list of ``{"Action": str, "Action_Input": JSON object or its text}``.
    """
    try:
        entries = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    except RecursionError as error:
        raise ValueError("ground truth is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"ground truth is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"ground truth {ground_truth!r:.200} is not a non-empty list of calls")
    calls = []
    for number, entry in enumerate(entries, start=1):
        name = entry.get("Action") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip() or "\n" in name.strip():
            raise ValueError(f"ground truth: call {number} has no one-line tool name under 'Action'")
        given = entry.get("Action_Input")
        text = given if isinstance(given, str) else json.dumps(given)
        try:
            arguments, end = decode_object(text)
            if text[end:].strip():
                raise ValueError("text after the object")
        except ValueError as error:
            raise ValueError(f"ground truth: 'Action_Input' of call {number} is unusable: {error}") from error
        calls.append(Call(name.strip(), arguments))
    return calls


def render_calls(gold: Any) -> str:
    """A gold answer as a response in the asked-for format, without thoughts; it scores 1 against itself.

    Args:
        gold: as in :func:`parse_gold`. Inputs are written in one line each, keys in the gold answer's order.

    Raises:
        ValueError: as in :func:`parse_gold`.
    """
    lines = []
    for call in parse_gold(gold):
        lines += [f"Action: {call.name}", f"Action Input: {json.dumps(call.arguments, ensure_ascii=False)}"]
    return "\n".join(lines)


def _merged(calls: list[Call]) -> str:
    """Canonical form of the merged inputs, a later call's value replacing an earlier one's."""
    merged: dict[str, Any] = {}
    for call in calls:
        merged.update(call.arguments)
    return canonical(merged)


def _pred(calls: list[Call]) -> str:
    text = "[" + ",".join(sorted(call.key for call in calls)) + "]"
    return text if len(text) <= LONGEST_PRED else "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    match: str = "calls",
) -> dict[str, Any]:
    """Compare the calls of a response with those of the gold answer.

    Values are compared as JSON: numbers by value (1 equals 1.0, but not true), lists in order, keys in any order.
    Tool names are compared exactly, white space at their ends apart. The order of the calls does not matter.

    Args:
        data_source: name of the data set; not used.
        solution_str: the decoded response.
        ground_truth: as in :func:`parse_gold`.
        extra_info: of the row; not used.
        match: ``calls`` or ``merged`` (see the module).

    Returns:
        A dict in the shape of :mod:`verl_ext.verifiers.result`. ``pred`` is the canonical JSON of the sorted calls (or
        its hash where long), "" where any call cannot be read; ``format`` is 1.0 where there is at least one call and
        all can be read. Status ``error`` where the gold answer cannot be read.

    Raises:
        ValueError: ``match`` is neither of the two.
    """
    if match not in MATCHES:
        raise ValueError(f"match={match!r} is not allowed; expected one of {MATCHES}")
    try:
        gold = parse_gold(ground_truth)
    except ValueError as error:
        return failure(str(error))
    if not isinstance(solution_str, str):
        return failure(f"the response is of type {type(solution_str).__name__}, expected str")

    calls = parse_calls(solution_str)
    if not calls:
        return verdict(False, pred="", well_formed=False, feedback=NO_ACTION_FEEDBACK)
    if calls[-1].problem:
        feedback = calls[-1].problem.format(number=len(calls))
        return verdict(False, pred="", well_formed=False, feedback=feedback)
    pred = _pred(calls)
    if Counter(call.name for call in calls) != Counter(call.name for call in gold):
        return verdict(False, pred=pred, well_formed=True, feedback=WRONG_TOOLS_FEEDBACK)
    if match == "merged":
        right = _merged(calls) == _merged(gold)
    else:
        right = Counter(call.key for call in calls) == Counter(call.key for call in gold)
    return verdict(right, pred=pred, well_formed=True, feedback=WRONG_ARGUMENTS_FEEDBACK)


equivalent = same_text
"""``pred`` is canonical: calls are the same (rule ``calls``) where their texts are."""


def gold_response(ground_truth: str, extra_info: dict[str, Any]) -> str:
    """A response that makes the gold calls, to check rows with."""
    return render_calls(ground_truth)
