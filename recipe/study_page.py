"""The page of a study, from its rows: `python -m recipe.study FILE --page docs/results/NAME.md`.

State and cost of what was not run, accuracy with intervals, the declared questions with their answers, pictures beside
the page, and of every run its command, versions, machine and commit.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.console_format import format_seconds
from recipe.intervals import Interval
from recipe.run_files import as_number
from recipe.study_answers import Answer, EntryAccuracy, answer, entry_accuracy, rows_of
from recipe.study_chart import study_svg
from recipe.study_curves import curves_svg
from recipe.study_file import Study, StudyRun
from recipe.study_rows import expected_seconds, line
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
    parts = [
        f"# Study {study.name}",
        f"Made by `python -m recipe.study {_shown(file)} --page {_shown(page)}` from the rows in "
        f"`{_shown(folder)}/`; not written by hand. What the columns and answers mean: "
        f"[evaluation]({_to_docs(page)}evaluation.md), [studies]({_to_docs(page)}studies.md).",
        _state(study, rows),
        *([_section("Questions", _questions(study, rows, folder))] if study.questions else []),
        _section("Accuracy", _accuracy(study, rows, folder)),
        *[f"![{label}]({name})" for label, name in (pictures or {}).items()],
    ]
    left = [run for run in study.runs if run.run_id not in rows]
    if left:
        parts.append(_section("Not run", _not_run(study, left, rows)))
    if rows:
        parts.append(_section("Runs", _runs(study, rows)))
    if stale:
        parts.append(
            _section("Rows of another declaration", "Not used above: " + ", ".join(f"`{one}`" for one in stale) + ".")
        )
    return "\n\n".join(parts) + "\n"


def _shown(path: Path) -> str:
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


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join([line(head), line(["---"] * len(head)), *(line(cells) for cells in body)])


def _state(study: Study, rows: Rows) -> str:
    done, all_of = len(rows), len(study.runs)
    seeds = sorted({run.seed for run in study.runs})
    text = f"{done} of {all_of} runs are finished ({len(study.entries)} entries, {len(seeds)} seeds)."
    if done < all_of:
        text += " What was not run stands below as such, with its cost."
    return text


# ------------------------------------------------------------------------------------------------------------ accuracy


def _accuracy(study: Study, rows: Rows, folder: Path) -> str:
    head = ["", "seeds", "before", "after", "95%, other seeds and questions", "95%, other seeds", "maj", "s/step"]
    body, notes, metrics = [], [], set()
    for entry in study.entries:
        own = rows_of(study, rows, entry)
        declared = sum(run.entry == entry for run in study.runs)
        seeds = str(declared) if len(own) == declared else f"{len(own)} of {declared}"
        if not own:
            body.append([entry, seeds, *["not run"] * 4, "", ""])
            continue
        before = _mean(own, lambda row: row["summary"].get("before"), 3)
        speed = _mean(own, lambda row: row["summary"].get("seconds_per_step"), 2)
        try:
            found = entry_accuracy(study, rows, entry, folder)
            assert found is not None
            metrics.add(found.metric)
            cells = [f"{found.accuracy_SP.mean():.3f}", *_intervals(found)]
            cells.append(_majority(study, rows, entry, folder))
        except ValueError as error:
            cells = ["refused", "", "", ""]
            notes.append(f"* {entry}: {error}")
        body.append([entry, seeds, before, *cells, speed])
    said = ", ".join(sorted(metrics)) or "mean@k"
    legend = (
        f"Before and after: {said} of the first and the last validation, mean over seeds. Intervals: for another "
        "training run on other questions of the same kind, and for another training run on these questions. maj: "
        "majority answer, with the interval over seeds. — : the rows do not allow it (a single seed, no counts by "
        "question)."
    )
    return "\n\n".join([_table(head, body), legend, *(["\n".join(notes)] if notes else [])])


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


def _mean(own: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], Any], digits: int) -> str:
    values = [value for row in own if (value := as_number(read(row))) is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else "—"


def _span(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


# ----------------------------------------------------------------------------------------------------------- questions


def _questions(study: Study, rows: Rows, folder: Path) -> str:
    answers = [answer(study, rows, question, folder) for question in study.questions]
    head = [
        "question",
        "answer",
        "difference",
        "95% interval",
        "about other",
        "p, seeds",
        "p, questions",
        "blind below",
    ]
    body = [_answer_cells(number, one) for number, one in enumerate(answers, 1)]
    legend = (
        "Difference: first minus second, in shares. Yes: the whole interval lies above the asked difference; no: none "
        "of it does. p: permutation tests of no difference, over seeds (for these questions) and over questions (for "
        "these runs). Blind below: a true difference smaller than this has less than 80% chance of a yes with as many "
        "seeds, by the variances seen here. Each question is tested on its own, without a correction for their number."
    )
    details = "\n".join(f"{number}. {_detail(one)}" for number, one in enumerate(answers, 1))
    return "\n\n".join([_table(head, body), details, legend])


def _answer_cells(number: int, one: Answer) -> list[str]:
    asked = f"{number}. {one.question.ask}"
    if one.comparison is None:
        return [asked, f"**{one.verdict}**", *[""] * 6]
    difference = one.comparison.difference
    return [
        asked,
        f"**{one.verdict}**",
        f"{difference.value:+.3f}",
        f"[{difference.low:+.3f}, {difference.high:+.3f}]",
        difference.population.replace("items", "questions"),
        _p_value(one.comparison.p_seeds),
        _p_value(one.comparison.p_items),
        "" if one.blind_below is None else f"{one.blind_below:.3f}",
    ]


def _p_value(p: float | None) -> str:
    return "—" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def _detail(one: Answer) -> str:
    question = one.question
    by = f" by more than {question.delta:g}" if question.delta else ""
    at = "" if question.step is None else f" at step {question.step}"
    text = f"`{question.first}` above `{question.second}`{by}, {one.metric or question.metric}{at}"
    if one.seeds:
        text += f", {question.pairing} seed{'s' * (len(one.seeds) > 1)} {_listed(one.seeds)}"
        text += f" against {_listed(one.other_seeds)}" if one.other_seeds != one.seeds else ""
    if question.source:
        text += f". Claim: {question.source}"
    return text + "." + (f" Note: {one.note}." if one.note else "")


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


# ---------------------------------------------------------------------------------------------------------------- runs


def _not_run(study: Study, left: Sequence[StudyRun], rows: Rows) -> str:
    body, total, unknown = [], 0.0, 0
    for entry in study.entries:
        own = [run for run in left if run.entry == entry]
        if not own:
            continue
        seconds = expected_seconds(own[0], rows)
        unknown += len(own) * (seconds is None)
        total += len(own) * (seconds or 0.0)
        cost = "unknown" if seconds is None else f"{len(own)} × {format_seconds(seconds)}"
        body.append([entry, ", ".join(str(run.seed) for run in own), cost])
    text = f"Together about {format_seconds(total)}" if total else "Together unknown"
    text += f", and {unknown} runs of unknown time" if unknown and total else ""
    return f"{_table(['', 'seeds', 'cost'], body)}\n\n{text}, on the machine of the rows or as declared."


def _runs(study: Study, rows: Rows) -> str:
    first = {entry: own[0] for entry in study.entries if (own := rows_of(study, rows, entry))}
    commands = "\n".join(f"{_command(row['overrides'])}   # {entry}" for entry, row in first.items())
    made = [rows[run.run_id] for run in study.runs if run.run_id in rows]
    machines, versions = _numbered(made, "machine"), _numbered(made, "versions")
    head = ["run", "before", "after", "time", "date", "commit", "machine", "versions"]
    body = [
        [
            f"`{row['run_id']}`",
            _mean([row], lambda one: one["summary"].get("before"), 3),
            _mean([row], lambda one: one["summary"].get("after"), 3),
            format_seconds(row["seconds"]),
            str(row.get("date", "—"))[:10],
            f"`{_short_commit(row.get('commit'))}`",
            machines[_key(row, "machine")],
            versions[_key(row, "versions")],
        ]
        for row in made
    ]
    legend = [
        *(f"* machine {letter}: {_machine(json.loads(key))}" for key, letter in machines.items()),
        *(f"* versions {letter}: {_versions(json.loads(key))}" for key, letter in versions.items()),
    ]
    return "\n\n".join(
        [
            "One command runs what is missing (`python -m recipe.study FILE`); a single run, with its seed for `SEED`:",
            f"```\n{commands}\n```",
            _table(head, body),
            "\n".join(legend),
        ]
    )


def _command(overrides: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "recipe.train", *overrides]) + " run.seed=SEED"


def _key(row: Mapping[str, Any], name: str) -> str:
    return json.dumps(row.get(name), sort_keys=True)


def _numbered(made: Sequence[Mapping[str, Any]], name: str) -> dict[str, str]:
    """A letter for each machine or set of versions, in the order of the runs."""
    keys = dict.fromkeys(_key(row, name) for row in made)
    return {key: chr(ord("A") + number) if number < 26 else str(number) for number, key in enumerate(keys)}


def _short_commit(commit: str | None) -> str:
    if commit is None:
        return "—"
    head, plus, changes = commit.partition("+")
    return head[:10] + plus + changes


def _machine(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "not recorded"
    gpus = ", ".join(found["gpus"]) if found["gpus"] else "no GPU"
    return f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, {gpus}"


def _versions(found: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items()) if found else "not recorded"
