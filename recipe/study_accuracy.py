"""Accuracy of a study's entries, from their rows.

Where the rows hold right answers by question, an interval speaks about other seeds and other questions. Rows without
them (older ones, and maj@k, which counts cannot give) can only speak about other seeds on the same questions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipe.intervals import Floats, Interval, Population, over_items, over_seeds, over_seeds_and_items
from recipe.study_file import Study
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
