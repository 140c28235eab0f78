"""Sampled completions as the report shows them: which ones, their texts within a budget, and tokens by divergence.

A token's divergence becomes one of ``LEVELS`` steps of colour. The page carries a response's text once, escaped like
any other, and beside it the lengths, levels and values of its tokens as plain numbers; a script cuts the text into
coloured pieces when the row is opened, so that a run of long responses stays a small page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import escape

from recipe.alarm_looks import Record
from recipe.console_format import clean_line

MAX_ROWS = 200
TEXT_LIMITS = (6000, 3000)  # characters of a text; where neither fits the budget, there are half as many rows
BUDGET = 3_000_000  # bytes of all rows on the page
MAX_TOKENS = 3000  # coloured in a row
LEVELS = 6
NEGATIVE = "abcdef"  # the levels below 0: a clipped or sampled divergence has either sign
NOT_FINITE = "x"
SCALE_AT = 0.98  # this quantile of the divergences has the strongest colour: single tokens may be far above
TOP_TOKENS = 5
RIGHT_FROM = 0.5  # reward of a right answer

_WRITER = {"teacher": "Response, sampled by the teacher", "student": "Response, sampled by the student"}
_HIDDEN = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class TokenView:
    """A response by tokens: its text, and for each token its length in characters, its level and its value in nats."""

    text: str
    lengths: str
    levels: str
    nats: str
    left_out: int
    top: list[tuple[str, str]]


@dataclass(frozen=True)
class CompletionView:
    """One row of the table: cells as text, ``data`` the numbers that it is sorted and filtered by."""

    preview: str
    question: str
    cells: dict[str, str]
    data: dict[str, str]
    texts: list[tuple[str, str]]
    tokens: TokenView | None
    response_title: str


@dataclass(frozen=True)
class CompletionsView:
    """The table: its rows, how many there were in all, and the legend of the colours as (level, nats)."""

    rows: list[CompletionView] = field(default_factory=list)
    total: int = 0
    legend: list[tuple[str, str]] = field(default_factory=list)

    @property
    def steps(self) -> list[str]:
        return list(dict.fromkeys(row.cells["step"] for row in self.rows))


def completions_view(rows: Sequence[Record], limit: int = MAX_ROWS, budget: int = BUDGET) -> CompletionsView:
    """At most ``limit`` rows from the whole run, their texts shortened so that they fit ``budget`` bytes of HTML."""
    scale = divergence_scale(rows)
    while True:
        chosen = choose_completions(rows, limit)
        for length in TEXT_LIMITS:
            views, left = [], budget
            for row in chosen:
                views.append(_view(row, length, scale))
                left -= _size(views[-1])
                if left < 0:
                    break
            else:
                return CompletionsView(views, len(rows), _legend(scale, views))
        limit //= 2


def choose_completions(rows: Sequence[Record], limit: int) -> list[Record]:
    """At most ``limit`` completions, from steps spread evenly over the run, the first and the last one included."""
    by_step: dict[Any, list[Record]] = {}
    for row in rows:
        by_step.setdefault(row.get("step"), []).append(row)
    groups = list(by_step.values())
    wanted = max(1, min(len(groups), limit // 4))
    last = len(groups) - 1
    picked = sorted({round(index * last / max(1, wanted - 1)) for index in range(wanted)}) if groups else []
    each = limit // max(1, len(picked))
    return [row for index in picked for row in groups[index][:each]]


def divergence_scale(rows: Iterable[Record]) -> float:
    """The divergence, in nats, that has the strongest colour in all rows of a run; 0 where none was recorded."""
    sizes = sorted(abs(value) for row in rows for value in _numbers(row.get("divergence")) if value)
    return sizes[min(len(sizes) - 1, int(SCALE_AT * len(sizes)))] if sizes else 0.0


def level_of(value: float | None, scale: float) -> str:
    """The colour of a divergence: 0 to ``LEVELS`` by the root of its share of the scale, letters below 0."""
    if value is None:
        return NOT_FINITE
    level = 0 if scale <= 0 else min(LEVELS, round(LEVELS * math.sqrt(abs(value) / scale)))
    return NEGATIVE[level - 1] if value < 0 and level else str(level)


def _legend(scale: float, views: Sequence[CompletionView]) -> list[tuple[str, str]]:
    used = {level for view in views if view.tokens for level in view.tokens.levels}
    if not used:
        return []
    marks = [(level, scale * (level / LEVELS) ** 2) for level in (0, 2, 4, 6)]
    below = [(NEGATIVE[level - 1], -value) for level, value in reversed(marks) if level] if used & set(NEGATIVE) else []
    return [(str(level), f"{value:.2g}") for level, value in (*below, *marks)]


def _view(row: Record, limit: int, scale: float) -> CompletionView:
    prompt, response, context = (_text(row.get(key)) for key in ("prompt", "response", "teacher_context"))
    tokens = _tokens(row, limit, scale)
    reward, rate, weight = (_number(row.get(key)) for key in ("reward", "pass_rate", "weight"))
    divergences = _numbers(row.get("divergence"))
    mean = math.fsum(divergences) / len(divergences) if divergences else None
    length = len(row["tokens"]) if isinstance(row.get("tokens"), list) else None
    demonstration = {True: "yes", False: "no"}.get(row.get("has_demonstration"), "–")
    step = row.get("step", "–")
    title = _WRITER.get(str(row.get("sampled_by")), "Response")
    texts = [("Prompt", shortened(prompt, limit))]
    if tokens is None:
        texts.append((title, shortened(response, limit)))
    texts.append(("Teacher context", shortened(context, limit) if context else "none"))
    outcome = "" if reward is None else "right" if reward >= RIGHT_FROM else "wrong"
    return CompletionView(
        preview=" ".join(prompt[-400:].split())[-110:],
        question=_text(row.get("question_id")),
        cells={
            "step": _visible(str(step)),
            "reward": _figure(reward),
            "p̂": _figure(rate),
            "weight": _figure(weight),
            "divergence": _figure(mean),
            "tokens": "–" if length is None else str(length),
            "demo": demonstration,
        },
        data={
            "step": _plain(_number(step)),
            "reward": _plain(reward),
            "rate": _plain(rate),
            "weight": _plain(weight),
            "divergence": _plain(mean),
            "tokens": _plain(length),
            "demo": demonstration,
            "outcome": outcome,
        },
        texts=texts,
        tokens=tokens,
        response_title=title,
    )


def _tokens(row: Record, limit: int, scale: float) -> TokenView | None:
    texts, values = row.get("tokens"), row.get("divergence")
    if not isinstance(texts, list) or not isinstance(values, list) or not texts or len(texts) != len(values):
        return None
    pieces: list[tuple[str, float | None]] = []
    room = limit
    for text, value in zip(texts, values, strict=True):
        shown = _visible(str(text))
        room -= len(shown)
        if pieces and (room < 0 or len(pieces) == MAX_TOKENS):
            break
        pieces.append((shown[:limit], _number(value)))
    largest = sorted((one for one in pieces if one[1]), key=lambda one: -abs(one[1]))[:TOP_TOKENS]
    return TokenView(
        text="".join(text for text, _ in pieces),
        lengths=",".join(str(len(text)) for text, _ in pieces),
        levels="".join(level_of(value, scale) for _, value in pieces),
        nats=",".join("" if value is None else f"{value:.3g}" for _, value in pieces),
        left_out=len(texts) - len(pieces),
        top=[(text.replace("\n", "⏎") or "(part of a character)", f"{value:.3g}") for text, value in largest],
    )


def _size(view: CompletionView) -> int:
    """Bytes of a row on the page, near enough: its texts, escaped, and its numbers."""
    texts = [view.preview, view.question, *(text for _, text in view.texts)]
    numbers = 1500
    if view.tokens:
        texts.append(view.tokens.text)
        numbers += len(view.tokens.lengths) + len(view.tokens.levels) + len(view.tokens.nats)
    return numbers + sum(len(str(escape(text)).encode("utf-8", errors="replace")) for text in texts)


def _number(value: Any) -> float | None:
    """A finite number of a JSON file, or None; quicker than one that takes tensors, for there are many tokens."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _numbers(values: Any) -> list[float]:
    return [number for one in values if (number := _number(one)) is not None] if isinstance(values, list) else []


def _figure(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


def _visible(text: str) -> str:
    """Without control characters; a browser would drop some, and the lengths of the tokens would no longer fit."""
    return text.translate(_HIDDEN)


def _text(value: Any) -> str:
    """A prompt may be a string or a list of chat messages."""
    if value is None:
        return ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and all(isinstance(one, Mapping) and "content" in one for one in value):
        text = "\n\n".join(f"[{one.get('role', '?')}]\n{_text(one['content'])}" for one in value)
    else:
        text = json.dumps(value, ensure_ascii=False, indent=1)
    return "\n".join(clean_line(line) for line in text.split("\n"))


def shortened(text: str, limit: int, where: str = "completions.jsonl") -> str:
    """The beginning of a text, and how much is missing."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n… {len(text) - limit} more characters in {where}"
