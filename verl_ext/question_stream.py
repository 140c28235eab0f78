"""The order in which a run takes its questions where some of them are left out (PACED: those of weight 0).

verl's loader goes over a whole data set. Here the kept questions may change while the run goes on, and an epoch over
them need not be a whole number of batches: epochs follow each other without a gap, each a new order of the questions
kept at that time, and the place in it is a few numbers of the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


class QuestionStream:
    """Endless batches of positions in a data set.

    Args:
        kept: positions of the questions that take part.
        seed: of the orders; the order of an epoch depends on the seed, the number of the epoch and the kept questions.
        shuffle: otherwise every epoch is in the order of ``kept``.

    Raises:
        ValueError: ``kept`` is empty or holds a position twice.
    """

    def __init__(self, kept: Sequence[int], *, seed: int = 0, shuffle: bool = True) -> None:
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.position = 0, 0
        self._set(kept)

    def __len__(self) -> int:
        """Questions that take part."""
        return len(self._kept)

    def _set(self, kept: Sequence[int]) -> None:
        kept = np.asarray(kept, dtype=np.int64).reshape(-1)
        if len(kept) == 0:
            raise ValueError("no question is left to train on")
        if len(np.unique(kept)) != len(kept):
            raise ValueError("a question stands twice among those kept")
        self._kept = kept
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        if not self.shuffle:
            return self._kept
        return self._kept[np.random.default_rng([self.seed, self.epoch]).permutation(len(self._kept))]

    @property
    def kept(self) -> list[int]:
        """Positions of the questions that take part."""
        return self._kept.tolist()

    @property
    def digest(self) -> str:
        """Names the kept questions: a place in an order says nothing about another one."""
        return hashlib.sha256(self._kept.tobytes()).hexdigest()[:16]

    def keep(self, kept: Sequence[int]) -> None:
        """Other questions from now on: the present epoch ends, a new one begins."""
        self.epoch, self.position = self.epoch + 1, 0
        self._set(kept)

    def take(self, count: int) -> list[int]:
        """The next ``count`` positions; a question may come twice where an epoch ends in between."""
        taken: list[int] = []
        while len(taken) < count:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self.position : self.position + count - len(taken)]
            taken += part.tolist()
            self.position += len(part)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain values."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "kept": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it was taken with other questions or another seed; both are named.
        """
        for name, own in (("kept", self.digest), ("seed", self.seed)):
            if state[name] != own:
                raise ValueError(
                    f"the order of questions was saved with {name}={state[name]!r}, this run has {own!r}: data, length "
                    "limits, pass rates or weighting have changed; resume with the same ones"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled()
