"""Teacher contexts: what the teacher reads before it scores a student's response.

A row is one rollout. Its teacher prompt is the question's own prompt with the last user turn replaced by the question,
a *demonstration* (the successful response of a sibling rollout of the same question) and, where there is one, the text
feedback on the row's own attempt. The row's own attempt is not part of the prompt: it is the continuation being scored.
A row with neither a demonstration nor feedback has no context and carries no distillation loss.

Source: SDPO (arXiv 2601.20802), public code, block ``self_distillation``. Deliberate differences from that code:

* "first" means first in rollout order, not in the order of a batch that was sorted by length before; so the choice does
  not depend on how the batch happens to be arranged;
* a thinking block that was opened in the prompt, or never closed, is removed as well;
* a success with no text left after that removal is not a demonstration;
* a teacher prompt over the length limit is never cut: its row is counted and left out of the distillation.

Everything here is a pure function on the driver: no Ray, no verl.
Shape suffixes: N rows, Q questions.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Byte for byte the values of SDPO's YAML (its dataclass has other trailing newlines, which its runs never see).
REPROMPT_TEMPLATE = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
SOLUTION_TEMPLATE = "\nCorrect solution:\n\n{successful_previous_attempt}"
FEEDBACK_TEMPLATE = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"

DEMONSTRATION_CHOICES = ("first", "random", "shortest")

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
# Set by this module in every chat-template call; a user's template arguments may not contradict them.
RESERVED_TEMPLATE_KWARGS = ("tokenize", "add_generation_prompt", "return_dict", "truncation", "padding")


# ---------------------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class ContextTemplates:
    """The three texts a teacher prompt is made of, filled once each by ``str.format``.

    Raises ValueError, naming the template, for a broken format string, an unknown placeholder or a missing one.
    """

    reprompt: str = REPROMPT_TEMPLATE
    solution: str = SOLUTION_TEMPLATE
    feedback: str = FEEDBACK_TEMPLATE

    def __post_init__(self) -> None:
        _check_template("reprompt_template", self.reprompt, {"prompt", "solution", "feedback"})
        _check_template("solution_template", self.solution, {"successful_previous_attempt"})
        _check_template("feedback_template", self.feedback, {"feedback_raw"})


def _check_template(name: str, text: str, expected: set[str]) -> None:
    try:
        found = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise ValueError(f"{name}: {text!r} is not a valid format string: {error}") from error
    if found - expected:
        raise ValueError(f"{name}: unknown placeholder {sorted(found - expected)}; allowed are {sorted(expected)}")
    if expected - found:
        raise ValueError(f"{name}: placeholder {sorted(expected - found)} is missing in {text!r}")


# ----------------------------------------------------------------------------------------------------------- thinking


def remove_thinking(text: str) -> str:
    """Delete thinking from a response: every ``<think>…</think>`` with the white space after it.

    That is SDPO's rule (shortest match, across lines). Two cases its pattern leaves in the text are handled too: a
    ``</think>`` whose opening tag was part of the prompt (everything up to it goes), and a ``<think>`` that was never
    closed, as in a cut response (only what precedes it stays, possibly nothing). Linear in the length of the text.
    """
    kept: list[str] = []
    position = 0
    while True:
        start = text.find(_THINK_OPEN, position)
        end = text.find(_THINK_CLOSE, start) if start >= 0 else -1
        if end < 0:
            break
        kept.append(text[position:start])
        position = _after_white_space(text, end + len(_THINK_CLOSE))
    kept.append(text[position:])
    answer = "".join(kept)
    orphan = answer.rfind(_THINK_CLOSE)
    if orphan >= 0:
        answer = answer[_after_white_space(answer, orphan + len(_THINK_CLOSE)) :]
    unterminated = answer.find(_THINK_OPEN)
    return answer if unterminated < 0 else answer[:unterminated]


def _after_white_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


# ----------------------------------------------------------------------------------------------------- demonstrations


def select_demonstrations(
    question_index_N: Sequence[int],
    successes_N: Sequence[bool],
    response_lengths_N: Sequence[int],
    *,
    choice: str,
    own_success: bool,
    seed: int,
    step: int,
    rollout_index_N: Sequence[int],
    question_keys_Q: Sequence[str] | None = None,
) -> list[int | None]:
    """For each row, the index of the row whose response serves as its demonstration, or None.

    Candidates are the successful rows of the same question; the row itself is one only where ``own_success`` is true
    (SDPO's ``dont_reprompt_on_self_success`` turned round). ``choice``:

    * ``"first"``: the first candidate in rollout order, SDPO's rule but for the order (see the module's docstring);
    * ``"shortest"``: the candidate with the fewest response tokens, the earlier rollout where two are equal;
    * ``"random"``: uniform over the candidates, for each row on its own, a function of seed, step, question key and
      rollout number only.

    The choice does not depend on the order of the rows: rows of a question may lie anywhere in the batch. Vectorised;
    N log N in time for the sort.

    Raises ValueError for an unknown choice, arrays of different length, a negative question index, two rows with the
    same question and rollout number, or ``"random"`` without the question keys (at least max(question_index)+1).
    """
    if choice not in DEMONSTRATION_CHOICES:
        raise ValueError(f"demonstration choice {choice!r} is unknown; allowed are {list(DEMONSTRATION_CHOICES)}")
    question = np.asarray(question_index_N, dtype=np.int64).reshape(-1)
    success = np.asarray(successes_N, dtype=bool).reshape(-1)
    length = np.asarray(response_lengths_N, dtype=np.int64).reshape(-1)
    rollout = np.asarray(rollout_index_N, dtype=np.int64).reshape(-1)
    if not len(question) == len(success) == len(length) == len(rollout):
        raise ValueError(
            f"one entry a row expected: {len(question)} question indices, {len(success)} successes, "
            f"{len(length)} response lengths, {len(rollout)} rollout numbers"
        )
    if len(question) == 0:
        return []
    if question.min() < 0:
        raise ValueError(f"row {int(question.argmin())}: question index {int(question.min())} is negative")
    _refuse_duplicate_rollouts(question, rollout)

    rows = np.flatnonzero(success)
    sort_keys = (rollout[rows], question[rows])
    if choice == "shortest":
        sort_keys = (rollout[rows], length[rows], question[rows])  # lexsort: the last key is the first criterion
    candidates = rows[np.lexsort(sort_keys)]
    count_Q = np.bincount(question[candidates], minlength=int(question.max()) + 1)
    start_Q = np.cumsum(count_Q) - count_Q
    # Position of every candidate among those of its question; the others keep a position past all offsets.
    position_N = np.full(len(question), np.iinfo(np.int64).max)
    position_N[candidates] = np.arange(len(candidates)) - start_Q[question[candidates]]

    barred_N = success & (not own_success)
    available_N = count_Q[question] - barred_N
    if choice == "random":
        choices_N = np.maximum(available_N, 1).astype(np.uint64)
        offset_N = (_row_hashes(question, rollout, question_keys_Q, seed, step) % choices_N).astype(np.int64)
    else:
        offset_N = np.zeros(len(question), dtype=np.int64)
    offset_N = offset_N + (barred_N & (offset_N >= position_N))  # step over the row itself
    return [
        int(candidates[start + offset]) if available > 0 else None
        for start, offset, available in zip(
            start_Q[question].tolist(), offset_N.tolist(), available_N.tolist(), strict=True
        )
    ]


def _refuse_duplicate_rollouts(question: np.ndarray, rollout: np.ndarray) -> None:
    order = np.lexsort((rollout, question))
    same = (question[order[1:]] == question[order[:-1]]) & (rollout[order[1:]] == rollout[order[:-1]])
    if same.any():
        at = int(np.flatnonzero(same)[0])
        first, second = sorted((int(order[at]), int(order[at + 1])))
        raise ValueError(
            f"rows {first} and {second} are both rollout {int(rollout[first])} of one question; "
            "pass one row a rollout (the last output of an agent loop that has several)"
        )


def _row_hashes(
    question: np.ndarray, rollout: np.ndarray, question_keys_Q: Sequence[str] | None, seed: int, step: int
) -> np.ndarray:
    """uint64 [N], a function of (seed, step, question key, rollout number) alone, the same on every machine."""
    questions = int(question.max()) + 1
    if question_keys_Q is None or len(question_keys_Q) < questions:
        found = 0 if question_keys_Q is None else len(question_keys_Q)
        raise ValueError(f"a random demonstration needs a key for each of {questions} questions, found {found}")
    digests = [hashlib.blake2b(f"{seed}\0{step}\0{key}".encode(), digest_size=8).digest() for key in question_keys_Q]
    base_Q = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    # Finaliser of SplitMix64 (Steele et al. 2014): neighbouring rollout numbers give unrelated values.
    mixed = base_Q[question] + rollout.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


# ---------------------------------------------------------------------------------------------------------- rendering


def usable_feedback(
    feedback: str | None, *, has_solution: bool, only_without_solution: bool, row: object = None
) -> str | None:
    """The row's own feedback where the rules let it be used, else None.

    Only non-blank text counts; beside a solution it is used only where ``only_without_solution`` is false (SDPO's
    ``environment_feedback_only_without_solution``). Raises ValueError for feedback that is neither text nor None.
    """
    if feedback is None:
        return None
    if not isinstance(feedback, str):
        raise ValueError(f"{_name(row)}: feedback must be text or None, found {type(feedback).__name__}: {feedback!r}")
    if not feedback.strip() or (has_solution and only_without_solution):
        return None
    return feedback


def render_context(
    messages: Sequence[Mapping[str, Any]],
    solution: str | None,
    feedback: str | None,
    templates: ContextTemplates | None = None,
    *,
    row: object = None,
) -> list[dict[str, Any]] | None:
    """The teacher's message list: all turns but the last as they are, the last user turn replaced by the reprompt text.

    None where there is neither a solution nor feedback. Braces in the values are plain text, since each template is
    filled exactly once. ``messages`` is not changed. ``row`` only names the row in an error.

    Raises ValueError if the last message is not a user turn with plain text.
    """
    templates = templates or ContextTemplates()
    messages = checked_messages(messages, row)
    if solution is None and feedback is None:
        return None
    solution_text = "" if solution is None else templates.solution.format(successful_previous_attempt=solution)
    feedback_text = "" if feedback is None else templates.feedback.format(feedback_raw=feedback)
    text = templates.reprompt.format(prompt=messages[-1]["content"], solution=solution_text, feedback=feedback_text)
    return [*messages[:-1], {**messages[-1], "content": text}]


def checked_messages(messages: Sequence[Mapping[str, Any]], row: object) -> list[dict[str, Any]]:
    """Copies of the messages. Raises ValueError unless they end in a user turn with plain text; ``row`` names it."""
    if isinstance(messages, str | bytes | Mapping):
        raise ValueError(f"{_name(row)}: the prompt must be a list of messages, found {type(messages).__name__}")
    messages = list(messages)
    if not messages:
        raise ValueError(f"{_name(row)}: the prompt has no messages; its last one must be a user turn")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"{_name(row)}: message {number} is {type(message).__name__}, expected role and content")
    role, content = messages[-1].get("role"), messages[-1].get("content")
    if role != "user" or not isinstance(content, str):
        raise ValueError(
            f"{_name(row)}: the last message of the prompt must be a user turn with plain text, "
            f"found role {role!r} with content of type {type(content).__name__}"
        )
    return [dict(message) for message in messages]


def _name(row: object) -> str:
    return "prompt" if row is None else f"row {row}"


# ------------------------------------------------------------------------------------------------------- tokenisation


def check_template_kwargs(template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``data.apply_chat_template_kwargs`` as a dict; ValueError for an argument that this module sets itself."""
    clash = [name for name in RESERVED_TEMPLATE_KWARGS if name in template_kwargs]
    if clash:
        raise ValueError(f"data.apply_chat_template_kwargs: {clash} may not be set there")
    return dict(template_kwargs)


class PromptTokenizer:
    """Messages → prompt token ids, through the chat template, once for each distinct message list.

    The rows of a question often share one teacher prompt (every failed row has the same demonstration). The same
    template arguments as in the rollouts (``data.apply_chat_template_kwargs``) have to be given, or teacher and student
    would answer after different generation prompts (OPSD wants that: ``distill.context.template_kwargs``);
    ``check_prompt_parity`` compares. The tokenizer's settings are left alone: nothing is padded or cut, so no side has
    to be set.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._template_kwargs = check_template_kwargs(template_kwargs or {})
        self._cache: dict[str, list[int]] = {}
        self.calls = 0  # chat-template calls made, for tests and for the curious

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids with the generation prompt appended. The list is shared between equal prompts: do not change it."""
        messages = [dict(message) for message in messages]
        try:
            key = json.dumps(messages, ensure_ascii=False)
        except TypeError:  # something beside plain values in a message: correct, only not cached
            return self._tokenize(messages)
        if key not in self._cache:
            self._cache[key] = self._tokenize(messages)
        return self._cache[key]

    def _tokenize(self, messages: list[dict[str, Any]]) -> list[int]:
        self.calls += 1
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self._template_kwargs
        )
        return [int(token) for token in ids]


def check_prompt_parity(
    messages: Sequence[Mapping[str, Any]],
    student_prompt_ids: Sequence[int],
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    row: object = None,
) -> None:
    """ValueError if the student's prompt ids are not what this tokenizer and these arguments make of the prompt.

    Meant for one row of the first batch: a thinking flag or a tool list that only one side got puts the teacher's
    distribution after another generation prompt, and nothing else would show it.
    """
    rendered = PromptTokenizer(tokenizer, template_kwargs)(messages)
    student = [int(token) for token in student_prompt_ids]
    if rendered == student:
        return
    pairs = zip(rendered, student, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(rendered), len(student)))
    raise ValueError(
        f"{_name(row)}: the student's prompt has {len(student)} tokens, the chat template with the arguments "
        f"{dict(template_kwargs or {})} gives {len(rendered)}, first difference at token {at}; teacher prompts would "
        "end in another generation prompt: give both the same data.apply_chat_template_kwargs"
    )


# ----------------------------------------------------------------------------------------------------- a whole batch


@dataclass(frozen=True)
class RowContext:
    """The teacher's side of one row. ``token_ids`` is the teacher prompt, None where the row is not distilled."""

    demonstration: int | None = None
    used_feedback: bool = False
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    prompt_tokens: int = 0
    too_long: bool = False

    @property
    def distill(self) -> bool:
        return self.token_ids is not None

    @property
    def text(self) -> str | None:
        """The reprompt text (the last user turn), for the sample dump."""
        return None if self.messages is None else self.messages[-1]["content"]


@dataclass(frozen=True)
class Contexts:
    """One RowContext a row, and counters (flat, floats)."""

    rows: list[RowContext]
    metrics: dict[str, float]


def build_contexts(
    raw_prompts_N: Sequence[Sequence[Mapping[str, Any]]],
    responses_N: Sequence[str],
    feedback_N: Sequence[str | None] | None,
    *,
    question_index_N: Sequence[int],
    successes_N: Sequence[bool],
    rollout_index_N: Sequence[int],
    response_lengths_N: Sequence[int],
    tokenizer: Any,
    config: Any,
    template_kwargs: Mapping[str, Any] | None = None,
    max_total: int | None = None,
    seed: int = 0,
    step: int = 0,
    question_keys_Q: Sequence[str] | None = None,
    row_names_N: Sequence[object] | None = None,
) -> Contexts:
    """Choose demonstrations, render and tokenise the teacher prompts of a whole batch.

    ``config`` has the attributes of ``ContextConfig`` (demonstration, own_success, remove_thinking, feedback,
    feedback_only_without_solution, max_length and the three templates). A teacher prompt of more than
    ``config.max_length`` tokens, or one that together with the response exceeds ``max_total`` (the model's limit; None:
    no limit), is counted and its row left out; nothing is ever cut.

    Metrics, all counts: ``context/rows``, ``with_demonstration`` and ``with_feedback`` (rows whose prompt has one, too
    long ones included), ``too_long``, ``distilled``, ``without_context``, ``empty_demonstration`` (successes without
    text outside their thinking); ``lone_success`` and ``no_success`` (questions); ``prompts_rendered`` (distinct ones);
    and, no count, ``prompt_tokens_mean`` over the distilled rows.

    Raises ValueError as ``select_demonstrations``, ``render_context`` and ``usable_feedback`` do.
    """
    rows = len(raw_prompts_N)
    names = list(range(rows)) if row_names_N is None else list(row_names_N)
    feedback_N = [None] * rows if feedback_N is None or not config.feedback else list(feedback_N)
    check_lengths(rows, responses=responses_N, feedback=feedback_N, successes=successes_N, row_names=names)
    templates = ContextTemplates(config.reprompt_template, config.solution_template, config.feedback_template)
    success = np.asarray(successes_N, dtype=bool).reshape(-1)
    # Only successes are ever shown, so only they are cleaned.
    texts: dict[int, str] = {
        i: remove_thinking(responses_N[i]) if config.remove_thinking else responses_N[i]
        for i in np.flatnonzero(success).tolist()
    }
    usable = np.array([bool(success[i]) and bool(texts[i].strip()) for i in range(rows)], dtype=bool)
    demonstrations = select_demonstrations(
        question_index_N,
        usable,
        response_lengths_N,
        choice=config.demonstration,
        own_success=config.own_success,
        seed=seed,
        step=step,
        rollout_index_N=rollout_index_N,
        question_keys_Q=question_keys_Q,
    )
    tokenize = PromptTokenizer(tokenizer, template_kwargs)
    contexts = []
    for i in range(rows):
        solution = None if demonstrations[i] is None else texts[demonstrations[i]]
        feedback = usable_feedback(
            feedback_N[i],
            has_solution=solution is not None,
            only_without_solution=config.feedback_only_without_solution,
            row=names[i],
        )
        messages = render_context(raw_prompts_N[i], solution, feedback, templates, row=names[i])
        if messages is None:
            contexts.append(RowContext())
            continue
        ids = tokenize(messages)
        too_long = len(ids) > config.max_length
        too_long |= max_total is not None and len(ids) + int(response_lengths_N[i]) > max_total
        contexts.append(
            RowContext(
                demonstration=demonstrations[i],
                used_feedback=feedback is not None,
                messages=messages,
                token_ids=None if too_long else ids,
                prompt_tokens=len(ids),
                too_long=bool(too_long),
            )
        )
    return Contexts(contexts, _context_metrics(contexts, question_index_N, success, usable, tokenize.calls))


def _context_metrics(
    contexts: list[RowContext], question_index_N: Sequence[int], success: np.ndarray, usable: np.ndarray, rendered: int
) -> dict[str, float]:
    question = np.asarray(question_index_N, dtype=np.int64).reshape(-1)
    _, dense = np.unique(question, return_inverse=True)
    successes_Q = np.bincount(dense, weights=success.astype(np.float64)) if len(question) else np.zeros(0)
    distilled = [context.prompt_tokens for context in contexts if context.distill]
    return {
        "context/rows": float(len(contexts)),
        "context/with_demonstration": float(sum(context.demonstration is not None for context in contexts)),
        "context/with_feedback": float(sum(context.used_feedback for context in contexts)),
        "context/without_context": float(sum(context.messages is None for context in contexts)),
        "context/too_long": float(sum(context.too_long for context in contexts)),
        "context/distilled": float(len(distilled)),
        "context/empty_demonstration": float((success & ~usable).sum()),
        "context/lone_success": float((successes_Q == 1).sum()),
        "context/no_success": float((successes_Q == 0).sum()),
        "context/prompts_rendered": float(rendered),
        "context/prompt_tokens_mean": float(np.mean(distilled)) if distilled else 0.0,
    }


def check_lengths(rows: int, **columns: Sequence[Any]) -> None:
    """Raises ValueError, naming the column, unless every column has ``rows`` entries."""
    for name, column in columns.items():
        if len(column) != rows:
            raise ValueError(f"{name} has {len(column)} entries for {rows} rows")
