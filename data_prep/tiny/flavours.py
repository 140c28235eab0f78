"""Flavours: mixtures of kinds of examples that a checkpoint is warm-started on.

To add one: write its kinds as functions ``(problem, rng, error_scale) -> Example`` and an entry in ``FLAVOURS``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from data_prep.tiny import contexts, format_contexts, revision_contexts
from data_prep.tiny.contexts import Example, Kind
from data_prep.tiny.formats import FORMATS, LETTERS
from data_prep.tiny.task import random_problem

LEVELS = (1, 2, 3, 4, 5, 6)
LETTER_WEIGHT = 4.0
"""One token of 28 is a letter; at weight 1, and with shuffled options, the model did not even learn to copy one."""


@dataclass(frozen=True)
class Flavour:
    """A mixture of kinds (with their shares), the tokens it needs beyond the common ones, and what it is for."""

    description: str
    kinds: dict[str, tuple[float, Kind]]
    formats: tuple[str, ...] = ()  # names of the answer formats; none: the answer in a box
    revises: bool = False  # whether it knows attempts, control phrases and revisions
    extra_pieces: tuple[str, ...] = ()
    token_weights: dict[str, float] = field(default_factory=dict)  # of tokens whose loss does not count once
    steps: int = 1400  # optimiser steps of its warm start


SHARES = {"plain": 0.46, "sibling": 0.30, "feedback": 0.16, "sibling_and_feedback": 0.08}
REVISION_SHARES = {
    "plain": 0.36,
    "sibling": 0.08,
    "tolerant_sibling": 0.08,
    "feedback": 0.06,
    "revise_right": 0.14,
    "revise_wrong": 0.28,
}


def _of_formats(description: str, names: tuple[str, ...]) -> Flavour:
    """The four kinds in their usual shares, every format as often as any other."""
    kinds = {
        f"{name}/{kind}": (SHARES[kind] / len(names), make)
        for name in names
        for kind, make in format_contexts.kinds_of(name).items()
    }
    return Flavour(
        description,
        kinds,
        names,
        extra_pieces=format_contexts.FORMAT_PIECES,
        token_weights=dict.fromkeys(LETTERS, LETTER_WEIGHT),
        steps=1600,
    )


FLAVOURS: dict[str, Flavour] = {
    "plain": Flavour(
        description="an answer in a box",
        kinds={kind: (SHARES[kind], make) for kind, make in contexts.KINDS.items()},
    ),
    "multiple_choice": _of_formats("four options, a letter as answer", ("multiple_choice",)),
    "tool_call": _of_formats("two tools, a call as answer", ("tool_call",)),
    "formats": _of_formats("both of these in one checkpoint (no data set of its own)", tuple(FORMATS)),
    "revision": Flavour(
        description="an answer in a box, and revisions of attempts (the data are those of plain)",
        kinds={
            kind: (share, {**contexts.KINDS, **revision_contexts.KINDS}[kind])
            for kind, share in REVISION_SHARES.items()
        },
        revises=True,
        extra_pieces=revision_contexts.REVISION_PIECES,
        steps=1800,
    ),
}


def random_example(flavour: Flavour, rng: random.Random, error_scale: float = 1.0) -> Example:
    """A fresh example on a question of the training half."""
    kinds = [kind for _, kind in flavour.kinds.values()]
    shares = [share for share, _ in flavour.kinds.values()]
    problem = random_problem(rng.choice(LEVELS), rng, held_out=False)
    return rng.choices(kinds, weights=shares)[0](problem, rng, error_scale)
