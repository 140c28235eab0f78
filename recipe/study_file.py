"""The declaration of a study: a YAML file with a grid of runs, and the runs it stands for."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from recipe.study_question import StudyQuestion, parse_questions
from recipe.study_values import expect, override_value, overrides_of, seconds_of
from verl_ext.config import ConfigError

KEYS = {
    "name": "the study's name, a folder under the results",
    "seeds": "a list of whole numbers",
    "base": "overrides of every run, a list of key=value",
    "grid": "a list of {name, overrides, expected_seconds, group}, or {name, rows, group} with another study's rows",
    "axes": "{key: [value, …]}; every combination of the values",
    "expected_seconds": "of one run, for the cost",
    "questions": "a list of mappings (keys below), answered by --page",
    "about": "what the study asks, in one sentence; for the index and the page",
    "remarks": "a list of sentences that a reader of the page must know",
}
ENTRY_KEYS = ("name", "overrides", "expected_seconds", "group", "rows")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Owner:
    """The study that a run belongs to, where it is not the one that shows it, and what it is called there."""

    study: str
    entry: str


@dataclass(frozen=True)
class StudyRun:
    """One run of the grid.

    Attributes:
        entry: name of its row in the table; the seeds of an entry are averaged.
        overrides: of the command line, without the seed.
        expected_seconds: as the file says, or None.
        owner: of a run whose row is another study's; None: this one's.
    """

    entry: str
    seed: int
    overrides: tuple[str, ...]
    expected_seconds: float | None = None
    owner: Owner | None = None

    @property
    def run_id(self) -> str:
        """Name of its row's file. Other overrides make another run, so that no stale row is taken for it."""
        digest = hashlib.sha256(json.dumps([self.overrides, self.seed]).encode()).hexdigest()[:8]
        return f"{self.owner.entry if self.owner else self.entry}-seed{self.seed}-{digest}"


@dataclass(frozen=True)
class Study:
    """A declared study.

    Attributes:
        groups: heading of every entry ("" without one), in the order of the file.
    """

    name: str
    runs: tuple[StudyRun, ...]
    questions: tuple[StudyQuestion, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def entries(self) -> list[str]:
        """Names in the order of the file."""
        return list(self.groups)

    @property
    def own_runs(self) -> tuple[StudyRun, ...]:
        """The runs whose rows are this study's; those of other studies are run by their own files."""
        return tuple(run for run in self.runs if run.owner is None)


def read_study(path: Path, *, may_borrow: bool = True) -> Study:
    """The study of a file; other studies whose rows it shows lie beside it.

    Raises:
        ConfigError: names the file, the key, what was found and what is allowed.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return parse_study(found, str(path), path.parent if may_borrow else None)


def parse_study(found: Any, where: str, folder: Path | None = None) -> Study:
    """As :func:`read_study`, from what the file holds; ``folder`` has the studies whose rows it may show."""
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected a mapping with the keys {', '.join(KEYS)}")
    unknown = [key for key in found if key not in KEYS]
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(KEYS)}")
    name = found.get("name")
    expect(isinstance(name, str) and _NAME.fullmatch(name), where, "name", name, "letters, digits, . _ and -")
    seeds = found.get("seeds", [0])
    whole = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    expect(whole and len(set(seeds)) == len(seeds), where, "seeds", seeds, "different whole numbers from 0")
    base = overrides_of(found.get("base", []), where, "base")
    expected = seconds_of(found.get("expected_seconds"), where, "expected_seconds")
    entries = _entries(found, where)
    names = [entry.name for entry in entries]
    repeated = [entry for entry in names if names.count(entry) > 1]
    expect(not repeated, where, "grid", repeated[:1], "a name of its own for every entry")
    runs: list[StudyRun] = []
    for entry in entries:
        if entry.rows is not None:
            runs += _rows_of_another(entry.name, entry.rows, where, folder)
        else:
            overrides, seconds = (*base, *entry.overrides), entry.expected_seconds or expected
            runs += [StudyRun(entry.name, seed, overrides, seconds) for seed in seeds]
    _check_shown_once(runs, where)
    # Seeds outermost: a study that is stopped has compared its entries on the seeds it finished.
    order = {seed: place for place, seed in enumerate(seeds)}
    runs.sort(key=lambda run: (order.get(run.seed, len(order)), run.seed if run.seed not in order else 0))
    about, remarks = found.get("about", ""), found.get("remarks", [])
    expect(isinstance(about, str), where, "about", about, "a sentence")
    texts = isinstance(remarks, list) and all(isinstance(one, str) for one in remarks)
    expect(texts, where, "remarks", remarks, "a list of sentences")
    return Study(
        name,
        tuple(runs),
        parse_questions(found.get("questions", []), names, where),
        {entry.name: entry.group for entry in entries},
        about,
        tuple(remarks),
    )


def _rows_of_another(name: str, rows: Mapping[str, str], where: str, folder: Path | None) -> list[StudyRun]:
    """The runs of another study's entry, under this study's name for it."""
    if folder is None:
        raise ConfigError(f"{where}: entry {name} shows rows of study {rows['study']}; name the study that made them")
    other = read_study(folder / f"{rows['study']}.yaml", may_borrow=False)
    expect(other.name == rows["study"], where, f"study of entry {name}", rows["study"], f"{other.name}, its own name")
    entry = rows.get("name", name)
    expect(entry in other.entries, where, f"rows of entry {name}", entry, f"one of {', '.join(other.entries)}")
    owner = Owner(other.name, entry)
    return [replace(run, entry=name, owner=owner) for run in other.runs if run.entry == entry]


def _check_shown_once(runs: Sequence[StudyRun], where: str) -> None:
    """A row is one run's: shown under two names, it would look like two."""
    names: dict[str, str] = {}
    for run in runs:
        first = names.setdefault(run.run_id, run.entry)
        expect(first == run.entry, where, f"entry {run.entry}", run.run_id, f"rows that {first} does not have")


@dataclass(frozen=True)
class _Entry:
    """As the file has it; ``rows``: study and, where it differs, name of the entry whose rows are shown."""

    name: str
    overrides: list[str]
    expected_seconds: float | None
    group: str = ""
    rows: Mapping[str, str] | None = None


def _entries(found: dict[str, Any], where: str) -> list[_Entry]:
    """Grid entries times axes."""
    grid = found.get("grid")
    expect(grid is None or (isinstance(grid, list) and grid), where, "grid", grid, KEYS["grid"])
    axes = found.get("axes")
    entries: list[_Entry] = []
    for number, entry in enumerate(grid or []):
        key = f"grid[{number}]"
        expect(isinstance(entry, dict), where, key, entry, "{name, overrides}")
        unknown = [name for name in entry if name not in ENTRY_KEYS]
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r} in {key}; allowed: {', '.join(ENTRY_KEYS)}")
        name = entry.get("name")
        expect(isinstance(name, str) and _NAME.fullmatch(name), where, f"{key}.name", name, "letters, digits, . _ -")
        group, rows = entry.get("group", ""), entry.get("rows")
        expect(isinstance(group, str), where, f"{key}.group", group, "a text")
        if rows is not None:
            named = isinstance(rows, dict) and "study" in rows and set(rows) <= {"study", "name"}
            named = named and all(isinstance(one, str) and _NAME.fullmatch(one) for one in rows.values())
            expect(named, where, f"{key}.rows", rows, "{study: NAME, name: ENTRY}; name where it is another one's")
            both = sorted({"overrides", "expected_seconds"} & set(entry))
            expect(not both, where, f"{key}.rows", rows, f"without {', '.join(both)}, which that study declares")
            expect(axes is None, where, "axes", axes, "no axes beside rows of another study")
        overrides = overrides_of(entry.get("overrides", []), where, f"{key}.overrides")
        seconds = seconds_of(entry.get("expected_seconds"), where, f"{key}.expected_seconds")
        entries.append(_Entry(name, overrides, seconds, group, rows))
    if axes is None:
        expect(bool(entries), where, "grid", grid, "grid or axes")
        return entries
    good = isinstance(axes, dict) and axes and all(isinstance(values, list) and values for values in axes.values())
    expect(good, where, "axes", axes, KEYS["axes"])
    combined = []
    for entry in entries or [_Entry("", [], None)]:
        for values in itertools.product(*axes.values()):
            settings = [f"{key}={override_value(value)}" for key, value in zip(axes, values, strict=True)]
            labels = [f"{key.split('.')[-1]}={override_value(value)}" for key, value in zip(axes, values, strict=True)]
            words = [entry.name, *labels] if entry.name else labels
            label = re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join(words)).replace("=", "_")
            overrides = entry.overrides + overrides_of(settings, where, "axes")
            combined.append(replace(entry, name=label, overrides=overrides))
    return combined
