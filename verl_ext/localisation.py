"""Where in a response the divergence falls (SD-Zero, arXiv 2604.12002: token-level self-localisation).

Works on sampled completions: rows with ``tokens`` (text of each response token), ``divergence`` (nats at each) and
``reward``. Shares are of absolute values: a sampled token's loss and a clipped divergence have either sign. Pure: no
Ray, no verl. Shape suffixes: T response tokens, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Locate = Callable[[str, str], tuple[int, int] | None]
"""(prompt, response) -> characters [start, end) of the first wrong step of the response; None where there is none."""


def share_of_top(divergence_T: Sequence[float], top: float = 0.05) -> float:
    """Share of the divergence on the ``top`` of the tokens with most of it, at least one; 0 where there is none."""
    sizes = sorted(map(abs, divergence_T), reverse=True)
    total = math.fsum(sizes)
    if total <= 0:
        return 0.0
    count = max(1, math.ceil(top * len(sizes)))
    return math.fsum(sizes[:count]) / total


def tokens_of_span(tokens_T: Sequence[str], span: tuple[int, int]) -> list[int]:
    """Indices of the tokens that overlap the characters [start, end) of their joined text."""
    found, at = [], 0
    for index, token in enumerate(tokens_T):
        if token and at < span[1] and at + len(token) > span[0]:
            found.append(index)
        at += len(token)
    return found


def share_on_span(tokens_T: Sequence[str], divergence_T: Sequence[float], span: tuple[int, int]) -> tuple[float, float]:
    """(share of the divergence, share of the tokens) on the characters of a span."""
    inside = tokens_of_span(tokens_T, span)
    total = math.fsum(map(abs, divergence_T))
    share = math.fsum(abs(divergence_T[i]) for i in inside) / total if total > 0 else 0.0
    return share, len(inside) / max(1, len(tokens_T))


def profile(rows: Iterable[Sequence[float]], positions: int = 20) -> list[float | None]:
    """Mean divergence at each of P equal stretches of the response, every row counting the same; [P].

    A row with fewer tokens than stretches gives a token to every stretch that it covers. None where no row has one.
    """
    sums, counts = [0.0] * positions, [0] * positions
    for divergence_T in rows:
        length = len(divergence_T)
        for place in range(positions):
            first = place * length // positions
            last = max(first + 1, (place + 1) * length // positions)
            stretch = divergence_T[first : min(last, length)]
            if stretch:
                sums[place] += math.fsum(stretch) / len(stretch)
                counts[place] += 1
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def localisation(
    rows: Iterable[Mapping[str, Any]], *, threshold: float = 0.5, positions: int = 20, locate: Locate | None = None
) -> dict[str, Any]:
    """Summary of recorded completions, by outcome.

    Args:
        rows: completions; those without divergence are left out.
        threshold: reward from which a response is right.
        locate: where the first wrong step of a wrong response stands, for tasks that know it.

    Returns:
        for ``right`` and ``wrong``: ``rows``, ``divergence`` (mean over rows of the mean over tokens, nats), ``top5``
        (mean share on the top 5% of tokens), ``profile`` [P]. With ``locate`` also ``wrong_step``: ``rows`` whose step
        was found, ``share`` (mean share of a row's divergence on that step), ``tokens`` (mean share of its tokens),
        ``before`` and ``after`` (mean shares ahead of it and behind it), ``first`` (share of rows in which the token
        with the largest divergence is in it).
    """
    told = [row for row in rows if row.get("divergence")]
    sides = {
        "right": [row for row in told if row["reward"] >= threshold],
        "wrong": [row for row in told if row["reward"] < threshold],
    }
    found: dict[str, Any] = {
        side: {
            "rows": len(members),
            "divergence": _mean([math.fsum(row["divergence"]) / len(row["divergence"]) for row in members]),
            "top5": _mean([share_of_top(row["divergence"]) for row in members]),
            "profile": profile((row["divergence"] for row in members), positions),
        }
        for side, members in sides.items()
    }
    if locate is not None:
        found["wrong_step"] = _wrong_step(sides["wrong"], locate)
    return found


def _wrong_step(rows: Sequence[Mapping[str, Any]], locate: Locate) -> dict[str, Any]:
    shares, sizes, before, after, first = [], [], [], [], []
    for row in rows:
        tokens, values = row["tokens"], [abs(value) for value in row["divergence"]]
        span = locate(row["prompt"], row["response"])
        inside = tokens_of_span(tokens, span) if span else []
        total = math.fsum(values)
        if not inside or total <= 0:
            continue
        share, size = share_on_span(tokens, values, span)
        shares.append(share)
        sizes.append(size)
        before.append(math.fsum(values[: inside[0]]) / total)
        after.append(math.fsum(values[inside[-1] + 1 :]) / total)
        first.append(float(max(range(len(values)), key=values.__getitem__) in inside))
    return {
        "rows": len(shares),
        "share": _mean(shares),
        "tokens": _mean(sizes),
        "before": _mean(before),
        "after": _mean(after),
        "first": _mean(first),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def around_wrong_step(
    rows: Iterable[Mapping[str, Any]], locate: Locate, *, window: int = 10, threshold: float = 0.5
) -> dict[int, float]:
    """Mean share of a wrong response's divergence by distance from its first wrong step.

    Distances are tokens: 0 is the step's last token, -1 the one before; beyond ``window`` they are left out. Rows count
    the same; those whose step is not found are left out.
    """
    sums = dict.fromkeys(range(-window, window + 1), 0.0)
    count = 0
    for row in rows:
        values = [abs(value) for value in row.get("divergence") or ()]
        span = locate(row["prompt"], row["response"]) if values and row["reward"] < threshold else None
        inside = tokens_of_span(row["tokens"], span) if span else []
        total = math.fsum(values) if inside else 0.0
        if total <= 0:
            continue
        count += 1
        for place, value in enumerate(values):
            if place - inside[-1] in sums:
                sums[place - inside[-1]] += value / total
    return {distance: total / count for distance, total in sums.items()} if count else {}
