"""Train: `python -m recipe.train method=sc_sdpo model=tiny data=tiny_world hardware=cpu`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.cluster import importing, prepare_environment, ray_cluster
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.doctor_machine import cheap_findings
from recipe.findings import raise_failures
from recipe.output_folder import check_output_folder
from recipe.preflight import preflight
from recipe.report import build_report
from recipe.run_files import RunFiles
from verl_ext.config import ConfigError
from verl_ext.sample_store import StoreError

HELP = """Train a model by pass-rate-weighted on-policy self-distillation, on verl.

  python -m recipe.train [group=preset ...] [key=value ...]

Presets:
{groups}

Often used keys:
  run.output_dir=DIR        where everything goes; a folder with checkpoints is resumed
  run.steps=N               trainer steps in all
  run.seed=N                data order, rollouts, demonstrations
  run.val_every=N           validate every N steps and after the last (-1: never)
  run.save_every=N          checkpoint every N steps (-1: never)
  distill.weighting.alpha=A distill.weighting.beta=B     question weight p^A (1-p)^B
  distill.teacher.update_rate=TAU                        EMA rate
  trainer.n_gpus_per_node=N trainer.nnodes=M             ranks
  actor_rollout_ref.*, data.*, algorithm.*, trainer.*    every key of verl's own configuration

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""


class _Sink:
    """Takes the trainer's metrics to the run's files and the terminal."""

    def __init__(self, files: RunFiles, console: RunConsole, started: float, resume_step: int) -> None:
        self.files, self.console, self.started = files, console, started
        self.first_step = resume_step + 1
        self.seconds_to_first_step: float | None = None
        self.validation_seconds = 0.0
        self.step_seconds: list[float] = []
        self._validation: float | None = None

    def phase(self, text: str) -> None:
        """A stage of the start."""
        self.console.phase(text)

    def warning(self, text: str) -> None:
        """Something the user should see."""
        self.console.note(f"warning: {text}")

    def validated(self, seconds: float) -> None:
        """Validation before the first step is not part of the time to it."""
        self._validation = seconds
        if self.seconds_to_first_step is None:
            self.validation_seconds += seconds

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One row of metrics.jsonl and one line on the terminal."""
        row = step_record(values)
        if "time/step" in row:
            if self.seconds_to_first_step is None:
                self.seconds_to_first_step = time.perf_counter() - self.started - self.validation_seconds
            else:
                self.step_seconds.append(row["time/step"])
        if "time/validation" not in row and self._validation is not None:
            row["time/validation"] = self._validation
        self._validation = None
        record = self.files.append_metrics(step, row)
        if step >= self.first_step or "time/step" not in row:
            self.console.step_line(record)

    def completions(self, rows: list[dict[str, Any]]) -> None:
        """Sampled completions."""
        self.files.append_completions(rows)

    def non_finite(self, rows: list[dict[str, Any]]) -> None:
        """Rows of an optimiser step that was skipped."""
        self.files.append_non_finite(rows)


def step_record(values: dict[str, Any]) -> dict[str, Any]:
    """verl's metric names to ours where both mean the same; everything else is kept as it is."""
    renamed = {
        "critic/score/mean": "reward/mean",
        "response_length/mean": "response/length",
        "actor/loss": "loss",
        "timing_s/gen": "time/rollout",
        "timing_s/plan": "time/plan",
        "timing_s/pass_rates": "time/pass_rates",
        "timing_s/student_pass": "time/student_pass",
        "timing_s/old_log_prob": "time/student_pass",
        "timing_s/teacher_pass": "time/teacher_pass",
        "timing_s/update_actor": "time/update",
        "timing_s/teacher_update": "time/teacher_update",
        "timing_s/update_weights": "time/weight_sync",
        "timing_s/save_checkpoint": "time/checkpoint",
        "timing_s/testing": "time/validation",
        "timing_s/step": "time/step",
    }
    record = {renamed.get(key, key): value for key, value in values.items()}
    successes = sorted(key for key in record if key.startswith("pass_rate/successes_"))
    if successes:
        record["pass_rate/histogram"] = [record.pop(key) for key in successes]
    return record


def run(config: DictConfig, console: RunConsole | None = None) -> dict[str, Any]:
    """One training run; starts and ends cleanly, inside an existing Ray cluster or with one of its own.

    Returns:
        the summary: method, steps, metric, before, after, seconds_to_first_step, seconds_per_step, report.

    Raises:
        ConfigError: the configuration, the output folder or the cluster does not fit.
    """
    started = time.perf_counter()
    prepare_environment(config.run.platform)
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    preflight(config)
    output = _output_folder(config)
    warnings = raise_failures(cheap_findings(config))
    if config.chain.stages:
        from recipe import chain

        return chain.run(config)
    resume_step = check_output_folder(config, output)
    files = RunFiles(output)
    with (
        files,
        console
        or RunConsole(
            files.log_path,
            config.run.steps,
            config.run.quiet,
            start_step=resume_step,
            tail_lines=config.run.log_tail,
        ) as screen,
    ):
        if resume_step:
            files.truncate_to_step(resume_step)
            screen.note(f"resuming after step {resume_step} of {config.run.steps} from {output}")
        else:
            files.truncate_to_step(-1)
        files.write_config(OmegaConf.to_container(config, resolve=True))
        for warning in warnings:
            screen.note(warning)
        sink = _Sink(files, screen, started, resume_step)
        screen.phase("starting Ray")
        with importing("verl_ext.session"), ray_cluster(config):
            from verl_ext.early import start

            early = start(config)
            from verl_ext.session import run_session

            run_session(config, sink, early, seed=config.run.seed)
        summary = _summary(config, files, sink)
        files.write_summary(summary)
        summary["report"] = str(build_report(output))
        files.write_summary(summary)
        screen.summary(summary)
    return summary


def _output_folder(config: DictConfig) -> Path:
    if config.run.output_dir is None:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.distill.method}-seed{config.run.seed}"
        with open_dict(config):
            config.run.output_dir = str(Path("outputs") / name)
    with open_dict(config):
        config.run.output_dir = str(Path(config.run.output_dir).absolute())
    return Path(config.run.output_dir)


def _summary(config: DictConfig, files: RunFiles, sink: _Sink) -> dict[str, Any]:
    records = files.read_metrics()
    metric = f"val/mean@{config.run.val_samples}"
    measured = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    steps = sink.step_seconds
    return {
        "method": config.distill.method,
        "steps": max((record["step"] for record in records), default=0),
        "metric": metric,
        "before": measured[0][1] if measured and measured[0][0] == 0 else None,
        "after": measured[-1][1] if measured and measured[-1][0] > 0 else None,
        "seconds_to_first_step": round(sink.seconds_to_first_step, 2) if sink.seconds_to_first_step else None,
        "seconds_per_step": round(sum(steps) / len(steps), 3) if steps else None,
        "report": "",
    }


def help_text() -> str:
    """What `--help` prints."""
    return HELP.format(groups=preset_lines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    return command_line(
        arguments,
        help_text=help_text,
        config_name="train",
        run=lambda overrides: run(compose_config(overrides)),
        refusals=(ConfigError, StoreError),
        resolve=False,
    )


if __name__ == "__main__":
    sys.exit(main())
