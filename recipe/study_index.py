"""The list of all declared studies: what each asks, how many of its runs are finished, what the others would cost.

`python -m recipe.study --index docs/results/README.md`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.console_format import format_seconds
from recipe.study_file import Study, StudyRun, read_study
from recipe.study_page import shown_path
from recipe.study_rows import Cost, cost_of, expected_seconds, markdown_table, read_rows
from verl_ext.config import ConfigError

HEAD = ("study", "asks", "entries", "runs", "finished", "not run, and its cost", "page")


def index_text(folder: Path, results: Path, index: Path) -> str:
    """The markdown.

    Args:
        folder: of the studies' files.
        results: folder of the studies' rows.
        index: the file that the text is for; the pages are beside it.

    Raises:
        ConfigError: no study there, one that cannot be read, or a file that is no row.
    """
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ConfigError(f"{folder} holds no study (*.yaml)")
    studies = [(file, read_study(file)) for file in files]
    # Overviews, which show rows of others, come first.
    studies.sort(key=lambda one: (len(one[1].own_runs) == len(one[1].runs), one[1].name))
    body, declared, missing, total = [], 0, 0, Cost()
    for file, study in studies:
        rows = read_rows(results, study)
        left = [run for run in study.own_runs if run.run_id not in rows]
        declared, missing, total = declared + len(study.own_runs), missing + len(left), total + cost_of(left, rows)
        body.append(_line(file, study, rows, left, index))
    return (
        "\n\n".join(
            [
                "# Results",
                f"Made by `python -m recipe.study --index {shown_path(index)}` from the declarations in "
                f"`{shown_path(folder)}/` and the rows in `{shown_path(results)}/`; not written by hand. What a study "
                "is, and what its page says: [studies](../studies.md).",
                f"{declared - missing} of {declared} declared runs are finished. What was not run would take {total}, "
                "one run after the other on the machine of the rows or as declared. `python -m recipe.study FILE` runs "
                "what is missing of a study, with `--dry-run` it lists it.",
                markdown_table(HEAD, body),
            ]
        )
        + "\n"
    )


def _line(file: Path, study: Study, rows: Mapping[str, Any], left: Sequence[StudyRun], index: Path) -> list[str]:
    finished = f"{len(study.own_runs) - len(left)}"
    if shown := [run for run in study.runs if run.owner is not None]:
        finished += f", and {sum(run.run_id in rows for run in shown)} of {len(shown)} of other studies"
    page = index.with_name(f"{study.name}.md")
    return [
        f"[`{study.name}`]({os.path.relpath(file, index.parent)})",
        study.about,
        f"{len(study.entries)}",
        f"{len(study.own_runs)}",
        finished,
        _cost(left, rows),
        f"[page]({page.name})" if page.exists() else "not made",
    ]


def _cost(left: Sequence[StudyRun], rows: Mapping[str, Any]) -> str:
    """Such as "78 × 1 min 50 s: about 2 h 23 min"."""
    each = {expected_seconds(run, rows) for run in left}
    if not left:
        return ""
    times = f" × {format_seconds(each.pop())}" if len(each) == 1 and None not in each else " runs"
    return f"{len(left)}{times}: {cost_of(left, rows)}"
