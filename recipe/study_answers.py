"""Answers of a study's rows to its declared questions, and whether the entries can be compared at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from recipe.detectable import VarianceComponents, detectable_difference, power_of, variance_components
from recipe.paired import Comparison, MethodRuns, compare
from recipe.study_accuracy import EntryAccuracy, Refused, entry_accuracy, rows_of
from recipe.study_conditions import Conditions, evaluated_differently, trained_differently
from recipe.study_file import Study
from recipe.study_question import StudyQuestion

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A declared question and what the rows say.

    Attributes:
        verdict: ``yes``, ``no``, ``not resolved``; ``not run`` where an entry has no finished run; ``refused`` where
            its rows cannot be compared.
        comparison: None where there is none.
        metric: with its k.
        seeds, other_seeds: of the runs of first and second.
        blind_below: the smallest true difference beyond delta that as many seeds show with 80% power.
        power: chance that as many seeds show the claimed effect, were it true; None without a number.
        unequal: what the entries did not have in common beside the method (budget, starting model, training data).
        note: what the reader must know; why it was refused.
    """

    question: StudyQuestion
    verdict: Literal["yes", "no", "not resolved", "not run", "refused"]
    comparison: Comparison | None = None
    metric: str = ""
    seeds: tuple[int, ...] = ()
    other_seeds: tuple[int, ...] = ()
    blind_below: float | None = None
    power: float | None = None
    unequal: tuple[str, ...] = ()
    note: str = ""


def answer(
    study: Study,
    rows: Mapping[str, Row],
    question: StudyQuestion,
    folder: Path,
    conditions: Mapping[str, Conditions] | None = None,
) -> Answer:
    """The answer by the runs that are finished; with paired seeds, by the seeds that both entries have.

    Args:
        folder: see :func:`entry_accuracy`.
        conditions: by run id, as far as they are known. Entries that were evaluated differently are refused, those
            that were trained unequally are marked. None: not checked.
    """
    try:
        first, second = (
            entry_accuracy(study, rows, entry, folder, metric=question.metric, step=step)
            for entry, step in zip((question.first, question.second), _steps(question), strict=True)
        )
        found = _compare(question, first, second)
        if conditions is None or found.comparison is None or question.first == question.second:
            return found
        return _checked(study, rows, found, conditions)
    except ValueError as error:  # Refused, and what recipe.paired does not compare
        return Answer(question, "refused", note=str(error))


def _steps(question: StudyQuestion) -> tuple[int | None, int | None]:
    """The validations of first and second; None: the last."""
    return question.step, question.step if question.second_step is None else question.second_step


def _checked(study: Study, rows: Mapping[str, Row], found: Answer, conditions: Mapping[str, Conditions]) -> Answer:
    """The answer, marked where the entries were trained unequally. Raises Refused for different evaluations."""
    sides = ((found.question.first, found.seeds), (found.question.second, found.other_seeds))
    first, second = (
        [row["run_id"] for row in rows_of(study, rows, entry) if row["seed"] in seeds] for entry, seeds in sides
    )
    unknown = [run_id for run_id in (*first, *second) if run_id not in conditions]
    if unknown:
        note = f"whether budgets and evaluations are equal could not be checked: run {unknown[0]}'s are not known"
        return replace(found, note="; ".join(filter(None, (found.note, note))))
    steps = _steps(found.question)
    first, second = (
        [conditions[run_id].until(step) for run_id in side] for side, step in zip((first, second), steps, strict=True)
    )
    if different := evaluated_differently(first, second):
        raise Refused(different)
    return replace(found, unequal=tuple(trained_differently(first, second)))


def _compare(question: StudyQuestion, first: EntryAccuracy | None, second: EntryAccuracy | None) -> Answer:
    missing = [name for name, one in ((question.first, first), (question.second, second)) if one is None]
    if first is None or second is None:
        return Answer(question, "not run", note=f"no finished run of {' and '.join(missing)}")
    notes = []
    if question.pairing == "paired":
        common = [seed for seed in first.seeds if seed in second.seeds]
        if not common:
            return Answer(question, "not resolved", note="the entries have no finished seed in common")
        first, second = first.only(common), second.only(common)
    if first.by_item != second.by_item:
        first, second = (_without_items(one) for one in (first, second))
    if not first.by_item and question.metric != "maj":
        notes.append(
            "rows without counts by question, so the runs' means are compared and not question by question; that they "
            "are of the same questions is taken from the declaration"
        )
    population = min((first, second), key=lambda one: len(one.seeds)).population
    if population is None:
        return Answer(question, "not resolved", note="one seed: no interval")
    comparison = compare(
        *(_method_runs(one) for one in (first, second)),
        delta=question.delta,
        population=population,
        pairing=question.pairing,
    )
    if population == "items":
        notes.append("one seed: the interval speaks about other questions for these two runs, not about the methods")
    found = Answer(
        question, comparison.verdict, comparison, first.metric, first.seeds, second.seeds, note="; ".join(notes)
    )
    if population == "items":
        return replace(found, verdict="not resolved")
    components, items = _components(first, second, question.pairing)
    seeds = min(len(first.seeds), len(second.seeds))
    power = None
    if question.claimed is not None:
        power = power_of(question.claimed - question.delta, components, seeds, items, pairing=question.pairing)
    blind_below = detectable_difference(components, seeds, items, pairing=question.pairing)
    return replace(found, blind_below=blind_below, power=power)


def _method_runs(one: EntryAccuracy) -> MethodRuns:
    return MethodRuns(one.entry, one.accuracy_SP, one.items, one.samples, one.seeds)


def _without_items(one: EntryAccuracy) -> EntryAccuracy:
    means_SP = one.accuracy_SP.mean(axis=1, keepdims=True)
    return EntryAccuracy(
        one.entry, one.metric, one.step, one.seeds, one.samples, means_SP, ("all questions",), by_item=False
    )


def _components(
    first: EntryAccuracy, second: EntryAccuracy, pairing: Literal["paired", "unpaired"]
) -> tuple[VarianceComponents, int]:
    """The variances that these runs show, and the number of questions."""
    seeds = min(len(first.seeds), len(second.seeds))
    if first.by_item:
        differences_SP = first.accuracy_SP[:seeds] - second.accuracy_SP[:seeds]
        return variance_components(differences_SP), differences_SP.shape[1]
    means = [one.accuracy_SP[:, 0] for one in (first, second)]
    spread = (means[0] - means[1]).var(ddof=1) if pairing == "paired" else sum(one.var(ddof=1) for one in means)
    # These questions are not a sample of others: seeds alone vary, whatever the number of items.
    return VarianceComponents(float(spread), 0.0, 0.0), 2
