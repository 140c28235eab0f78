"""The numbers of an evaluation, for each data source and pooled, and the table of them.

Pooled: over all questions alike, so a data source counts by its number of questions. The intervals are those of
:func:`recipe.evaluation_summary.summarize`: over items, for this one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from recipe.evaluation_items import Item
from recipe.evaluation_summary import share_with_interval, summarize

POOLED = "pooled"
NAMED = 5
"""Questions that a note names."""


def group_numbers(
    items: Sequence[Item], *, samples: int, ks: Sequence[int] | None = None, level: float = 0.95
) -> dict[str, dict[str, Any]]:
    """Name of a group (each data source where there are several, then ``pooled``) -> its numbers.

    Of each group: ``questions``, ``samples``, ``metrics`` (name -> value, low, high), ``format``, ``truncated``
    (the same), ``length`` in tokens (mean, median, longest), ``verifier_errors`` (samples without a verdict, timeouts
    among them), ``timeouts``, ``unjudged`` (ids of questions without any verdict, which are in no mean) and
    ``without_pass`` (the k that some question has too few verdicts for).

    Args:
        samples: K of every item.
        ks: of pass@k; None: 1 to K.

    Raises:
        ValueError: no items, or k larger than K.
    """
    if not items:
        raise ValueError("no questions to summarise")
    for k in ks or ():
        if not 1 <= k <= samples:
            raise ValueError(f"pass@{k} needs at least {k} samples, found {samples}")
    sources = sorted({item.data_source for item in items})
    groups = {name: [item for item in items if item.data_source == name] for name in sources}
    found = {name: _numbers(part, samples, ks, level) for name, part in groups.items() if len(groups) > 1}
    return found | {POOLED: _numbers(items, samples, ks, level)}


def _numbers(items: Sequence[Item], samples: int, ks: Sequence[int] | None, level: float) -> dict[str, Any]:
    judged = [item for item in items if item.verdicts]
    named = any(vote for item in judged for vote in item.votes)
    wanted = range(1, samples + 1) if ks is None else ks
    fewest = min((len(item.verdicts) for item in judged), default=0)
    metrics = {}
    if judged:
        metrics = summarize(
            [item.verdicts for item in judged],
            [item.votes for item in judged] if named else None,
            samples=samples,
            ks=[k for k in wanted if k <= fewest] if _binary(judged) else [],
            level=level,
        )
    tokens = [count for item in items for count in item.tokens]
    shapes = [[value for value in item.format if value is not None] for item in items]
    return {
        "questions": len(items),
        "samples": len(tokens),
        "metrics": metrics,
        "format": _rate([values for values in shapes if values], level),
        "truncated": _rate([item.truncated for item in items], level),
        "length": {"mean": fmean(tokens), "median": median(tokens), "longest": max(tokens)},
        "verifier_errors": sum(len(item.correct) - len(item.verdicts) for item in items),
        "timeouts": sum(item.timeouts for item in items),
        "unjudged": [item.item for item in items if not item.verdicts],
        "without_pass": [k for k in wanted if k > fewest] if judged and _binary(judged) else list(wanted),
    }


def _binary(items: Sequence[Item]) -> bool:
    return all(verdict in (0.0, 1.0) for item in items for verdict in item.verdicts)


def _rate(rows: Sequence[Sequence[float]], level: float) -> dict[str, float] | None:
    return share_with_interval([fmean(row) for row in rows], level) if rows else None


def notes(groups: Mapping[str, Mapping[str, Any]], *, rule: str, undecided: int) -> list[str]:
    """What a reader of the numbers has to know, a sentence each."""
    pooled = groups[POOLED]
    said = []
    if unjudged := pooled["unjudged"]:
        said.append(f"No verdict on any sample of {len(unjudged)} questions, which are in no mean: {_some(unjudged)}.")
    if pooled["verifier_errors"]:
        said.append(
            f"{pooled['verifier_errors']} of {pooled['samples']} samples could not be judged ({pooled['timeouts']} "
            "timeouts); they are left out of their questions' means, not counted as wrong."
        )
    if missing := pooled["without_pass"]:
        why = "a question has fewer verdicts" if pooled["metrics"] else "there are no verdicts"
        if pooled["metrics"] and not any(name.startswith("pass@") for name in pooled["metrics"]):
            why = "verdicts are not all 0 or 1, or a question has fewer"
        said.append(f"No pass@k for k in {_some([str(k) for k in missing])}: {why}.")
    if any(name.startswith("maj@") for name in pooled["metrics"]):
        said.append(f"Answers vote together in maj@k by {rule}.")
    elif pooled["metrics"]:
        said.append("No maj@k: the verifier names no answers.")
    if undecided:
        said.append(f"{undecided} pairs of answers could not be compared and count as different answers.")
    return said


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a row a metric and a column a group; reads well as plain text too. pass@k: powers of two."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group["metrics"] if _shown(name)))
    rows = [["", *groups]]
    rows += [[name, *(_share(group["metrics"].get(name)) for group in groups.values())] for name in names]
    rows += [[label, *(_share(group[key]) for group in groups.values())] for label, key in SHARES.items()]
    rows += [["tokens: mean, median, longest", *(_length(group["length"]) for group in groups.values())]]
    rows += [[label, *(str(group[key]) for group in groups.values())] for label, key in COUNTS.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


SHARES = {"right format": "format", "truncated": "truncated"}
COUNTS = {"questions": "questions", "samples": "samples", "without a verdict": "verifier_errors"}


def _shown(name: str) -> bool:
    metric, _, k = name.partition("@")
    # pass@1 is the mean again.
    return metric != "pass" or (int(k) > 1 and int(k).bit_count() == 1)


def _share(entry: Mapping[str, float] | None) -> str:
    return "–" if entry is None else f"{entry['value']:.3f} ({entry['low']:.3f}–{entry['high']:.3f})"


def _length(length: Mapping[str, float]) -> str:
    return f"{length['mean']:.0f}, {length['median']:.0f}, {length['longest']}"
