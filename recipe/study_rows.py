"""Results of a study: one JSON file per finished run, the cost of what is left, and the table."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from recipe.console_format import format_seconds
from recipe.run_files import RunFiles, as_number, to_plain
from recipe.study_conditions import sequences_of
from recipe.study_file import Study, StudyRun
from recipe.study_items import pack_items, write_questions
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError

PATHS = ("report", "stages")  # of a summary: they hold paths
_VALIDATION = re.compile(r"val/(mean|maj|pass)@(\d+)")


def row_path(results: Path, study: Study, run: StudyRun) -> Path:
    """Where the row of a run is: with the study that it belongs to."""
    return results / (run.owner.study if run.owner else study.name) / f"{run.run_id}.json"


def read_rows(results: Path, study: Study) -> dict[str, dict[str, Any]]:
    """Rows that exist, by run id, each under this study's name for its entry.

    Raises:
        ConfigError: a file that is no row.
    """
    rows: dict[str, dict[str, Any]] = {}
    for run in study.runs:
        path = row_path(results, study, run)
        if not path.exists():
            continue
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            if row["run_id"] != run.run_id or not isinstance(row["final"], dict):
                raise KeyError("run_id")
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path} is not the row of a finished run; remove it to run it again") from None
        rows[run.run_id] = {**row, "entry": run.entry}
    return rows


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Writes a row in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(to_plain(row, "row"), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def make_row(
    run: StudyRun,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    seconds: float,
    where: Mapping,
    validations: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The row of a finished run.

    Args:
        summary: what the run returned; its paths are left out, they mean nothing elsewhere.
        records: its metrics.
        where: versions, machine and commit.
        validations: right answers by question; the row has none where they are empty.
        settings: see :func:`recipe.study_conditions.row_settings`; the row has none where they are not known.
    """
    curve = {
        str(record["step"]): metrics
        for record in records
        if (metrics := {key[4:]: value for key, value in record.items() if _VALIDATION.fullmatch(key)})
    }
    last = dict(records[-1]) if records else {}
    items, sequences = pack_items(validations), sequences_of(records)
    return {
        "run_id": run.run_id,
        "entry": run.entry,
        "method": summary.get("method"),
        "seed": run.seed,
        "overrides": list(run.overrides),
        "summary": {key: value for key, value in summary.items() if key not in PATHS},
        "curve": curve,
        "final": {**last, **{f"val/{key}": value for key, value in (list(curve.values()) or [{}])[-1].items()}},
        **({"items": items} if items else {}),
        **({"settings": settings} if settings else {}),
        **({"sequences": sequences} if sequences is not None else {}),
        "seconds": round(seconds, 1),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        **where,
    }


def keep_run(
    path: Path,
    run: StudyRun,
    summary: Mapping[str, Any],
    folder: Path,
    seconds: float,
    where: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Makes the row of the finished run in ``folder`` and writes it, with the questions that it was validated on."""
    files = RunFiles(folder, tensorboard=False)
    validations = files.read_validations()
    row = make_row(run, summary, files.read_metrics(), seconds, where, validations, settings)
    if validations:
        write_questions(path.parent, validations[0]["items"])
    write_row(path, row)
    return row


# ------------------------------------------------------------------------------------------------------------ the cost


def expected_seconds(run: StudyRun, rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """What a run takes: measured on rows of its entry, as declared, or measured on any row; None where unknown."""
    own = [row["seconds"] for row in rows.values() if row["entry"] == run.entry]
    if own:
        return statistics.fmean(own)
    if run.expected_seconds is not None:
        return run.expected_seconds
    return statistics.fmean(row["seconds"] for row in rows.values()) if rows else None


@dataclass(frozen=True)
class Cost:
    """What runs take one after the other: seconds of those whose time is known, and how many others there are."""

    seconds: float = 0.0
    unknown: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.unknown + other.unknown)

    def __str__(self) -> str:
        parts = [f"about {format_seconds(self.seconds)}"] if self.seconds or not self.unknown else []
        parts += [f"{self.unknown} runs of unknown time (set expected_seconds)"] if self.unknown else []
        return " and ".join(parts)


def cost_of(runs: Sequence[StudyRun], rows: Mapping[str, Mapping[str, Any]]) -> Cost:
    """Of these runs, see :func:`expected_seconds`."""
    seconds = [expected_seconds(run, rows) for run in runs]
    return Cost(sum(one for one in seconds if one is not None), seconds.count(None))


def cost_lines(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The grid and what it costs, for a person; of rows of other studies, how many there are."""
    runs = study.own_runs
    done = sum(run.run_id in rows for run in runs)
    lines = [f"study {study.name}: {len(runs)} runs, {done} done, {len(runs) - done} to do"]
    width = max((len(run.run_id) for run in runs), default=0)
    common = [item for item in runs[0].overrides if all(item in run.overrides for run in runs)] if runs else []
    if common:
        lines.append(f"  every run: {' '.join(common)}")
    for run in runs:
        seconds = expected_seconds(run, rows)
        if run.run_id in rows:
            cost = f"done in {format_seconds(rows[run.run_id]['seconds'])}"
        else:
            cost = "time unknown" if seconds is None else f"about {format_seconds(seconds)}"
        own = " ".join(item for item in run.overrides if item not in common)
        lines.append(f"  {run.run_id:<{width}}  {cost:<20}  {own}".rstrip())
    lines.append(f"cost of what is left: {cost_of([run for run in runs if run.run_id not in rows], rows)}")
    for owner, shown in runs_by_owner(study).items():
        there = sum(run.run_id in rows for run in shown)
        lines.append(f"rows of study {owner}: {there} of {len(shown)}; its own file runs what is missing")
    return lines


def runs_by_owner(study: Study) -> dict[str, list[StudyRun]]:
    """The runs whose rows are other studies', by study, in the order of the file."""
    found: dict[str, list[StudyRun]] = {}
    for entry in study.entries:
        for run in study.runs:
            if run.entry == entry and run.owner is not None:
                found.setdefault(run.owner.study, []).append(run)
    return found


# ----------------------------------------------------------------------------------------------------------- the table


def table(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: per entry the mean over seeds of mean@k and maj@k, with the range and the standard deviation.

    Columns are the largest k that any row has of each.
    """
    columns = [column for metric in ("mean", "maj") if (column := _largest(metric, rows))] or ["mean@8", "maj@8"]
    head = ["", *columns, "seeds", "s/step"]
    lines = [line(head), line(["---"] * len(head))]
    for entry in study.entries:
        own = [rows[run.run_id] for run in study.runs if run.entry == entry and run.run_id in rows]
        declared = sum(run.entry == entry for run in study.runs)
        cells = [_cell(own, lambda row, name=column: row["final"].get(f"val/{name}"), 3, True) for column in columns]
        speed = _cell(own, lambda row: row["summary"].get("seconds_per_step"), 2, False)
        seeds = f"{len(own)} of {declared}" if len(own) < declared else str(len(own))
        lines.append(line([entry, *cells, seeds, speed]))
    return "\n".join(lines)


def _largest(metric: str, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    matches = [match for row in rows.values() for key in row["final"] if (match := _VALIDATION.fullmatch(key))]
    found = [int(match[2]) for match in matches if match[1] == metric]
    return f"{metric}@{max(found)}" if found else None


def _cell(
    rows: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], Any], digits: int, spread: bool
) -> str:
    values = [value for row in rows if (value := as_number(read(row))) is not None]
    if not values:
        return "—"
    text = f"{statistics.fmean(values):.{digits}f}"
    if spread and len(values) > 1:
        text += f" ({min(values):.{digits}f}–{max(values):.{digits}f}, std {statistics.stdev(values):.{digits}f})"
    return text


def line(cells: Sequence[str]) -> str:
    """A row of a markdown table; bars inside a cell are escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    return "\n".join([line(head), line(["---"] * len(head)), *(line(cells) for cells in body)])
