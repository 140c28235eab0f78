"""The declaration of a study: a YAML file with a grid of runs, and the runs it stands for."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

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
QUESTION_KEYS = {
    "ask": "the claim in words",
    "first": "entry that is said to be better",
    "second": "entry that it is compared with; the same one with another step",
    "delta": "by more than this share (default 0)",
    "metric": "mean (default), maj, or pass@k",
    "step": "validation at this step (default: the last); of a method of several stages, the number of the model",
    "second_step": "the same for second, where it is another step",
    "pairing": "of the seeds: paired (default: equal seeds share the order of the data) or unpaired",
    "source": "who claims it, with the number",
    "claimed": "size of the claimed effect, a share: the page says how likely these runs would show one as large",
    "group": "heading under which the page puts the question",
}
ENTRY_KEYS = ("name", "overrides", "expected_seconds", "group", "rows")
# Set by the runner for every run.
RESERVED = ("run.seed", "run.output_dir")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_METRIC = re.compile(r"mean|maj|pass@[1-9][0-9]*")


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
class StudyQuestion:
    """A claim that the study can answer: is ``first`` better than ``second`` by more than ``delta``?

    Attributes:
        ask: the claim in words.
        delta: a difference of shares.
        metric: ``mean``, ``maj`` or ``pass@k``.
        step: of the validation; None: the last.
        second_step: of the validation of ``second``; None: that of ``first``, or the last.
        pairing: of the seeds, see :mod:`recipe.paired`.
        source: who claims it.
        claimed: the effect that is claimed, a share; None: no number.
        group: a heading.
    """

    ask: str
    first: str
    second: str
    delta: float = 0.0
    metric: str = "mean"
    step: int | None = None
    second_step: int | None = None
    pairing: Literal["paired", "unpaired"] = "paired"
    source: str = ""
    claimed: float | None = None
    group: str = ""


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
    _expect(isinstance(name, str) and _NAME.fullmatch(name), where, "name", name, "letters, digits, . _ and -")
    seeds = found.get("seeds", [0])
    whole = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    _expect(whole and len(set(seeds)) == len(seeds), where, "seeds", seeds, "different whole numbers from 0")
    base = _overrides(found.get("base", []), where, "base")
    expected = _seconds(found.get("expected_seconds"), where, "expected_seconds")
    entries = _entries(found, where)
    names = [entry.name for entry in entries]
    repeated = [entry for entry in names if names.count(entry) > 1]
    _expect(not repeated, where, "grid", repeated[:1], "a name of its own for every entry")
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
    _expect(isinstance(about, str), where, "about", about, "a sentence")
    texts = isinstance(remarks, list) and all(isinstance(one, str) for one in remarks)
    _expect(texts, where, "remarks", remarks, "a list of sentences")
    return Study(
        name,
        tuple(runs),
        _questions(found.get("questions", []), names, where),
        {entry.name: entry.group for entry in entries},
        about,
        tuple(remarks),
    )


def _rows_of_another(name: str, rows: Mapping[str, str], where: str, folder: Path | None) -> list[StudyRun]:
    """The runs of another study's entry, under this study's name for it."""
    if folder is None:
        raise ConfigError(f"{where}: entry {name} shows rows of study {rows['study']}; name the study that made them")
    other = read_study(folder / f"{rows['study']}.yaml", may_borrow=False)
    _expect(other.name == rows["study"], where, f"study of entry {name}", rows["study"], f"{other.name}, its own name")
    entry = rows.get("name", name)
    _expect(entry in other.entries, where, f"rows of entry {name}", entry, f"one of {', '.join(other.entries)}")
    owner = Owner(other.name, entry)
    return [replace(run, entry=name, owner=owner) for run in other.runs if run.entry == entry]


def _check_shown_once(runs: Sequence[StudyRun], where: str) -> None:
    """A row is one run's: shown under two names, it would look like two."""
    names: dict[str, str] = {}
    for run in runs:
        first = names.setdefault(run.run_id, run.entry)
        _expect(first == run.entry, where, f"entry {run.entry}", run.run_id, f"rows that {first} does not have")


def _questions(found: Any, entries: list[str], where: str) -> tuple[StudyQuestion, ...]:
    _expect(isinstance(found, list), where, "questions", found, "a list of mappings")
    questions = []
    for number, one in enumerate(found):
        key = f"questions[{number}]"
        _expect(isinstance(one, dict), where, key, one, f"a mapping with {', '.join(QUESTION_KEYS)}")
        unknown = [name for name in one if name not in QUESTION_KEYS]
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r} in {key}; allowed: {', '.join(QUESTION_KEYS)}")
        _expect(isinstance(one.get("ask"), str) and one["ask"], where, f"{key}.ask", one.get("ask"), "a sentence")
        for name in ("first", "second"):
            _expect(one.get(name) in entries, where, f"{key}.{name}", one.get(name), f"one of {', '.join(entries)}")
        made = StudyQuestion(**one)
        if made.first == made.second:
            steps = made.second_step is not None and made.second_step != made.step
            _expect(steps, where, f"{key}.second", made.second, "another entry than first, or another second_step")
            # A run is not independent of itself.
            _expect(made.pairing == "paired", where, f"{key}.pairing", made.pairing, "paired, for one entry")
        number_like = isinstance(made.delta, int | float) and not isinstance(made.delta, bool)
        _expect(number_like and -1 <= made.delta <= 1, where, f"{key}.delta", made.delta, "a share from -1 to 1")
        metric = isinstance(made.metric, str) and _METRIC.fullmatch(made.metric)
        _expect(metric, where, f"{key}.metric", made.metric, "mean, maj or pass@k with k from 1")
        for name, step in (("step", made.step), ("second_step", made.second_step)):
            whole = step is None or (type(step) is int and step >= 0)
            _expect(whole, where, f"{key}.{name}", step, "a whole number from 0")
        _expect(made.pairing in ("paired", "unpaired"), where, f"{key}.pairing", made.pairing, "paired or unpaired")
        for name, text in (("source", made.source), ("group", made.group)):
            _expect(isinstance(text, str), where, f"{key}.{name}", text, "a text")
        sized = made.claimed is None or (isinstance(made.claimed, float) and 0 < made.claimed <= 1)
        _expect(sized, where, f"{key}.claimed", made.claimed, "a share above 0, such as 0.032 for 3.2 points")
        questions.append(made)
    return tuple(questions)


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
    _expect(grid is None or (isinstance(grid, list) and grid), where, "grid", grid, KEYS["grid"])
    axes = found.get("axes")
    entries: list[_Entry] = []
    for number, entry in enumerate(grid or []):
        key = f"grid[{number}]"
        _expect(isinstance(entry, dict), where, key, entry, "{name, overrides}")
        unknown = [name for name in entry if name not in ENTRY_KEYS]
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r} in {key}; allowed: {', '.join(ENTRY_KEYS)}")
        name = entry.get("name")
        _expect(isinstance(name, str) and _NAME.fullmatch(name), where, f"{key}.name", name, "letters, digits, . _ -")
        group, rows = entry.get("group", ""), entry.get("rows")
        _expect(isinstance(group, str), where, f"{key}.group", group, "a text")
        if rows is not None:
            named = isinstance(rows, dict) and "study" in rows and set(rows) <= {"study", "name"}
            named = named and all(isinstance(one, str) and _NAME.fullmatch(one) for one in rows.values())
            _expect(named, where, f"{key}.rows", rows, "{study: NAME, name: ENTRY}; name where it is another one's")
            both = sorted({"overrides", "expected_seconds"} & set(entry))
            _expect(not both, where, f"{key}.rows", rows, f"without {', '.join(both)}, which that study declares")
            _expect(axes is None, where, "axes", axes, "no axes beside rows of another study")
        overrides = _overrides(entry.get("overrides", []), where, f"{key}.overrides")
        seconds = _seconds(entry.get("expected_seconds"), where, f"{key}.expected_seconds")
        entries.append(_Entry(name, overrides, seconds, group, rows))
    if axes is None:
        _expect(bool(entries), where, "grid", grid, "grid or axes")
        return entries
    good = isinstance(axes, dict) and axes and all(isinstance(values, list) and values for values in axes.values())
    _expect(good, where, "axes", axes, KEYS["axes"])
    combined = []
    for entry in entries or [_Entry("", [], None)]:
        for values in itertools.product(*axes.values()):
            settings = [f"{key}={_value(value)}" for key, value in zip(axes, values, strict=True)]
            labels = [f"{key.split('.')[-1]}={_value(value)}" for key, value in zip(axes, values, strict=True)]
            words = [entry.name, *labels] if entry.name else labels
            label = re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join(words)).replace("=", "_")
            overrides = entry.overrides + _overrides(settings, where, "axes")
            combined.append(replace(entry, name=label, overrides=overrides))
    return combined


def _value(value: Any) -> str:
    """A YAML value as Hydra reads it on the command line."""
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, bool | list) else str(value)


def _overrides(found: Any, where: str, key: str) -> list[str]:
    good = isinstance(found, list) and all(isinstance(item, str) for item in found)
    _expect(good, where, key, found, "a list of key=value")
    for item in found:
        name, equals, _ = item.partition("=")
        _expect(bool(equals) or item.startswith("~"), where, key, item, "key=value")
        if name.lstrip("+") in RESERVED:
            raise ConfigError(f"{where}: {key} sets {name}, which every run is given; use seeds and --outputs")
    return list(found)


def _seconds(found: Any, where: str, key: str) -> float | None:
    good = found is None or (isinstance(found, int | float) and not isinstance(found, bool) and found > 0)
    _expect(good, where, key, found, "a number above 0")
    return None if found is None else float(found)


def _expect(condition: Any, where: str, key: str, found: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{where}: {key} is {found!r}; allowed: {allowed}")
