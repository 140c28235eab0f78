"""Runs that differ only in their seed are one group: a method. And what differs between groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count

from recipe.compared_runs import ComparedRun
from verl_ext.config import ConfigError

LARGEST = 12  # colours that can be told apart
NOT_SET, BY_DEFAULT, UNKNOWN = "–", "(default)", "(not recorded)"


@dataclass(frozen=True)
class Group:
    """A method's runs.

    Attributes:
        name: for the page, no two equal.
        runs: in the order of seeds.
        mixed: keys, beside the seed, in which the runs differ; a group that was asked for may have some.
    """

    name: str
    runs: tuple[ComparedRun, ...]
    mixed: tuple[str, ...] = ()

    @property
    def finished(self) -> tuple[ComparedRun, ...]:
        """The runs that bands, numbers and differences are made of."""
        return tuple(run for run in self.runs if not run.unfinished)

    @property
    def unfinished(self) -> tuple[ComparedRun, ...]:
        """The others."""
        return tuple(run for run in self.runs if run.unfinished)

    @property
    def whole(self) -> bool:
        """Whether all settings of the runs are known, not only what their command line changed."""
        return all(run.whole for run in self.runs)


def group_runs(runs: Sequence[ComparedRun], wanted: Sequence[tuple[str, str]] = ()) -> list[Group]:
    """Groups in the order of their first run.

    Args:
        wanted: (group, pattern) pairs; a run goes to the first whose pattern (``*`` and ``?``) its name, label or path
            matches. Runs that match none are grouped by their settings.

    Raises:
        ConfigError: a pattern that matches nothing, two finished runs of one seed in a group, a name of an asked-for
            group that is taken, or more groups than colours.
    """
    asked: dict[str, list[ComparedRun]] = {}
    found: dict[tuple[object, ...], list[ComparedRun]] = {}
    order: list[list[ComparedRun]] = []
    matched: set[str] = set()
    for run in runs:
        place = next(((name, pattern) for name, pattern in wanted if _matches(run, pattern)), None)
        if place:
            matched.add(place[1])
            members = asked.setdefault(place[0], [])
        else:
            members = found.setdefault((run.whole, run.label, frozenset(run.settings.items())), [])
        if not members:
            order.append(members)
        members.append(run)
    for name, pattern in wanted:
        if pattern not in matched:
            names = ", ".join(run.name for run in runs[:8])
            raise ConfigError(f"--group {name}={pattern} takes no run; the runs are {names}")
    names = {id(members): name for name, members in asked.items()}
    names |= _names([members for members in order if id(members) not in names], set(names.values()))
    groups = [_group(names[id(members)], members) for members in order]
    if len(groups) > LARGEST:
        raise ConfigError(
            f"{len(groups)} groups of runs, at most {LARGEST} can be told apart on one page; "
            "give fewer runs, or put some together with --group NAME=PATTERN"
        )
    return groups


def _matches(run: ComparedRun, pattern: str) -> bool:
    # A run's own folder, given relative or whole, with or without the last slash.
    names = (run.name, run.label, str(run.where), str(run.where.resolve()))
    return any(fnmatchcase(name, pattern.rstrip("/")) for name in names)


def _group(name: str, runs: Sequence[ComparedRun]) -> Group:
    ordered = tuple(sorted(runs, key=lambda run: (run.seed is None, run.seed or 0)))
    seeds: dict[int, ComparedRun] = {}
    for run in ordered:
        if run.unfinished or run.seed is None:
            continue
        if run.seed in seeds:
            raise ConfigError(
                f"group {name} has seed {run.seed} twice: {seeds[run.seed].where} and {run.where}; "
                "leave one out, or put it into a group of its own with --group NAME=PATTERN"
            )
        seeds[run.seed] = run
    return Group(name, ordered, tuple(_different(ordered)))


def _different(runs: Sequence[ComparedRun]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def _names(unnamed: Sequence[list[ComparedRun]], taken: set[str]) -> dict[int, str]:
    """The label, where two groups share it with what tells them apart, and a number where even that is long."""
    names: dict[int, str] = {}
    for members in unnamed:
        first = members[0]
        rivals = [other[0] for other in unnamed if other[0].label == first.label]
        name = first.label
        keys = _different(rivals)
        # A value and those derived from it are one difference: the shortest key of equal columns speaks for them.
        columns: dict[tuple[str | None, ...], str] = {}
        for key in keys:
            column = tuple(run.settings.get(key) for run in rivals)
            if column not in columns or len(key) < len(columns[column]):
                columns[column] = key
        if columns:
            tells = [f"{key.rsplit('.', 1)[-1]} {first.settings.get(key, 'default')}" for key in columns.values()]
            name = f"{name}, {', '.join(tells)}" if len(", ".join(tells)) <= 40 else f"{name} ({first.name})"
        if name in taken:
            name = next(numbered for number in count(2) if (numbered := f"{name} #{number}") not in taken)
        taken.add(name)
        names[id(members)] = name
    return names


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all groups: key, and its value in each group.

    Rows of studies hold only what their command line set. Among rows a key that is not there had its default; beside
    run folders it is not known, and such a key is listed only where the values that are known differ.
    """
    everyone_whole = all(group.whole for group in groups)
    absent = NOT_SET if everyone_whole else BY_DEFAULT if not any(group.whole for group in groups) else UNKNOWN
    return _table(groups, lambda run: run.settings, absent)


def environment_differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """As :func:`differences`, for versions, machine and commit, which the rows of studies record."""
    return _table(groups, lambda run: run.environment, UNKNOWN)


def _table(
    groups: Sequence[Group], read: Callable[[ComparedRun], Mapping[str, str]], absent: str
) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for group in groups for run in group.runs for key in read(run))
    rows = []
    for key in keys:
        values = [list(dict.fromkeys(read(run).get(key, absent) for run in group.runs)) for group in groups]
        known = {value for found in values for value in found if value != UNKNOWN}
        if len(known) > 1:
            rows.append((key, [" / ".join(found) for found in values]))
    return rows
