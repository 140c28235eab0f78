"""Final numbers of groups of runs with intervals, and differences to one of them.

Where the right answers are known by question, the numbers speak about other seeds and other questions; where only a
run's mean is known, about other seeds on these questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipe.compared_curves import KINDS, VALIDATION
from recipe.compared_groups import Group
from recipe.compared_runs import ComparedRun
from recipe.intervals import Floats, Interval, over_items, over_seeds, over_seeds_and_items
from recipe.paired import Comparison, MethodRuns, compare
from recipe.run_files import as_number

# Stands for "all questions" where a run's mean is all that is known: one item, the whole validation set.
ALL_QUESTIONS = "the validation set"


@dataclass(frozen=True)
class Final:
    """A group's accuracy at the end.

    Attributes:
        group: its name.
        steps: at which its finished runs were validated last, no two equal.
        seeds: of the finished runs.
        metric: such as ``mean@8``; "" where none of them was validated.
        interval: None where there is none, for the reason in ``note``.
        value: mean over the finished runs; None without one.
        others: further accuracies (``maj@8``, ``pass@8``): mean over runs.
        note: what is missing, or "".
    """

    group: str
    steps: tuple[int, ...]
    seeds: tuple[int | None, ...]
    metric: str
    value: float | None
    interval: Interval | None
    others: dict[str, float]
    note: str


@dataclass(frozen=True)
class Difference:
    """A group minus the reference.

    Attributes:
        group, reference: names.
        comparison: None where the two are refused, for the reason in ``note``.
        note: the reason, or what to keep in mind.
    """

    group: str
    reference: str
    comparison: Comparison | None
    note: str


def final_numbers(groups: Sequence[Group], level: float = 0.95) -> list[Final]:
    """One per group, at the last validation of its finished runs."""
    return [_final(group, level) for group in groups]


def differences_to(groups: Sequence[Group], reference: Group, level: float = 0.95) -> list[Difference]:
    """Every other group minus the reference."""
    return [_difference(group, reference, level) for group in groups if group is not reference]


# --------------------------------------------------------------------------------------------------------- one group


def _final(group: Group, level: float) -> Final:
    seeds = tuple(run.seed for run in group.finished)
    metric = metric_of(group.finished)
    if not metric:
        note = "no validation" if group.finished else "no finished run"
        return Final(group.name, (), seeds, "", None, None, {}, note)
    steps = tuple(sorted({_last(run, metric)[0] for run in group.finished}))
    value = float(np.mean([_last(run, metric)[1] for run in group.finished]))
    interval, note = None, ""
    try:
        matrix_SP, items = accuracies(group.finished, metric)
        if items == (ALL_QUESTIONS,) and len(matrix_SP) < 2:
            note = "one run, and its right answers by question are not known: no interval"
        elif items == (ALL_QUESTIONS,):
            _check_validation_data(group.finished)
            interval = over_seeds(matrix_SP, level)
        elif len(matrix_SP) == 1:
            interval = over_items(matrix_SP, level)
        else:
            interval = over_seeds_and_items(matrix_SP, level)
    except ValueError as error:
        note = f"no interval: {error}"
    return Final(group.name, steps, seeds, metric, value, interval, _others(group.finished, metric), note)


def metric_of(runs: Sequence[ComparedRun]) -> str:
    """``mean@k`` at the largest k that all runs have; "" where there is none."""
    common = [k for k in set.intersection(*map(_mean_ks, runs))] if runs else []
    return f"mean@{max(common)}" if common else ""


def _mean_ks(run: ComparedRun) -> set[int]:
    found = (VALIDATION.fullmatch(key) for record in run.records for key in record)
    return {int(match["k"]) for match in found if match and match["kind"] == "mean" and not match["source"]}


def _last(run: ComparedRun, metric: str) -> tuple[int, float]:
    """Step and value of the last validation."""
    return next(
        (int(record["step"]), value)
        for record in reversed(run.records)
        if (value := as_number(record.get(f"val/{metric}"))) is not None
    )


def _others(runs: Sequence[ComparedRun], metric: str) -> dict[str, float]:
    """The largest k of each other kind, at the step of the last validation."""
    last = [next(one for one in run.records if one["step"] == _last(run, metric)[0]) for run in runs]
    common = set.intersection(*(set(record) for record in last))
    found: dict[str, tuple[int, float]] = {}
    for match in filter(None, map(VALIDATION.fullmatch, common)):
        values = [as_number(record[match.string]) for record in last]
        kind, k = match["kind"], int(match["k"])
        if match["source"] or kind == "mean" or None in values or k < found.get(kind, (0, 0.0))[0]:
            continue
        found[kind] = (k, float(np.mean(values)))
    return {f"{kind}@{found[kind][0]}": found[kind][1] for kind in KINDS if kind in found}


def accuracies(runs: Sequence[ComparedRun], metric: str) -> tuple[Floats, tuple[str, ...]]:
    """[S, P] accuracies and the names of the items: the questions where all runs know them, else one item for all.

    Raises:
        ValueError: runs that answered different questions, or a question without a verdict.
    """
    last = [run.last for run in runs]
    known = [one for one in last if one is not None]
    if len(known) < len(runs) or any(one.step != _last(run, metric)[0] for run, one in zip(runs, known, strict=True)):
        return _means(runs, metric), (ALL_QUESTIONS,)
    first = known[0]
    rows = []
    for run, one in zip(runs, known, strict=True):
        if one.samples != first.samples:
            raise ValueError(f"different k: {runs[0].name} has {first.samples} samples, {run.name} has {one.samples}")
        by_item = dict(zip(one.items, one.accuracy_P, strict=True))
        missing = [item for item in first.items if item not in by_item]
        added = set(one.items) - set(first.items)
        if missing or added:
            example, owner, without = (missing[0], runs[0], run) if missing else (min(added), run, runs[0])
            raise ValueError(f"different questions: {owner.name} has {example!r}, {without.name} has not")
        unjudged = [item for item, value in by_item.items() if np.isnan(value)]
        if unjudged:
            raise ValueError(f"{run.name}: {len(unjudged)} questions without a verdict, such as {unjudged[0]!r}")
        rows.append([by_item[item] for item in first.items])
    return np.array(rows), first.items


def _means(runs: Sequence[ComparedRun], metric: str) -> Floats:
    return np.array([[_last(run, metric)[1]] for run in runs])


# --------------------------------------------------------------------------------------------------------- two groups


def _difference(group: Group, reference: Group, level: float) -> Difference:
    def refused(note: str) -> Difference:
        return Difference(group.name, reference.name, None, note)

    for one in (group, reference):
        if not one.finished:
            return refused(f"not compared: {one.name} has no finished run")
    metric = metric_of([*group.finished, *reference.finished])
    if not metric:
        return refused("not compared: no mean@k that all runs have")
    try:
        first, second = _method(group, metric), _method(reference, metric)
        by_question = ALL_QUESTIONS not in (*first.items, *second.items)
        if not by_question:
            _check_validation_data([*reference.finished, *group.finished])
            first, second = _method(group, metric, by_question=False), _method(reference, metric, by_question=False)
        seeds = min(len(first.seeds), len(second.seeds))
        if seeds < 2 and not by_question:
            return refused("not compared: a single run, and right answers by question are not known")
        comparison = compare(
            first,
            second,
            population="items" if seeds < 2 else "seeds and items" if by_question else "seeds",
            pairing="paired" if set(first.seeds) == set(second.seeds) else "unpaired",
            level=level,
        )
    except ValueError as error:
        return refused(f"refused as paired: {error}")
    return Difference(group.name, reference.name, comparison, _note(group, reference, metric))


def _method(group: Group, metric: str, *, by_question: bool = True) -> MethodRuns:
    runs = group.finished
    if by_question:
        accuracy_SP, items = accuracies(runs, metric)
    else:
        accuracy_SP, items = _means(runs, metric), (ALL_QUESTIONS,)
    # A run whose seed nobody recorded is paired with none.
    seeds = [f"{group.name}: {run.name}" if run.seed is None else run.seed for run in runs]
    return MethodRuns(group.name, accuracy_SP, items, int(metric.partition("@")[2]), seeds)


def _check_validation_data(runs: Sequence[ComparedRun]) -> None:
    """Without answers by question the configuration says what the questions were, if it says it."""
    seen: dict[str, tuple[str, str]] = {}
    for run in runs:
        if run.validation_data is None:
            continue
        key, value = run.validation_data
        name, before = seen.setdefault(key, (run.name, value))
        if value != before:
            raise ValueError(f"different questions: {name} has {key}={before}, {run.name} has {value}")


def _note(group: Group, reference: Group, metric: str) -> str:
    steps = [{_last(run, metric)[0] for run in one.finished} for one in (group, reference)]
    if steps[0] == steps[1] and len(steps[0]) == 1:
        return ""
    mine, theirs = (", ".join(map(str, sorted(found))) for found in steps)
    return f"not at the same step: {group.name} at {mine}, {reference.name} at {theirs}"
