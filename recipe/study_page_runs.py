"""On what the rows of a study's page rest: conditions of each entry; command, machine and versions of each run."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from recipe.console_format import format_seconds
from recipe.run_files import as_number
from recipe.study_accuracy import rows_of
from recipe.study_conditions import Conditions, budget_text, conditions
from recipe.study_file import Study
from recipe.study_rows import markdown_table
from verl_ext.config import ConfigError

Row = Mapping[str, Any]
Rows = Mapping[str, Row]

SOURCES = {
    "recorded": "recorded by the run",
    "counted": "counted over the steps",
    "last step": "rows of the last step × steps",
    "settings": "batch × rollouts × steps",
}


def known_conditions(rows: Rows) -> tuple[dict[str, Conditions], list[str]]:
    """Conditions by run id, and why those of others are not known."""
    found: dict[str, Conditions] = {}
    unknown: list[str] = []
    for run_id, row in rows.items():
        try:
            found[run_id] = conditions(row)
        except ConfigError as error:
            unknown.append(str(error))
    return found, unknown


def conditions_text(study: Study, rows: Rows, known: Mapping[str, Conditions], unknown: Sequence[str]) -> str:
    """One line an entry: seeds, steps, samples, learning rate, start, data and evaluation."""
    made = {
        entry: [known[row["run_id"]] for row in own]
        for entry in study.entries
        if (own := rows_of(study, rows, entry)) and all(row["run_id"] in known for row in own)
    }
    evaluations = _letters(_evaluation(run) for runs in made.values() for run in runs)
    head = ["", "seeds", "steps", "samples", "known from", "learning rate", "starts from", "trained on", "evaluation"]
    body = [
        [
            entry,
            ", ".join(str(row["seed"]) for row in rows_of(study, rows, entry)),
            _each(f"{run.steps}" for run in runs),
            budget_text(runs),
            _each(SOURCES[run.samples.source] for run in runs),
            _each(_learning_rate(run) for run in runs),
            _each(f"`{run.start}`" for run in runs),
            _each(", ".join(f"`{file}`" for file in run.train_files) for run in runs),
            _each(evaluations[_evaluation(run)] for run in runs),
        ]
        for entry, runs in made.items()
    ]
    old = sum(not run.recorded for runs in made.values() for run in runs)
    legend = (
        "Samples: sequences that training used; drawn in the run (with attempts, revisions and the teacher's half of "
        "pairs), replayed from the data, or drawn to measure pass rates. Not counted: what was drawn beforehand, for a "
        "teacher's own training or its texts."
    )
    if old:
        legend += (
            f" Learning rate, start, data and evaluation of {old} of {sum(map(len, made.values()))} runs are today's "
            "presets with the run's command line: their rows are older than the keeping of settings."
        )
    listed = [f"* evaluation {letter}: {_evaluation_words(json.loads(key))}" for key, letter in evaluations.items()]
    return "\n\n".join(
        [markdown_table(head, body), *["\n".join(listed)] * bool(listed), legend, *[f"* {one}" for one in unknown]]
    )


def _each(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts))


def _learning_rate(run: Conditions) -> str:
    rates = [f"{rate:g}" + (f" {name}" if len(run.learning_rates) > 1 else "") for name, rate in
             run.learning_rates.items()]  # fmt: skip
    last = run.last_learning_rate
    if last is not None and last not in run.learning_rates.values():
        rates.append(f"{last:g} in the last step")
    return ", ".join(rates)


def _evaluation(run: Conditions) -> str:
    return json.dumps(run.evaluation, sort_keys=True)


def _evaluation_words(found: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key.rsplit('.', 1)[-1] if 'val_kwargs' in key else key} {_plain(value)}" for key, value in found.items()
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict | bool) else f"{value}"


# ---------------------------------------------------------------------------------------------------------------- runs


def runs_text(study: Study, rows: Rows) -> str:
    """The command of every entry, and of every run its time, commit, machine and versions."""
    first = {entry: own[0] for entry in study.entries if (own := rows_of(study, rows, entry))}
    commands = "\n".join(f"{_command(row['overrides'])}   # {entry}" for entry, row in first.items())
    shown = [run for run in study.runs if run.run_id in rows]
    made = [rows[run.run_id] for run in shown]
    machines, versions = (_letters(_key(row, name) for row in made) for name in ("machine", "versions"))
    owners = len({run.owner.study if run.owner else study.name for run in study.runs}) > 1
    head = ["run", *["study"] * owners, "before", "after", "time", "date", "commit", "machine", "versions"]
    body = [
        [
            f"`{row['run_id']}`",
            *[run.owner.study if run.owner else study.name] * owners,
            mean_of([row], lambda one: one["summary"].get("before"), 3),
            mean_of([row], lambda one: one["summary"].get("after"), 3),
            format_seconds(row["seconds"]),
            str(row.get("date", "—"))[:10],
            f"`{_short_commit(row.get('commit'))}`",
            machines[_key(row, "machine")],
            versions[_key(row, "versions")],
        ]
        for run, row in zip(shown, made, strict=True)
    ]
    legend = [
        *(f"* machine {letter}: {_machine(json.loads(key))}" for key, letter in machines.items()),
        *(f"* versions {letter}: {_versions(json.loads(key))}" for key, letter in versions.items()),
    ]
    return "\n\n".join(
        [
            "One command runs what is missing (`python -m recipe.study FILE`); a single run, with its seed for `SEED`:",
            f"```\n{commands}\n```",
            markdown_table(head, body),
            "\n".join(legend),
        ]
    )


def mean_of(own: Sequence[Row], read: Callable[[Row], Any], digits: int) -> str:
    """Mean over rows of what they have of a number; a dash where none has it."""
    values = [value for row in own if (value := as_number(read(row))) is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else "—"


def _command(overrides: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "recipe.train", *overrides]) + " run.seed=SEED"


def _key(row: Row, name: str) -> str:
    return json.dumps(row.get(name), sort_keys=True)


def _letters(keys: Iterable[str]) -> dict[str, str]:
    """A letter for each machine, set of versions or evaluation, in the order of the runs."""
    found = dict.fromkeys(keys)
    return {key: chr(ord("A") + number) if number < 26 else str(number) for number, key in enumerate(found)}


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
