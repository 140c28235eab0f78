"""Pass rates: `python -m recipe.pass_rates model=tiny data=tiny_world hardware=cpu sample.out=DIR`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from recipe import sample
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.run_files import json_line
from recipe.sample_data import read_questions
from recipe.sample_settings import sample_config
from verl_ext.atomic import write_atomically

if TYPE_CHECKING:
    # It imports torch, whose threads are decided by what `recipe.sample` sets first.
    from verl_ext.pass_rate_store import PassRateTable

HELP = """Measure the pass rate of every training question before training (PACED: 8 rollouts each at temperature 1.0).

  python -m recipe.pass_rates sample.out=DIR [group=preset ...] [key=value ...]

Presets:
{groups}

Keys: those of `python -m recipe.sample`, with sample.split=train and sample.k=8; among them
  sample.out=DIR            folder of the store; samples it holds are not drawn again
  sample.k=N                rollouts per question
  sample.limit=N            only the first N questions
  sample.checkpoint=DIR     model folder, or a checkpoint that holds one (the preset's model)
  distill.context.success_threshold=R     reward from which a rollout counts as a success (0.5)

Give the model, data, verifier and temperature of the run that shall use the rates: a store of others is refused.
Ctrl-C keeps every finished sample; the same command goes on, and with a larger sample.k tops the store up.

DIR/pass_rates.json has successes, count, errors, timeouts, truncated and the mean length of every question. A histogram
of the questions goes to standard error. The last line on standard output is one JSON object: questions, samples, drawn,
mean, pass_rate_std, share_zero, share_one, share_active, kept (questions with p(1-p) > 0), truncated, verifier_errors,
seconds, store.

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""
FILE = "pass_rates.json"
FORMAT = 1
BAR = 40


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration. Raises ConfigError."""
    config = compose_config(overrides, name="pass_rates")
    sample_config(config)
    return config


def run(config: DictConfig) -> dict[str, Any]:
    """Draws what the store lacks (:func:`recipe.sample.run`) and writes the pass rates; returns the summary.

    Raises:
        ConfigError, StoreError, PromptError: the configuration, the store or a prompt does not fit; before Ray starts.
        StoreError: also where a sample cannot be counted.
    """
    block = sample_config(config)
    folder = Path(str(block.out)).absolute()
    threshold = config.distill.context.success_threshold
    questions = [request.question_id for request in read_questions(config, block.split, block.limit)[0]]

    def finish(sampled: dict[str, Any], left_out: dict[str, list[str]], screen: RunConsole) -> dict[str, Any]:
        from verl_ext.pass_rate_store import read_pass_rates

        table = read_pass_rates(folder, threshold=threshold, samples=block.k).only(questions)
        totals = summarize(table)
        write_atomically(folder / FILE, json_line(file_content(table, threshold, totals)) + "\n")
        screen.text(histogram(table))
        return totals | {key: sampled[key] for key in ("drawn", "seconds", "store")}

    return sample.run(config, finish=finish)


def summarize(table: PassRateTable) -> dict[str, Any]:
    """Counts, mean and spread of the pass rates.

    Questions of which no sample was verified have no rate: they are in ``questions``, but not in means and shares.
    Samples that the verifier could not judge are in ``verifier_errors`` and in no rate. ``kept`` are the questions with
    p(1-p) > 0, which PACED (arXiv 2603.11178) trains on.
    """
    import torch

    from verl_ext.pass_rates import pass_rate_metrics

    rates = list(table.rates.values())
    described = pass_rate_metrics(torch.tensor([rate.rate for rate in rates], dtype=torch.float64))
    names = {"mean": "mean", "pass_rate_std": "std"} | {f"share_{n}": f"share_{n}" for n in ("zero", "one", "active")}
    return {
        "questions": len(rates),
        "samples": sum(rate.samples for rate in rates),
        **{ours: _rounded(described[theirs]) for ours, theirs in names.items()},
        "kept": sum(0 < rate.rate < 1 for rate in rates),
        "truncated": sum(rate.truncated for rate in rates),
        "verifier_errors": sum(rate.errors + rate.timeouts for rate in rates),
    }


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def file_content(table: PassRateTable, threshold: float, totals: Mapping[str, Any]) -> dict[str, Any]:
    """The object in ``pass_rates.json``."""
    questions = {name: asdict(rate) for name, rate in table.rates.items()}
    for values in questions.values():
        del values["question_id"]
        values["tokens"] = round(values["tokens"], 3)
    return {
        "format": FORMAT,
        "key": table.key,
        "samples": table.samples,
        "threshold": threshold,
        "totals": dict(totals),
        "questions": questions,
    }


def histogram(table: PassRateTable) -> str:
    """Questions by number of successes: a line each with their number, their share and a bar."""
    from verl_ext.pass_rate_store import bins

    counts = bins(table, table.samples)
    measured, most = sum(counts), max(counts)
    lines = [f"successes of {table.samples}  questions   share"]
    width = len(lines[0].split("  ")[0])
    for successes, count in enumerate(counts):
        share, bar = count / max(1, measured), "#" * round(BAR * count / max(1, most))
        lines.append(f"{successes:>{width}}  {count:>9}  {share:>6.1%}  {bar}".rstrip())
    if unmeasured := len(table.rates) - measured:
        lines.append(f"{'none verified':>{width}}  {unmeasured:>9}")
    return "\n".join(lines)


def help_text() -> str:
    """What `--help` prints."""
    return HELP.format(groups=preset_lines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    return command_line(
        arguments,
        help_text=help_text,
        config_name="pass_rates",
        run=lambda overrides: run(compose(overrides)),
        refusals=sample.REFUSALS,
    )


if __name__ == "__main__":
    sys.exit(main())
