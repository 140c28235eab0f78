"""The declaration of a study: a YAML file with a grid of runs, and the runs it stands for."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from verl_ext.config import ConfigError

KEYS = {
    "name": "the study's name, a folder under the results",
    "seeds": "a list of whole numbers",
    "base": "overrides of every run, a list of key=value",
    "grid": "a list of {name, overrides}",
    "axes": "{key: [value, …]}; every combination of the values",
    "expected_seconds": "of one run, for the cost",
    "questions": "a list of {ask, first, second, delta, metric, step, pairing, source}, answered by --page",
}
QUESTION_KEYS = {
    "ask": "the claim in words",
    "first": "entry that is said to be better",
    "second": "entry that it is compared with",
    "delta": "by more than this share (default 0)",
    "metric": "mean (default), maj, or pass@k",
    "step": "validation at this step (default: the last)",
    "pairing": "of the seeds: paired (default: equal seeds share the order of the data) or unpaired",
    "source": "who claims it, with the number",
}
ENTRY_KEYS = ("name", "overrides", "expected_seconds")
# Set by the runner for every run.
RESERVED = ("run.seed", "run.output_dir")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_METRIC = re.compile(r"mean|maj|pass@[1-9][0-9]*")


@dataclass(frozen=True)
class StudyRun:
    """One run of the grid.

    Attributes:
        entry: name of its row in the table; the seeds of an entry are averaged.
        overrides: of the command line, without the seed.
        expected_seconds: as the file says, or None.
    """

    entry: str
    seed: int
    overrides: tuple[str, ...]
    expected_seconds: float | None = None

    @property
    def run_id(self) -> str:
        """Name of its row's file. Other overrides make another run, so that no stale row is taken for it."""
        digest = hashlib.sha256(json.dumps([self.overrides, self.seed]).encode()).hexdigest()[:8]
        return f"{self.entry}-seed{self.seed}-{digest}"


@dataclass(frozen=True)
class StudyQuestion:
    """A claim that the study can answer: is ``first`` better than ``second`` by more than ``delta``?

    Attributes:
        ask: the claim in words.
        delta: a difference of shares.
        metric: ``mean``, ``maj`` or ``pass@k``.
        step: of the validation; None: the last.
        pairing: of the seeds, see :mod:`recipe.paired`.
        source: who claims it.
    """

    ask: str
    first: str
    second: str
    delta: float = 0.0
    metric: str = "mean"
    step: int | None = None
    pairing: Literal["paired", "unpaired"] = "paired"
    source: str = ""


@dataclass(frozen=True)
class Study:
    """A declared study."""

    name: str
    runs: tuple[StudyRun, ...]
    questions: tuple[StudyQuestion, ...] = ()

    @property
    def entries(self) -> list[str]:
        """Names in the order of the file."""
        return list(dict.fromkeys(run.entry for run in self.runs))


def read_study(path: Path) -> Study:
    """The study of a file. Raises ConfigError with the file, the key, what was found and what is allowed."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return parse_study(found, str(path))


def parse_study(found: Any, where: str) -> Study:
    """As :func:`read_study`, from what the file holds."""
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
    names = [entry for entry, _, _ in entries]
    repeated = [entry for entry in names if names.count(entry) > 1]
    _expect(not repeated, where, "grid", repeated[:1], "a name of its own for every entry")
    # Seeds outermost: a study that is stopped has compared its entries on the seeds it finished.
    runs = [
        StudyRun(entry, seed, (*base, *overrides), own or expected)
        for seed in seeds
        for entry, overrides, own in entries
    ]
    return Study(name, tuple(runs), _questions(found.get("questions", []), names, where))


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
        _expect(one["first"] != one["second"], where, f"{key}.second", one["second"], "another entry than first")
        made = StudyQuestion(**one)
        number_like = isinstance(made.delta, int | float) and not isinstance(made.delta, bool)
        _expect(number_like and -1 <= made.delta <= 1, where, f"{key}.delta", made.delta, "a share from -1 to 1")
        metric = isinstance(made.metric, str) and _METRIC.fullmatch(made.metric)
        _expect(metric, where, f"{key}.metric", made.metric, "mean, maj or pass@k with k from 1")
        whole = made.step is None or (type(made.step) is int and made.step >= 0)
        _expect(whole, where, f"{key}.step", made.step, "a whole number from 0")
        _expect(made.pairing in ("paired", "unpaired"), where, f"{key}.pairing", made.pairing, "paired or unpaired")
        _expect(isinstance(made.source, str), where, f"{key}.source", made.source, "a text")
        questions.append(made)
    return tuple(questions)


def _entries(found: dict[str, Any], where: str) -> list[tuple[str, list[str], float | None]]:
    """Grid entries times axes: (name, overrides, expected seconds)."""
    grid = found.get("grid")
    _expect(grid is None or (isinstance(grid, list) and grid), where, "grid", grid, KEYS["grid"])
    entries: list[tuple[str, list[str], float | None]] = []
    for number, entry in enumerate(grid or []):
        key = f"grid[{number}]"
        _expect(isinstance(entry, dict), where, key, entry, "{name, overrides}")
        unknown = [name for name in entry if name not in ENTRY_KEYS]
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r} in {key}; allowed: {', '.join(ENTRY_KEYS)}")
        name = entry.get("name")
        _expect(isinstance(name, str) and _NAME.fullmatch(name), where, f"{key}.name", name, "letters, digits, . _ -")
        overrides = _overrides(entry.get("overrides", []), where, f"{key}.overrides")
        entries.append((name, overrides, _seconds(entry.get("expected_seconds"), where, f"{key}.expected_seconds")))
    axes = found.get("axes")
    if axes is None:
        _expect(bool(entries), where, "grid", grid, "grid or axes")
        return entries
    good = isinstance(axes, dict) and axes and all(isinstance(values, list) and values for values in axes.values())
    _expect(good, where, "axes", axes, KEYS["axes"])
    combined = []
    for name, overrides, own in entries or [("", [], None)]:
        for values in itertools.product(*axes.values()):
            settings = [f"{key}={_value(value)}" for key, value in zip(axes, values, strict=True)]
            labels = [f"{key.split('.')[-1]}={_value(value)}" for key, value in zip(axes, values, strict=True)]
            label = re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join([name, *labels] if name else labels)).replace("=", "_")
            combined.append((label, overrides + _overrides(settings, where, "axes"), own))
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
