"""Evaluations read back, and two groups of them compared: what `python -m recipe.compare_evaluations` is made of."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources import sha256_of
from recipe.evaluation_items import FORMAT, RESULT, Item, read_items
from recipe.paired import Comparison, MethodRuns, compare
from verl_ext.question_scores import question_scores
from verl_ext.sample_store import MANIFEST, differences, read_store

# By the start of their dotted names. Models may differ, and with them the prompt's template; seeds should.
MUST_AGREE = ("sampling.", "verifier.", "context.", "chat_template.kwargs")
MAY_DIFFER = ("model.", "chat_template.hash", "sampling.seed")
NAMED = 3


class ComparisonError(ValueError):
    """Evaluations that cannot be compared; the message names the folder and why."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        folder: where it is.
        result: what ``evaluation.json`` holds.
        items: of ``items.jsonl``.
    """

    folder: Path
    result: dict[str, Any]
    items: list[Item]


def read_evaluation(folder: Path) -> Evaluation:
    """Raises ComparisonError where it is not finished, damaged or empty."""
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ComparisonError(_unfinished(folder)) from None
    except ValueError as error:
        raise ComparisonError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ComparisonError(f"{path}: no evaluation of format {FORMAT}")
    items_path = folder / result["items"]["file"]
    items = read_items(items_path)
    if not items:
        raise ComparisonError(f"{items_path}: holds no question")
    if sha256_of(items_path) != result["items"]["sha256"]:
        raise ComparisonError(f"{items_path} is not the one that {path} was made with; run recipe.evaluate again")
    return Evaluation(folder, result, items)


def _unfinished(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        drawn = len(read_store(folder)[1])
        return f"{folder}: unfinished, {drawn} samples and no {RESULT}; run the same recipe.evaluate command again"
    return f"{folder}: no {RESULT} there; expected a folder of recipe.evaluate"


def item_shares(evaluation: Evaluation, metric: str, samples: int | None = None) -> list[float]:
    """[P] one share an item.

    Args:
        metric: ``mean``, ``maj`` or ``pass@k``.
        samples: only the first so many of each item.

    Raises:
        ComparisonError: an unknown metric, k or ``samples`` larger than there are samples, or an item without a
            verdict (or with too few for pass@k); names the item.
    """
    found = evaluation.result["samples"]
    wanted = found if samples is None else samples
    if not 1 <= wanted <= found:
        raise ComparisonError(f"{evaluation.folder}: --samples {wanted}; it has {found} samples an item")
    needed = _verdicts_needed(metric)
    if needed > wanted:
        raise ComparisonError(f"{evaluation.folder}: --metric {metric} needs {needed} samples an item, found {wanted}")
    items = [item.first(wanted) for item in evaluation.items]
    if short := [item.item for item in items if len(item.verdicts) < needed]:
        raise ComparisonError(
            f"{evaluation.folder}: {len(short)} items have fewer than {needed} verdicts, because the verifier could "
            f"not judge the rest: {', '.join(short[:NAMED])}; --leave-out-unjudged goes without them in both"
        )
    answers = [item.votes for item in items] if metric == "maj" else None
    passes = metric not in ("mean", "maj")
    scores = question_scores([item.verdicts for item in items], answers, samples=wanted, ks=[needed] if passes else [])
    return scores[f"pass@{needed}" if passes else f"{metric}@{wanted}"]


def _verdicts_needed(metric: str) -> int:
    if metric in ("mean", "maj"):
        return 1
    found = re.fullmatch(r"pass@([1-9][0-9]{0,8})", metric)
    if found is None:
        raise ComparisonError(f"--metric {metric}; allowed: mean, maj, pass@k")
    return int(found.group(1))


def check_comparable(evaluations: Sequence[Evaluation], *, other_settings: bool = False) -> list[str]:
    """All asked the same questions, in the same way; returns the settings that differ, a line each.

    Raises:
        ComparisonError: a question of one id has another text or answer; without ``other_settings`` also where
            sampling, verifier, context or arguments of the prompt template differ.
    """
    first = evaluations[0]
    asked = {item.item: item.question for item in first.items}
    lines: list[str] = []
    for other in evaluations[1:]:
        changed = [item.item for item in other.items if asked.get(item.item, item.question) != item.question]
        if changed:
            raise ComparisonError(
                f"{other.folder}: {len(changed)} questions have another text or answer than in {first.folder}: "
                f"{', '.join(changed[:NAMED])}"
            )
        found = [
            line
            for line in differences(first.result["settings"], other.result["settings"], str(first.folder))
            if not line.startswith(MAY_DIFFER)
        ]
        strict = [line for line in found if line.startswith(MUST_AGREE)]
        if strict and not other_settings:
            raise ComparisonError(
                f"{other.folder}: {'; '.join(line.replace('asked for', 'this one has') for line in strict)}. Evaluate "
                "both in the same way, or give --other-settings"
            )
        versions = differences(first.result["versions"], other.result["versions"], str(first.folder))
        lines += [f"{other.folder}: {line.replace('asked for', 'this one has')}" for line in (*found, *versions)]
    return list(dict.fromkeys(lines))


def compare_groups(
    first: Sequence[Evaluation],
    second: Sequence[Evaluation],
    *,
    metric: str = "mean",
    samples: int | None = None,
    leave_out_unjudged: bool = False,
    **options: Any,
) -> Comparison:
    """:func:`recipe.paired.compare` of two groups of evaluations.

    Args:
        first, second: runs of one method each, in the order of their seeds.
        metric, samples: see :func:`item_shares`.
        leave_out_unjudged: go without the items that have too few verdicts in any evaluation.
        options: ``delta``, ``population``, ``pairing``, ``level``, ``permutations``, ``seed``.

    Raises:
        ComparisonError: an empty group, different items within a group, or as :func:`item_shares`.
        ValueError: as :func:`recipe.paired.compare`.
    """
    for name, group in (("the first", first), ("the second", second)):
        if not group:
            raise ComparisonError(f"{name} group is empty; give at least one evaluation")
    if leave_out_unjudged:
        needed = _verdicts_needed(metric)
        few = {
            item.item
            for evaluation in (*first, *second)
            for item in evaluation.items
            if len(item.first(samples or evaluation.result["samples"]).verdicts) < needed
        }
        first, second = ([_without(evaluation, few) for evaluation in group] for group in (first, second))
    a, b = (f"{name} ({group[0].folder})" for name, group in (("A", first), ("B", second)))
    return compare(_runs(a, first, metric, samples), _runs(b, second, metric, samples), **options)


def _without(evaluation: Evaluation, names: set[str]) -> Evaluation:
    items = [item for item in evaluation.items if item.item not in names]
    if not items:
        raise ComparisonError(f"{evaluation.folder}: no item has enough verdicts")
    return Evaluation(evaluation.folder, evaluation.result, items)


def _runs(name: str, group: Sequence[Evaluation], metric: str, samples: int | None) -> MethodRuns:
    names = [item.item for item in group[0].items]
    rows = []
    for evaluation in group:
        share_of = dict(
            zip((item.item for item in evaluation.items), item_shares(evaluation, metric, samples), strict=True)
        )
        if different := sorted(share_of.keys() ^ set(names)):
            raise ComparisonError(
                f"{evaluation.folder} and {group[0].folder} are of different items: {len(different)} stand in one "
                f"only, such as {different[0]!r}"
            )
        rows.append([share_of[item] for item in names])
    ks = {samples or evaluation.result["samples"] for evaluation in group}
    if len(ks) > 1:
        raise ComparisonError(f"{name}: its evaluations have {', '.join(map(str, sorted(ks)))} samples an item")
    return MethodRuns(name, rows, names, ks.pop(), list(range(len(group))))
