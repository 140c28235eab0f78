"""The page of a study, from its rows: `python -m recipe.study FILE --page docs/results/NAME.md`.

State and cost of what was not run, accuracy with intervals, the declared questions with their answers, pictures beside
the page, and of every run its command, versions, machine and commit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.console_format import format_seconds
from recipe.intervals import Interval
from recipe.study_accuracy import EntryAccuracy, entry_accuracy, rows_of
from recipe.study_chart import study_svg
from recipe.study_conditions import Conditions, budget_text
from recipe.study_curves import curves_svg
from recipe.study_file import Study, StudyRun
from recipe.study_page_questions import questions_text
from recipe.study_page_runs import conditions_text, known_conditions, mean_of, runs_text
from recipe.study_rows import cost_of, expected_seconds, markdown_table, runs_by_owner
from verl_ext.atomic import write_atomically

Rows = Mapping[str, Mapping[str, Any]]


def write_page(study: Study, rows: Rows, file: Path, results: Path, page: Path) -> list[Path]:
    """Writes the page and its pictures; returns what was written.

    Args:
        file: the declaration, for the command.
        results: folder of the studies' rows.
        page: the markdown file; the pictures are named after it.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    written = []
    pictures = {}
    if rows:
        pictures["after training"] = (page.with_suffix(".svg"), study_svg(study, rows))
        drawn = curves_svg(study, rows)
        if drawn is not None:
            pictures["learning curves"] = (page.with_name(f"{page.stem}_curves.svg"), drawn)
    for path, text in pictures.values():
        write_atomically(path, text)
        written.append(path)
    names = {label: path.name for label, (path, _) in pictures.items()}
    write_atomically(page, page_text(study, rows, file, results, page, names))
    return [page, *written]


def page_text(
    study: Study, rows: Rows, file: Path, results: Path, page: Path, pictures: Mapping[str, str] | None = None
) -> str:
    """The markdown; ``pictures`` by label, as file names beside the page."""
    folder = results / study.name
    stale = sorted(path.stem for path in folder.glob("*.json") if path.stem not in {r.run_id for r in study.runs})
    names = [*[study.name] * bool(study.own_runs), *runs_by_owner(study)]
    folders = ", ".join(f"`{shown_path(results / name)}/`" for name in names)
    conditions, unknown = known_conditions(rows)
    parts = [
        f"# Study {study.name}",
        *[study.about] * bool(study.about),
        f"Made by `python -m recipe.study {shown_path(file)} --page {shown_path(page)}` from the rows in "
        f"{folders}; not written by hand. What the columns and answers mean: "
        f"[evaluation]({_to_docs(page)}evaluation.md), [studies]({_to_docs(page)}studies.md).",
        _state(study, rows),
        *["\n".join(f"* {one}" for one in study.remarks)] * bool(study.remarks),
        *([_section("Questions", questions_text(study, rows, folder, conditions))] if study.questions else []),
        _section("Accuracy", _accuracy(study, rows, folder, conditions)),
        *[f"![{label}]({name})" for label, name in (pictures or {}).items()],
    ]
    left = [run for run in study.runs if run.run_id not in rows]
    if left:
        parts.append(_section("Not run", _not_run(study, left, rows)))
    if rows:
        parts.append(_section("Conditions", conditions_text(study, rows, conditions, unknown)))
        parts.append(_section("Runs", runs_text(study, rows)))
    if stale:
        parts.append(
            _section("Rows of another declaration", "Not used above: " + ", ".join(f"`{one}`" for one in stale) + ".")
        )
    return "\n\n".join(parts) + "\n"


def shown_path(path: Path) -> str:
    """A path as a user would type it in the repository's root; never one of this machine's own."""
    absolute = path.absolute()
    return os.path.relpath(absolute) if absolute.is_relative_to(Path.cwd()) else path.name


def _to_docs(page: Path) -> str:
    """From the page to the folder docs/."""
    parents = page.absolute().parents
    docs = next((parent for parent in parents if parent.name == "docs"), None)
    return "" if docs is None else os.path.relpath(docs, page.absolute().parent) + "/"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _state(study: Study, rows: Rows) -> str:
    done, all_of = len(rows), len(study.runs)
    seeds = sorted({run.seed for run in study.runs})
    plural = "s" * (len(seeds) > 1)
    text = f"{done} of {all_of} runs are finished ({len(study.entries)} entries, {len(seeds)} seed{plural})."
    if len(study.own_runs) < all_of:
        text += f" {len(study.own_runs)} of the runs are this study's own, the others those of the studies named."
    if done < all_of:
        text += " What was not run stands below as such, with its cost."
    return text


# ------------------------------------------------------------------------------------------------------------ accuracy


def _accuracy(study: Study, rows: Rows, folder: Path, conditions: Mapping[str, Conditions]) -> str:
    intervals = ["95%, other seeds and questions", "95%, other seeds"]
    head = ["", "seeds", "before", "after", *intervals, "maj", "samples", "s/step"]
    parts, notes, metrics = [], [], set()
    for group in dict.fromkeys(study.groups.values()):
        body = []
        for entry in [one for one in study.entries if study.groups[one] == group]:
            cells, metric, note = _accuracy_cells(study, rows, entry, folder, conditions)
            body.append(cells)
            metrics |= {metric} - {""}
            notes += [f"* {entry}: {note}"] * bool(note)
        parts += [f"### {group}"] * bool(group) + [markdown_table(head, body)]
    said = ", ".join(sorted(metrics)) or "mean@k"
    legend = (
        f"Before and after: {said} of the first and the last validation, mean over seeds. Intervals: for another "
        "training run on other questions of the same kind, and for another training run on these questions. maj: "
        "majority answer, with the interval over seeds. Samples: see Conditions. — : the rows do not allow it (a "
        "single seed, no counts by question)."
    )
    return "\n\n".join([*parts, legend, *["\n".join(notes)] * bool(notes)])


def _accuracy_cells(
    study: Study, rows: Rows, entry: str, folder: Path, conditions: Mapping[str, Conditions]
) -> tuple[list[str], str, str]:
    """A line of the table, the metric with its k, and why its runs cannot be put together ("" where they can)."""
    own = rows_of(study, rows, entry)
    declared = sum(run.entry == entry for run in study.runs)
    seeds = str(declared) if len(own) == declared else f"{len(own)} of {declared}"
    if not own:
        return [entry, seeds, *["not run"] * 4, "", "", ""], "", ""
    before = mean_of(own, lambda row: row["summary"].get("before"), 3)
    speed = mean_of(own, lambda row: row["summary"].get("seconds_per_step"), 2)
    known = [conditions[row["run_id"]] for row in own if row["run_id"] in conditions]
    samples = budget_text(known) if len(known) == len(own) else "not known"
    try:
        found = entry_accuracy(study, rows, entry, folder)
    except ValueError as error:
        return [entry, seeds, before, "refused", "", "", "", samples, speed], "", str(error)
    assert found is not None
    cells = [f"{found.accuracy_SP.mean():.3f}", *_intervals(found), _majority(study, rows, entry, folder)]
    return [entry, seeds, before, *cells, samples, speed], found.metric, ""


def _intervals(found: EntryAccuracy) -> list[str]:
    several = len(found.seeds) > 1
    joint = _span(found.interval("seeds and items")) if several and found.by_item else "—"
    return [joint, _span(found.interval("seeds")) if several else "—"]


def _majority(study: Study, rows: Rows, entry: str, folder: Path) -> str:
    try:
        found = entry_accuracy(study, rows, entry, folder, metric="maj")
    except ValueError:
        return "—"  # a verifier that names no answers has none to vote on
    assert found is not None
    mean = f"{found.accuracy_SP.mean():.3f}"
    return f"{mean} {_span(found.interval('seeds'))}" if len(found.seeds) > 1 else mean


def _span(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


# ------------------------------------------------------------------------------------------------------------- not run


def _not_run(study: Study, left: Sequence[StudyRun], rows: Rows) -> str:
    others = any(run.owner for run in study.runs)
    body = []
    for entry in study.entries:
        own = [run for run in left if run.entry == entry]
        if not own:
            continue
        seconds, owner = expected_seconds(own[0], rows), own[0].owner
        cost = "unknown" if seconds is None else f"{len(own)} × {format_seconds(seconds)}"
        runs_it = [f"`{owner.study if owner else study.name}`"] * others
        body.append([entry, ", ".join(str(run.seed) for run in own), cost, *runs_it])
    table = markdown_table(["", "seeds", "cost", *["study that runs it"] * others], body)
    return f"{table}\n\nTogether {cost_of(left, rows)}, on the machine of the rows or as declared."
