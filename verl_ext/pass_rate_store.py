"""Pass rates of the samples in a store, and the check that they belong to a run.

PACED (arXiv 2603.11178) takes K = 8 rollouts of every training question at temperature 1.0 before training. Successes
and counts are kept, not their ratio, so that samples may be added later. K samples are enough for alpha = beta = 1:
E[p̂(1 - p̂)] = (1 - 1/K) p(1 - p), so the relative weights of questions with equal K are unbiased.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl_ext.pass_rates import group_pass_rates
from verl_ext.sample_store import StoreError, differences, read_manifest, read_rows, store_key
from verl_ext.verifiers.result import ERROR, OK, STATUSES, TIMEOUT

# Settings in which a store and the run that uses its rates may differ.
FREE_SETTINGS = ("sampling.seed", "sampling.max_tokens")


@dataclass(frozen=True)
class QuestionRate:
    """What the samples of one question came to.

    Attributes:
        question_id: of the data, ``extra_info.question_id``.
        successes: verified samples with a score of at least the threshold.
        count: verified samples. Samples that the verifier could not judge say nothing about the response.
        errors: samples on which the verifier failed.
        timeouts: samples on which the verifier ran out of time.
        truncated: samples that were cut off at their length limit, whatever the verdict.
        tokens: mean length of a response in tokens, over all samples.
    """

    question_id: str
    successes: int
    count: int
    errors: int
    timeouts: int
    truncated: int
    tokens: float

    @property
    def samples(self) -> int:
        """All samples, verified or not."""
        return self.count + self.errors + self.timeouts

    @property
    def rate(self) -> float:
        """successes / count; NaN where no sample was verified."""
        return self.successes / self.count if self.count else math.nan


@dataclass(frozen=True)
class PassRateTable:
    """The questions of a store.

    Attributes:
        rates: by question id, in the order in which the questions first finished a sample.
        settings: of the store: ``model``, ``sampling``, ``chat_template``, ``verifier``.
        samples: the largest number of samples of a question (K).
        folder: of the store.
    """

    rates: dict[str, QuestionRate]
    settings: dict[str, Any]
    samples: int
    folder: Path

    @property
    def key(self) -> str:
        """Names the settings, as in the store's file names."""
        return store_key(self.settings)

    def rate(self, question_id: str) -> float:
        """Pass rate of a question; NaN where it was never sampled or never verified."""
        found = self.rates.get(question_id)
        return math.nan if found is None else found.rate

    def missing(self, question_ids: Iterable[str]) -> list[str]:
        """The questions without any sample, each once, in the order given.

        A question whose samples could not be verified is not missing; its rate is NaN.
        """
        return [question_id for question_id in dict.fromkeys(question_ids) if question_id not in self.rates]

    def only(self, question_ids: Iterable[str]) -> PassRateTable:
        """The same table with these questions only, in the order given; ids that it does not hold are passed over."""
        kept = {name: self.rates[name] for name in dict.fromkeys(question_ids) if name in self.rates}
        return PassRateTable(kept, self.settings, _most_samples(kept), self.folder)

    def evidence(self) -> dict[str, tuple[int, int]]:
        """(successes, count) by question id."""
        return {name: (rate.successes, rate.count) for name, rate in self.rates.items()}


def read_pass_rates(
    folder: str | os.PathLike[str], *, threshold: float = 0.5, samples: int | None = None
) -> PassRateTable:
    """Counts the samples of a store as training counts rollouts (:func:`verl_ext.pass_rates.group_pass_rates`).

    A sample succeeds if its ``score``, the reward that training sees, is at least ``threshold``; ``acc``, which a
    verifier may define otherwise, is not looked at. Rows are read one at a time: responses are not kept in memory.

    Args:
        folder: of a sample store, see :mod:`verl_ext.sample_store`.
        threshold: of success; in a run ``distill.context.success_threshold``.
        samples: only samples with an index below this one; None: all.

    Raises:
        StoreError: there is no store, it is damaged, or a row lacks what is counted; names the file, the sample, the
            key, what was found and what is allowed.
        ValueError: ``samples`` is no whole number from 1, or ``threshold`` is not finite.
    """
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ValueError(f"samples is {samples!r}; allowed: a whole number from 1, or None for all")
    manifest = read_manifest(folder)
    path = Path(folder) / f"samples-{manifest['key']}.jsonl"
    columns = _Columns(path)
    for row in read_rows(path):
        if samples is None or row["sample"] < samples:
            columns.add(row)
    rates = columns.count(threshold)
    return PassRateTable(rates, manifest["settings"], _most_samples(rates), Path(folder))


class _Columns:
    """The parts of N rows that are counted, checked one row at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: set[tuple[str, int]] = set()
        self._ids: list[str] = []
        self._scores: list[float] = []
        self._status: list[int] = []
        self._truncated: list[bool] = []
        self._tokens: list[int] = []

    def add(self, row: Mapping[str, Any]) -> None:
        sample = (row["question_id"], row["sample"])
        where = f"{self._path}: sample {sample[1]} of question {sample[0]}"
        if sample in self._seen:
            raise StoreError(f"{where} is there twice; allowed: once. Remove one of the lines")
        self._seen.add(sample)
        status = row.get("status")
        if status not in STATUSES:
            raise StoreError(f"{where}: status is {status!r}; allowed: {', '.join(STATUSES)}")
        self._ids.append(row["question_id"])
        self._status.append(STATUSES.index(status))
        # What could not be judged has no score; 0 stands in for it and is never looked at.
        self._scores.append(_number(row, "score", where) if status == OK else 0.0)
        self._truncated.append(_flag(row, "truncated", where))
        self._tokens.append(_number(row, "tokens", where))

    def count(self, threshold: float) -> dict[str, QuestionRate]:
        status_N = torch.tensor(self._status, dtype=torch.int64)
        # float32 like the trainer's rewards, so that a score and a threshold of 0.7 meet here as they do there.
        scores_N = torch.tensor(self._scores, dtype=torch.float32)
        groups = group_pass_rates(self._ids, scores_N, status_N != STATUSES.index(OK), threshold=threshold)

        def total(values_N: torch.Tensor) -> list[float]:
            summed_P = torch.bincount(groups.index_N, weights=values_N.to(torch.float64), minlength=len(groups.keys))
            return summed_P.tolist()

        errors, timeouts = (total(status_N == STATUSES.index(name)) for name in (ERROR, TIMEOUT))
        truncated = total(torch.tensor(self._truncated, dtype=torch.bool))
        tokens = total(torch.tensor(self._tokens, dtype=torch.float64))
        rows = total(torch.ones(len(self._ids)))
        successes, counts = groups.successes_P.tolist(), groups.counts_P.tolist()
        return {
            name: QuestionRate(
                question_id=name,
                successes=successes[i],
                count=counts[i],
                errors=int(errors[i]),
                timeouts=int(timeouts[i]),
                truncated=int(truncated[i]),
                tokens=tokens[i] / rows[i],
            )
            for i, name in enumerate(groups.keys)
        }


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise StoreError(f"{where}: {key} is {value!r}; allowed: a finite number")
    return value


def _flag(row: Mapping[str, Any], key: str, where: str) -> bool:
    value = row.get(key)
    if not isinstance(value, bool):
        raise StoreError(f"{where}: {key} is {value!r}; allowed: true, false")
    return value


def _most_samples(rates: Mapping[str, QuestionRate]) -> int:
    return max((rate.samples for rate in rates.values()), default=0)


def check_same_rollouts(table: PassRateTable, expected: Mapping[str, Any], *, what: str) -> None:
    """Do these rates speak of the rollouts that ``what`` would draw?

    Left out of the comparison are settings that do not decide what a rate means for a run: ``sampling.seed`` and
    ``sampling.max_tokens`` (PACED itself measures with at most 8,192 tokens and trains with 16,384), and ``model.path``
    where the fingerprints agree, since the same weights may lie in another folder.

    Args:
        table: as read.
        expected: settings of the store's shape (``model``, ``sampling``, ``chat_template``, ``verifier``; see
            :func:`verl_ext.sampling.store_settings`).
        what: named in the message, as "this run".

    Raises:
        StoreError: names the folder and every other setting in which the two differ.
    """
    # Through JSON once, as the store's own settings went.
    asked = json.loads(json.dumps(expected))
    changed = {line.split(":")[0]: line for line in differences(table.settings, asked)}
    free = set(FREE_SETTINGS)
    if "fingerprint" in table.settings.get("model", {}) and "model.fingerprint" not in changed:
        free.add("model.path")
    found = [line for name, line in changed.items() if name not in free]
    if found:
        raise StoreError(
            f"{table.folder} holds pass rates of other rollouts than those of {what}: {'; '.join(found)}. "
            "Measure them again in another folder (python -m recipe.pass_rates)"
        )


def bins(table: PassRateTable, n: int) -> list[int]:
    """[n + 1] measured questions by their number of successes out of ``n`` samples.

    A question of which fewer samples were verified stands at rate * n, rounded. The first and the last bin hold exactly
    the questions that no and that every verified sample solved: since count <= n, any other rate lies within
    [1, n - 1] / n.

    Raises:
        ValueError: a question has more than ``n`` verified samples.
    """
    counts = [0] * (n + 1)
    for rate in table.rates.values():
        if rate.count > n:
            raise ValueError(f"n is {n}; allowed: at least the {rate.count} samples of question {rate.question_id}")
        if rate.count:
            counts[round(rate.rate * n)] += 1
    return counts
