"""What the rows of a study say about its entries: accuracy with intervals, and answers to the declared questions.

Where the rows hold right answers by question, an interval speaks about other seeds and other questions. Rows without
them (older ones, and maj@k, which counts cannot give) can only speak about other seeds on the same questions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recipe.detectable import VarianceComponents, detectable_difference, power_of, variance_components
from recipe.intervals import Floats, Interval, Population, over_items, over_seeds, over_seeds_and_items
from recipe.paired import Comparison, MethodRuns, compare
from recipe.study_conditions import Conditions, evaluated_differently, trained_differently
from recipe.study_file import Study, StudyQuestion
from recipe.study_items import ItemCounts, read_question_ids, unpack_items

Row = Mapping[str, Any]

_AT = re.compile(r"(mean|maj|pass)@(\d+)")
# Two ways to add up the same shares differ by rounding only.
_ROUNDING = 1e-9


class Refused(ValueError):
    """Rows that cannot be compared; the message names the run and what is wrong with it."""


@dataclass(frozen=True, eq=False)
class EntryAccuracy:
    """One validation of an entry's finished runs.

    Attributes:
        metric: with its k, such as ``mean@16``.
        seeds: [S] of the runs.
        samples: k of the validation.
        accuracy_SP: [S, P] by question; [S, 1], the runs' means, where the rows have no counts by question.
        items: [P] names.
        by_item: whether the rows have counts by question.
    """

    entry: str
    metric: str
    step: int
    seeds: tuple[int, ...]
    samples: int
    accuracy_SP: Floats
    items: tuple[str, ...]
    by_item: bool

    @property
    def population(self) -> Population | None:
        """What an interval can speak about; None for a single run without counts by question."""
        if len(self.seeds) > 1:
            return "seeds and items" if self.by_item else "seeds"
        return "items" if self.by_item else None

    def interval(self, population: Population) -> Interval:
        """Of the accuracy. Raises ValueError where the rows do not allow it."""
        procedure = {"seeds": over_seeds, "items": over_items, "seeds and items": over_seeds_and_items}[population]
        return procedure(self.accuracy_SP)

    def only(self, seeds: Sequence[int]) -> EntryAccuracy:
        """The runs of these seeds."""
        kept = [self.seeds.index(seed) for seed in seeds]
        return EntryAccuracy(
            self.entry, self.metric, self.step, tuple(seeds), self.samples, self.accuracy_SP[kept], self.items,
            self.by_item,
        )  # fmt: skip


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


def rows_of(study: Study, rows: Mapping[str, Row], entry: str) -> list[Row]:
    """The finished runs of an entry, in the order of their seeds."""
    return [rows[run.run_id] for run in study.runs if run.entry == entry and run.run_id in rows]


def entry_accuracy(
    study: Study,
    rows: Mapping[str, Row],
    entry: str,
    folder: Path,
    *,
    metric: str = "mean",
    step: int | None = None,
) -> EntryAccuracy | None:
    """Accuracy of an entry's runs at a validation; None where no run is finished.

    Args:
        folder: of the study's rows, for the ids of the questions; other studies' folders lie beside it.
        metric: ``mean``, ``maj`` or ``pass@k``.
        step: None: the last.

    Raises:
        Refused: runs that were validated last at different steps (one is unfinished), not at this step, with different
            k or on different questions, k larger than the samples, or counts that do not give the row's own mean@k.
    """
    own = rows_of(study, rows, entry)
    if not own:
        return None
    step = _last_step(own) if step is None else step
    counts = [unpack_items(row, step) for row in own]
    by_item = metric != "maj" and all(one is not None for one in counts)
    ks = {row["run_id"]: _samples(row, step) for row in own}
    samples = _same("samples a question", ks)
    if by_item:
        digests = _same("questions", {row["run_id"]: one.questions for row, one in zip(own, counts, strict=True)})
        accuracy_SP = [_by_item(row, one, metric, step) for row, one in zip(own, counts, strict=True)]
        names = read_question_ids(_folder_of(study, entry, folder), digests)
        items = names or [f"question {number} of {digests}" for number in range(len(accuracy_SP[0]))]
    else:
        accuracy_SP = [[_whole(row, metric, step, samples)] for row in own]
        items = ["all questions"]
    return EntryAccuracy(
        entry,
        metric if metric.startswith("pass") else f"{metric}@{samples}",
        step,
        tuple(int(row["seed"]) for row in own),
        samples,
        np.asarray(accuracy_SP, dtype=np.float64),
        tuple(items),
        by_item,
    )


def _folder_of(study: Study, entry: str, folder: Path) -> Path:
    """Where an entry's rows lie."""
    owner = next(run.owner for run in study.runs if run.entry == entry)
    return folder if owner is None else folder.parent / owner.study


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


# ------------------------------------------------------------------------------------------------------- reading a row


def _last_step(own: Sequence[Row]) -> int:
    steps = {row["run_id"]: max((int(step) for step in row["curve"]), default=None) for row in own}
    last = max((step for step in steps.values() if step is not None), default=None)
    for run_id, step in steps.items():
        if step is None:
            raise Refused(f"run {run_id} has no validation")
        if step != last:
            raise Refused(
                f"run {run_id} is unfinished: it was validated last at step {step}, others of its entry at {last}; "
                "remove its row to run it again"
            )
    assert last is not None
    return last


def _samples(row: Row, step: int) -> int:
    """k of mean@k at a step."""
    curve = row["curve"].get(str(step))
    if curve is None:
        steps = ", ".join(row["curve"])
        raise Refused(f"run {row['run_id']} was not validated at step {step}; it was at {steps or 'no step'}")
    found = [int(match[2]) for key in curve if (match := _AT.fullmatch(key)) and match[1] == "mean"]
    if not found:
        raise Refused(f"run {row['run_id']} has no mean@k at step {step}: the verifier could judge no answer")
    return max(found)


def _same(what: str, values: Mapping[str, Any]) -> Any:
    first_id, first = next(iter(values.items()))
    for run_id, value in values.items():
        if value != first:
            raise Refused(f"different {what}: run {first_id} has {first}, run {run_id} has {value}")
    return first


def _by_item(row: Row, counts: ItemCounts, metric: str, step: int) -> tuple[float, ...]:
    own = row["curve"][str(step)].get(f"mean@{counts.samples}")
    if own is None or abs(counts.mean - own) > _ROUNDING:
        raise Refused(
            f"run {row['run_id']}, step {step}: its counts by question give mean@{counts.samples}={counts.mean:.6f}, "
            f"its validation {'none' if own is None else f'{own:.6f}'}; remove its row to run it again"
        )
    if metric == "mean":
        return counts.mean_P
    try:
        return counts.pass_P(int(metric.removeprefix("pass@")))
    except ValueError as error:
        raise Refused(f"run {row['run_id']}: {error}") from None


def _whole(row: Row, metric: str, step: int, samples: int) -> float:
    key = metric if metric.startswith("pass") else f"{metric}@{samples}"
    value = row["curve"][str(step)].get(key)
    if value is None:
        raise Refused(
            f"run {row['run_id']} has no {key} at step {step}; its validation has {samples} samples a question"
        )
    return float(value)
