"""SNR analysis: `python -m recipe.snr snr.out=DIR method=paced_self model=tiny data=tiny_world hardware=cpu`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.cluster import importing, prepare_environment, ray_cluster
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.output_folder import check_writable
from recipe.preflight import preflight
from recipe.sample_data import read_questions
from recipe.snr_settings import SnrConfig, snr_config
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError
from verl_ext.gradient_files import finished, read_gradients
from verl_ext.sample_store import StoreError, differences

HELP = """Signal-to-noise ratio of per-question gradients by pass rate (PACED): is there a bell, with which exponents?

  python -m recipe.snr snr.out=DIR [group=preset ...] [key=value ...]

Presets:
{groups}

The gradient of the method's distillation loss is taken for every question by itself, unweighted, on the workers that
would train; no weight changes. Pass rates are the method's: of the batch (its rollouts), or of a store.

Keys:
  snr.out=DIR               gradients, snr.json and snr.html; what is there is not measured again
  snr.questions=N           the first N training questions (300; null: all)
  snr.dimensions=D          of the random projection (4096)
  snr.bins=B                pass-rate bins (10)
  snr.centre=mean|midpoint  snr.edges=exclude|shrink  snr.resamples=N  snr.confidence=C
  data.train_batch_size=N   questions at a time
  distill.*, actor_rollout_ref.*, data.*                 every key of training

The last line on standard output is one JSON object: questions, alpha, beta, verdict, report, seconds.

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""
SETTINGS_FILE = "settings.json"
REFUSALS = (ConfigError, StoreError)


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration. Raises ConfigError."""
    config = compose_config(overrides, name="snr")
    snr_config(config)
    return config


def run(config: DictConfig, console: RunConsole | None = None) -> dict[str, Any]:
    """Measures what is missing, in an existing Ray cluster or one of its own, and writes the report.

    Raises:
        ConfigError, StoreError: the configuration, the folder or the data does not fit; before Ray starts.
    """
    started = time.perf_counter()
    prepare_environment(config.run.platform)
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    block = snr_config(config)
    folder = Path(str(block.out)).absolute()
    check_writable(folder, "snr.out")
    wanted = [request.question_id for request in read_questions(config, "train", block.questions)[0]]
    _measure_only(config, folder, len(wanted))
    preflight(config)
    _check_folder(folder, _settings(config))
    with console or RunConsole(
        folder / "snr.log", len(wanted), config.run.quiet, unit="question", tail_lines=config.run.log_tail
    ) as screen:
        missing = len(set(wanted) - set(finished(folder)))
        screen.phase(f"{len(wanted)} questions, {missing} gradients are missing")
        if missing:
            with open_dict(config):
                config.run.steps = -(-missing // config.data.train_batch_size)
                config.trainer.total_training_steps = config.run.steps
            _measure(config, block, folder, wanted, screen)
        names, rates, gradients = read_gradients(folder)
        chosen = [i for i, name in enumerate(names) if name in set(wanted)]
        summary = _report(block, folder, rates[chosen], gradients[chosen], config, screen)
        summary |= {"seconds": round(time.perf_counter() - started, 1)}
        screen.summary(summary)
    return summary


def _measure_only(config: DictConfig, folder: Path, questions: int) -> None:
    """Settings of a run that changes nothing: a question per mini-batch, equal weights, no validation."""
    with open_dict(config):
        config.actor_rollout_ref.actor.ppo_mini_batch_size = 1
        config.data.train_batch_size = min(config.data.train_batch_size, questions)
        config.distill.weighting.update({"kernel": "beta", "alpha": 0.0, "beta": 0.0, "normalizer": "none"})
        config.distill.schedule = {"switch": None, "second": {}, "recompute_pass_rates": True}
        config.run.output_dir = str(folder)
        config.run.steps = -(-questions // config.data.train_batch_size)
        config.run.val_before = False
        config.run.val_every = -1
        config.run.save_every = -1
        config.trainer.resume_mode = "disable"
        config.distill.samples.per_step = 0


def _settings(config: DictConfig) -> dict[str, Any]:
    """Everything that decides what a gradient is."""
    distill = OmegaConf.to_container(config.distill, resolve=True)
    parts = {name: distill[name] for name in ("teacher", "context", "divergence", "sequences", "coefficient")}
    rollout = config.actor_rollout_ref.rollout
    return {
        "model": str(config.actor_rollout_ref.model.path),
        "data": OmegaConf.to_container(config.data, resolve=True)["train_files"],
        "rates": {name: distill["weighting"][name] for name in ("rates", "store", "samples")},
        "rollout": {name: rollout[name] for name in ("n", "temperature", "top_p", "top_k")},
        "dimensions": config.snr.dimensions,
        "seed": config.run.seed,
        **parts,
    }


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Gradients of other settings cannot be put together."""
    path = folder / SETTINGS_FILE
    if path.exists():
        changed = differences(json.loads(path.read_text()), json.loads(json.dumps(settings)))
        if changed:
            raise ConfigError(
                f"{folder} holds gradients of other settings: {'; '.join(changed)}. Choose another snr.out"
            )
    else:
        write_atomically(path, json.dumps(settings, indent=2) + "\n")


class _Sink:
    """Takes the trainer's progress to the terminal."""

    def __init__(self, screen: RunConsole) -> None:
        self._screen = screen

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """A line per step."""
        if "gradients/questions" in values:
            self._screen.progress(int(values["gradients/questions"]), "questions have their gradient")

    def phase(self, text: str) -> None:
        """A stage of the start."""
        self._screen.phase(text)

    def warning(self, text: str) -> None:
        """Something the user should see."""
        self._screen.note(f"warning: {text}")

    def completions(self, rows: list[dict[str, Any]]) -> None: ...

    def non_finite(self, rows: list[dict[str, Any]]) -> None:
        """A gradient that is no number."""
        self.warning(f"{len(rows)} rows have a gradient that is not finite: question {rows[0]['question_id']}")

    def working(self, text: str, seconds_left: float | None = None) -> None:
        """Beside the bar; the questions' own lines say the rest."""
        self._screen.working(text, seconds_left)

    def validated(self, seconds: float) -> None: ...

    def pending(self, step: int, values: dict[str, Any]) -> None: ...

    def saved(self, step: int, size: int) -> None: ...

    def validation_items(self, step: int, counts: dict[str, Any]) -> None: ...


def _measure(config: DictConfig, block: SnrConfig, folder: Path, wanted: list[str], screen: RunConsole) -> None:
    screen.phase("starting Ray")
    with importing("verl_ext.session"), ray_cluster(config):
        from verl_ext.early import start
        from verl_ext.gradient_trainer import GradientTrainer
        from verl_ext.session import run_session

        trainer = partial(GradientTrainer, folder=folder, wanted=wanted, dimensions=block.dimensions)
        run_session(config, _Sink(screen), start(config), seed=config.run.seed, trainer_class=trainer)


def _report(
    block: SnrConfig, folder: Path, rates: Any, gradients: Any, config: DictConfig, screen: RunConsole
) -> dict[str, Any]:
    from recipe.snr_chart import table, write_snr_report
    from recipe.snr_statistics import analyse

    weighting = config.distill.weighting
    samples = config.actor_rollout_ref.rollout.n if weighting.rates == "batch" else weighting.samples
    report = analyse(
        rates,
        gradients,
        bins=block.bins,
        samples=int(samples),
        centre=block.centre,
        edges=block.edges,
        resamples=block.resamples,
        confidence=block.confidence,
        seed=int(config.run.seed),
        about=_settings(config),
    )
    path = write_snr_report(report, folder)
    screen.text(table(report))
    fit = report.fit
    return {
        "questions": len(rates),
        "alpha": None if fit is None else round(fit.alpha, 4),
        "beta": None if fit is None else round(fit.beta, 4),
        "verdict": report.verdict.kind,
        "report": str(path),
    }


def help_text() -> str:
    """What `--help` prints."""
    return HELP.format(groups=preset_lines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    return command_line(
        arguments,
        help_text=help_text,
        config_name="snr",
        run=lambda overrides: run(compose(overrides)),
        refusals=REFUSALS,
    )


if __name__ == "__main__":
    sys.exit(main())
