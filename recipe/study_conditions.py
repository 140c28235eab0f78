"""Under which conditions a study's rows were made: samples, steps, learning rate, starting model, data, evaluation.

A row holds the settings that decide these. Rows from before they were kept hold their command line only; today's
presets complete it then, and ``recorded`` says so. Numbers of steps and samples are the row's own in any case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from recipe.chain_settings import chain_config
from recipe.compose import ROOT, compose_config
from recipe.run_files import as_number, to_plain
from verl_ext.config import ConfigError, distill_config
from verl_ext.question_data import file_list
from verl_ext.stages import rates_due, stage_after

Row = Mapping[str, Any]

# Budgets that differ by less are called equal: stages of a chain do not divide a number of samples to the last one.
EQUAL_BUDGETS = 0.01
EVALUATION = (
    "data.max_response_length",
    "verifier.function",
    "verifier.options",
    *(f"actor_rollout_ref.rollout.val_kwargs.{key}" for key in ("temperature", "top_p", "top_k", "do_sample")),
)
# How a step's sequences came about: (of every sequence, share drawn in the run).
_DRAWN = {"student_rollouts": 1.0, "reference": 0.0, "pairs": 1.0, "pairs_replayed": 0.5}


@dataclass(frozen=True)
class Samples:
    """What a run's training used, in sequences.

    Attributes:
        drawn: sampled in the run: rollouts, attempts, revisions.
        replayed: read from the data as responses, drawn by nobody in the run.
        rates: drawn to measure pass rates before and between steps.
        source: ``recorded`` by the run; ``counted`` over its steps; ``last step``: its rows times the steps;
            ``settings``: batch, rollouts and steps.
    """

    drawn: int
    replayed: int
    rates: int
    source: Literal["recorded", "counted", "last step", "settings"]


@dataclass(frozen=True)
class Conditions:
    """Of one run.

    Attributes:
        steps: of the trainer.
        learning_rates: by what is trained, such as {"training": 0.0003}.
        last_learning_rate: of the last step; None where the row has none.
        start: path of the starting model.
        train_files: paths.
        evaluation: keys and values, among them the questions' files.
        recorded: whether the row holds its settings; otherwise they are today's presets with its command line.
    """

    run_id: str
    steps: int
    samples: Samples
    learning_rates: Mapping[str, float]
    last_learning_rate: float | None
    start: str
    train_files: tuple[str, ...]
    evaluation: Mapping[str, Any]
    recorded: bool

    def until(self, step: int | None) -> Conditions:
        """As the run was at a step; the whole run for None, and for a method of stages, which are no steps."""
        if step is None or self.samples.source == "recorded" or not 0 <= step < self.steps:
            return self
        drawn, replayed = (round(count * step / self.steps) for count in (self.samples.drawn, self.samples.replayed))
        return replace(self, steps=step, samples=replace(self.samples, drawn=drawn, replayed=replayed))


def row_settings(config: DictConfig) -> dict[str, Any]:
    """What a row keeps of its configuration; paths as seen from the project's folder, never one of this machine's."""
    distill, steps, stages = distill_config(config.distill), int(config.run.steps), chain_config(config).stages
    by_source: dict[str, int] = {}
    for done in range(steps if not stages or "distil" in stages else 0):
        sequences = stage_after(distill, done, steps).sequences
        source = "pairs_replayed" if sequences.source == "pairs" and sequences.replays else sequences.source
        by_source[source] = by_source.get(source, 0) + 1
    rates = {"fine-tuning": float(config.sft.lr)} if "sft" in stages else {}
    if by_source:
        rates["distillation" if stages else "training"] = float(config.actor_rollout_ref.actor.optim.lr)
    return {
        "start": _portable(str(config.actor_rollout_ref.model.path)),
        "train_files": [_portable(file) for file in file_list(config.data.train_files)],
        "evaluation": {
            "data.val_files": [_portable(file) for file in file_list(config.data.val_files)],
            **{key: to_plain(OmegaConf.select(config, key), key) for key in EVALUATION},
        },
        "learning_rates": rates,
        "rows_a_step": int(config.data.train_batch_size * config.actor_rollout_ref.rollout.n),
        "steps_by_source": by_source,
        "rate_samples": len(rates_due(distill, steps)) * distill.weighting.samples,
    }


def _portable(path: str) -> str:
    """Relative to the project; of a file elsewhere the name, and a digest that tells two such apart."""
    if not Path(path).is_absolute():
        return path
    if Path(path).is_relative_to(ROOT):
        return Path(path).relative_to(ROOT).as_posix()
    return f"{Path(path).name} ({hashlib.sha256(path.encode()).hexdigest()[:8]})"


@cache
def composed_settings(overrides: tuple[str, ...]) -> dict[str, Any]:
    """:func:`row_settings` of a command line with today's presets. Raises ConfigError where they do not compose."""
    return row_settings(compose_config(overrides))


def sequences_of(records: Sequence[Row]) -> int | None:
    """Sequences that the steps of a run trained on, by its metrics; None where a step does not say."""
    counts = [_rows(record) for record in records if "training/global_step" in record]
    return None if not counts or None in counts else sum(counts)


def _rows(record: Row) -> int | None:
    """Of one step: the rows whose contexts were built, or questions times rollouts of each."""
    rows = as_number(record.get("context/rows"))
    if rows is not None:
        return int(rows)
    questions, histogram = as_number(record.get("pass_rate/questions")), record.get("pass_rate/histogram")
    return None if questions is None or not histogram else int(questions) * (len(histogram) - 1)


def conditions(row: Row, compose: Callable[[tuple[str, ...]], Mapping[str, Any]] = composed_settings) -> Conditions:
    """Of a row.

    Args:
        compose: settings of a command line, for rows that do not hold theirs.

    Raises:
        ConfigError: the row's command line no longer composes, or its pass-rate samples cannot be counted.
    """
    recorded = row.get("settings")
    try:
        settings = recorded or compose(tuple(row["overrides"]))
    except ConfigError as error:
        raise ConfigError(f"run {row['run_id']}: the settings of its command line are not known: {error}") from error
    return Conditions(
        run_id=str(row["run_id"]),
        steps=int(row["summary"]["steps"]),
        samples=_samples(row, settings),
        learning_rates=settings["learning_rates"],
        last_learning_rate=as_number(row["final"].get("actor/lr")),
        start=settings["start"],
        train_files=tuple(settings["train_files"]),
        evaluation=settings["evaluation"],
        recorded=recorded is not None,
    )


def _samples(row: Row, settings: Mapping[str, Any]) -> Samples:
    summary, final = row["summary"], row["final"]
    if summary.get("samples") is not None:
        return Samples(int(summary["samples"]), 0, 0, "recorded")
    steps, last = int(summary["steps"]), _rows(final)
    if row.get("sequences") is not None:
        rows, source = int(row["sequences"]), "counted"
    elif last is not None:
        rows, source = steps * last, "last step"
    else:
        rows, source = steps * settings["rows_a_step"], "settings"
    by_source = settings["steps_by_source"]
    share = sum(_DRAWN[name] * count for name, count in by_source.items()) / max(1, sum(by_source.values()))
    drawn = round(rows * share)
    return Samples(drawn, rows - drawn, _rate_samples(row, settings["rate_samples"]), source)


def _rate_samples(row: Row, of_a_question: int) -> int:
    if not of_a_question:
        return 0
    counts = [as_number(value) for key, value in row["final"].items() if key.startswith("questions/")]
    if not counts or None in counts:
        raise ConfigError(f"run {row['run_id']} took pass rates, and its last step does not say of how many questions")
    return of_a_question * int(sum(counts))


# ---------------------------------------------------------------------------------------------------------- comparison


def evaluated_differently(first: Sequence[Conditions], second: Sequence[Conditions]) -> str:
    """Which of the questions, the sampling or the verifier differ between runs, in words; "" where none does."""
    runs = [*first, *second]
    for key in runs[0].evaluation:
        for run in runs[1:]:
            mine, theirs = (json.dumps(one.evaluation.get(key), sort_keys=True) for one in (runs[0], run))
            if mine != theirs:
                return f"run {runs[0].run_id} was evaluated with {key}={mine}, run {run.run_id} with {theirs}"
    return ""


def trained_differently(first: Sequence[Conditions], second: Sequence[Conditions]) -> list[str]:
    """What makes a comparison of methods unequal: samples, starting model, training data; in words, a text each."""
    found = []
    mine, theirs = mean_budget(first), mean_budget(second)
    limit = EQUAL_BUDGETS * max(*map(sum, (mine, theirs)))
    if any(abs(one - other) > limit for one, other in zip(mine, theirs, strict=True)):
        found.append(f"budgets ({budget_text(first)} against {budget_text(second)} samples)")
    for what, read in (("starting models", _start), ("training data", _train_files)):
        one, other = ({read(run) for run in runs} for runs in (first, second))
        if one != other:
            found.append(f"{what} ({' and '.join(sorted(one))} against {' and '.join(sorted(other))})")
    return found


def _start(run: Conditions) -> str:
    return run.start


def _train_files(run: Conditions) -> str:
    return ", ".join(run.train_files)


def mean_budget(runs: Sequence[Conditions]) -> tuple[float, float]:
    """Mean over runs of the samples drawn, whatever for, and of those replayed."""
    drawn, replayed = (
        sum(read(run.samples) for run in runs) / len(runs)
        for read in (lambda one: one.drawn + one.rates, lambda one: one.replayed)
    )
    return drawn, replayed


def budget_text(runs: Sequence[Conditions]) -> str:
    """Such as "5,120", or "2,560 drawn, 2,560 replayed, 4,768 for pass rates"."""
    parts = {
        "drawn": [run.samples.drawn for run in runs],
        "replayed": [run.samples.replayed for run in runs],
        "for pass rates": [run.samples.rates for run in runs],
    }
    there = {name: _range(counts) for name, counts in parts.items() if any(counts)}
    if list(there) == ["drawn"]:
        return there["drawn"]
    return ", ".join(f"{count} {name}" for name, count in there.items()) or "0"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
