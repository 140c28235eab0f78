"""A running estimate of pass rates, updated with the rollouts of every training step.

Per question s <- decay * s + new successes and c <- decay * c + new verified rollouts; the rate is s / c. With decay 1
it is the rate over all rollouts so far; below 1 old evidence fades, by the number of times the question was seen since
and not by time, so a question that has not come up again keeps its estimate. A question that was seen both solved and
unsolved keeps a rate strictly between 0 and 1 for a long time, unlike the rate of a single batch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_ext.pass_rate_store import PassRateTable

FORMAT = 1


class RunningPassRates:
    """Decayed successes and counts by question id."""

    def __init__(
        self, decay: float = 0.9, prior: PassRateTable | Mapping[str, tuple[float, float]] | None = None
    ) -> None:
        """
        Args:
            decay: what is left of a question's old evidence when new evidence of it comes in; above 0, at most 1.
            prior: rates measured before training, or (successes, count) by question id; counts as evidence.

        Raises:
            ValueError: ``decay`` is out of range, or the prior holds evidence that cannot be.
        """
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ValueError(f"decay is {decay!r}; allowed: a number above 0, at most 1")
        self.decay = float(decay)
        evidence = prior.evidence() if isinstance(prior, PassRateTable) else prior or {}
        self._evidence = {name: _evidence(f"the prior of question {name}", pair) for name, pair in evidence.items()}

    def update(
        self, question_ids: Sequence[str], successes: Sequence[float] | Tensor, counts: Sequence[float] | Tensor
    ) -> None:
        """Takes in one step's rollouts of P questions.

        A question that is named twice in one call is one observation with the sum of both, so the order of the batch
        does not matter. A count of 0 (no rollout was verified) is no observation: nothing decays.

        Args:
            question_ids: P ids.
            successes: [P] successful rollouts.
            counts: [P] verified rollouts.

        Raises:
            ValueError: lengths differ, or a pair is not 0 <= successes <= count; nothing is taken in then.
        """
        if not len(question_ids) == len(successes) == len(counts):
            raise ValueError(
                f"{len(question_ids)} question ids, {len(successes)} successes and {len(counts)} counts; "
                "allowed: as many of each"
            )
        new: dict[str, tuple[float, float]] = {}
        for name, *pair in zip(question_ids, _plain(successes), _plain(counts), strict=True):
            right, count = _evidence(f"question {name}", pair)
            before = new.get(name, (0.0, 0.0))
            new[name] = (before[0] + right, before[1] + count)
        for name, (right, count) in new.items():
            if count:
                old = self._evidence.get(name, (0.0, 0.0))
                self._evidence[name] = (self.decay * old[0] + right, self.decay * old[1] + count)

    def rate(self, question_id: str) -> float:
        """The estimate of one question; NaN where it was never seen."""
        right, count = self._evidence.get(question_id, (0.0, 0.0))
        return right / count if count else math.nan

    def rates(self, question_ids: Iterable[str]) -> Tensor:
        """[P] float64 estimates of P questions; NaN where never seen."""
        return torch.tensor([self.rate(name) for name in question_ids], dtype=torch.float64)

    def evidence(self) -> dict[str, tuple[float, float]]:
        """(successes, count) by question id, as ``prior`` takes it."""
        return dict(self._evidence)

    # ------------------------------------------------------------------------------------------------------ the state

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``format``, ``decay`` and ``evidence``, [successes, count] by question id."""
        evidence = {name: list(pair) for name, pair in self._evidence.items()}
        return {"format": FORMAT, "decay": self.decay, "evidence": evidence}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces all evidence by that of a state.

        Raises:
            ValueError: the state is of another format or decay, or its evidence cannot be; nothing is replaced then.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the state is a {type(state).__name__}; allowed: an object with format, decay, evidence")
        for key, allowed in (("format", FORMAT), ("decay", self.decay)):
            if state.get(key) != allowed:
                raise ValueError(f"{key} is {state.get(key)!r}; allowed: {allowed!r}")
        evidence = state.get("evidence")
        if not isinstance(evidence, Mapping):
            raise ValueError(f"evidence is {evidence!r:.80}; allowed: [successes, count] by question id")
        self._evidence = {name: _evidence(f"evidence of question {name}", pair) for name, pair in evidence.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state as JSON in one step: a reader sees the old file or the new one."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.state_dict(), file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """:meth:`load_state_dict` from a file of :meth:`save`.

        Raises:
            ValueError: the file does not exist, is no JSON, or holds a state that cannot be used; names the file.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; expected running pass rates") from None
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        try:
            self.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _plain(values: Sequence[float] | Tensor) -> Sequence[float]:
    return values.tolist() if isinstance(values, Tensor) else values


def _evidence(what: str, pair: Any) -> tuple[float, float]:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_finite, pair)):
        raise ValueError(f"{what} is {pair!r:.80}; allowed: [successes, count], two finite numbers")
    successes, count = pair
    if not 0 <= successes <= count:
        raise ValueError(f"{what} is {pair!r}; allowed: 0 <= successes <= count")
    return float(successes), float(count)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
