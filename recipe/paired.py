"""Comparison of two methods on the same items: difference, interval, p-values and a verdict.

Items are always paired: a difference is taken item by item, so that an item that is hard for both cancels out. Seeds
are paired where runs of one seed share something (initial weights, order of the data), and unpaired otherwise.

Shapes: S seeds, P items. Accuracies and differences are shares (0.01 is one percentage point).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from recipe.intervals import (
    Floats,
    Interval,
    Population,
    VariancePart,
    accuracy_matrix,
    half_width,
    item_part,
    joint_parts,
    seed_part,
)
from recipe.permutation import label_p_value, sign_flip_p_value

Pairing: TypeAlias = Literal["paired", "unpaired"]
Verdict: TypeAlias = Literal["yes", "no", "not resolved"]


@dataclass(frozen=True, eq=False)
class MethodRuns:
    """Evaluations of one method's runs.

    Attributes:
        name: of the method, for messages.
        accuracy_SP: [S, P] accuracy of each run on each item; NaN where an evaluation has no result (yet).
        items: [P] identifiers, no two equal.
        samples: k, the samples behind each accuracy.
        seeds: [S] of the runs, no two equal.
    """

    name: str
    accuracy_SP: ArrayLike
    items: Sequence[Hashable]
    samples: int
    seeds: Sequence[int]


@dataclass(frozen=True)
class Comparison:
    """Method A against method B.

    Attributes:
        difference: A - B; the interval's population is the one asked for.
        pairing: of the seeds.
        p_items: of no difference, by permutation over items for these runs; None with a single item.
        p_seeds: the same over seeds for these items; None with a single seed.
        claim: in words.
        verdict: "yes" where the whole interval lies above delta, "no" where none of it does, else "not resolved".
    """

    difference: Interval
    pairing: Pairing
    p_items: float | None
    p_seeds: float | None
    claim: str
    verdict: Verdict


def compare(
    first: MethodRuns,
    second: MethodRuns,
    *,
    delta: float = 0.0,
    population: Population = "seeds and items",
    pairing: Pairing = "paired",
    level: float = 0.95,
    permutations: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Is ``first`` better than ``second`` by more than ``delta``?

    The items of ``second``, and its seeds where paired, are brought into the order of ``first``.

    Args:
        delta: least difference of interest, in [-1, 1].
        population: what the interval speaks about, see :mod:`recipe.intervals`.
        pairing: of the seeds.
        level: of confidence; the chance of a wrong "yes" is at most about (1 - level) / 2.
        permutations, seed: see :mod:`recipe.permutation`.

    Raises:
        ValueError: different items, different k, different seeds where paired, a run without finished evaluation,
            too few seeds or items for the population, or a bad setting.
    """
    if population not in ("seeds", "items", "seeds and items"):
        raise ValueError(f'population must be "seeds", "items" or "seeds and items", found {population!r}')
    if pairing not in ("paired", "unpaired"):
        raise ValueError(f'pairing must be "paired" or "unpaired", found {pairing!r}')
    if not -1 <= delta <= 1:
        raise ValueError(f"delta is a difference of shares and must lie in [-1, 1], found {delta!r}")
    first_SP, second_SP = _aligned(first, second, pairing)
    groups = [first_SP - second_SP] if pairing == "paired" else [first_SP, second_SP]
    by_item_P = first_SP.mean(axis=0) - second_SP.mean(axis=0)
    seeds = min(len(first_SP), len(second_SP))

    value = float(by_item_P.mean())
    half = float(half_width(_parts(groups, by_item_P, population), level))
    difference = Interval(
        value, max(-1.0, value - half), min(1.0, value + half), population, seeds, len(by_item_P), level
    )
    p_items = p_seeds = None
    if len(by_item_P) > 1:
        p_items = sign_flip_p_value(by_item_P, permutations=permutations, seed=seed)
    if seeds > 1:
        means = [values_SP.mean(axis=1) for values_SP in groups]
        test = sign_flip_p_value if pairing == "paired" else label_p_value
        p_seeds = test(*means, permutations=permutations, seed=seed)
    return Comparison(
        difference=difference,
        pairing=pairing,
        p_items=p_items,
        p_seeds=p_seeds,
        claim=f"{first.name} > {second.name}" + (f" by more than {delta:g}" if delta else ""),
        verdict=verdict(difference, delta),
    )


def verdict(difference: Interval, delta: float = 0.0) -> Verdict:
    """The answer to "the difference is larger than delta" by an interval."""
    if difference.low > delta:
        return "yes"
    return "no" if difference.high <= delta else "not resolved"


def _parts(groups: Sequence[Floats], by_item_P: Floats, population: Population) -> list[VariancePart]:
    if population == "items":
        return [item_part(by_item_P)]
    if population == "seeds":
        return [seed_part(groups)]
    return joint_parts(groups)


# ------------------------------------------------------------------------------------------------------------- checks


def _aligned(first: MethodRuns, second: MethodRuns, pairing: Pairing) -> tuple[Floats, Floats]:
    first_SP, second_SP = _matrix(first), _matrix(second)
    if first.samples != second.samples:
        raise ValueError(
            f"different k: {first.name} has {first.samples} samples an item, {second.name} has {second.samples}"
        )
    second_SP = second_SP[:, _order("items", first.name, first.items, second.name, second.items)]
    if pairing == "paired":
        second_SP = second_SP[_order("seeds", first.name, first.seeds, second.name, second.seeds)]
    return first_SP, second_SP


def _order(kind: str, name: str, wanted: Sequence[Hashable], other_name: str, found: Sequence[Hashable]) -> list[int]:
    place = {one: index for index, one in enumerate(found)}
    known = set(wanted)
    missing = [one for one in wanted if one not in place]
    added = [one for one in found if one not in known]
    if missing or added:
        example, owner, without = (missing[0], name, other_name) if missing else (added[0], other_name, name)
        raise ValueError(
            f"different {kind}: {owner} has {example!r}, {without} has not "
            f"({len(missing)} only in {name}, {len(added)} only in {other_name})"
        )
    return [place[one] for one in wanted]


def _matrix(runs: MethodRuns) -> Floats:
    found = np.asarray(runs.accuracy_SP, dtype=np.float64)
    expected = (len(runs.seeds), len(runs.items))
    if found.shape != expected:
        raise ValueError(f"{runs.name}: expected accuracies of shape {list(expected)}, found {list(found.shape)}")
    for kind, names in (("seed", runs.seeds), ("item", runs.items)):
        if len(set(names)) < len(names):
            twice = next(one for index, one in enumerate(names) if one in names[:index])
            raise ValueError(f"{runs.name}: {kind} {twice!r} is there twice")
    unfinished_S = np.isnan(found).sum(axis=1) if found.size else np.zeros(0)
    for seed, count in zip(runs.seeds, unfinished_S, strict=False):
        if count:
            raise ValueError(
                f"{runs.name}, seed {seed}: evaluation not finished, {count} of {expected[1]} items without accuracy"
            )
    try:
        return accuracy_matrix(found)
    except ValueError as error:
        raise ValueError(f"{runs.name}: {error}") from None
