"""Train: `python -m recipe.train method=sc_sdpo model=tiny data=tiny_world hardware=cpu`."""
# ruff: noqa: E402  (the signals come before imports that take seconds)

from __future__ import annotations

from verl_ext.preemption import PREEMPTION

if __name__ == "__main__":
    PREEMPTION.listen()

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.alarms import alarms, check_run
from recipe.checkpoints import best_step, remove_old
from recipe.cluster import importing, prepare_environment, ray_cluster
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.doctor_machine import cheap_findings
from recipe.findings import raise_failures
from recipe.output_folder import check_output_folder
from recipe.preflight import preflight
from recipe.preset_changes import preset_changes
from recipe.report import build_report
from recipe.run_files import RunFiles
from verl_ext.checkpoint_saving import point_tracker
from verl_ext.config import ConfigError
from verl_ext.heartbeat import START, Heartbeat, beat, beating
from verl_ext.loggers import Loggers, running_loggers
from verl_ext.sample_store import StoreError
from verl_ext.watchdog import Watchdog

HELP = """Train a model by pass-rate-weighted on-policy self-distillation, on verl.

  python -m recipe.train [group=preset ...] [key=value ...]

Presets:
{groups}

Often used keys:
  run.output_dir=DIR        where everything goes; a folder with checkpoints is resumed
  run.steps=N               trainer steps in all
  run.seed=N                data order, rollouts, demonstrations
  run.val_every=N           validate every N steps and after the last (-1: never)
  run.save_every=N          checkpoint every N steps (-1: only when preempted)
  run.keep_checkpoints=N    keep the newest N and the best one (-1: all)
  run.step_timeout=S        seconds without progress after which the run is ended (7200)
  distill.weighting.alpha=A distill.weighting.beta=B     question weight p^A (1-p)^B
  distill.teacher.update_rate=TAU                        EMA rate
  trainer.n_gpus_per_node=N trainer.nnodes=M             ranks
  actor_rollout_ref.*, data.*, algorithm.*, trainer.*    every key of verl's own configuration

SIGUSR1 and SIGTERM: a checkpoint at the end of the step, then exit code 75; the same command goes on from there.

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""


class _Sink:
    """Takes the trainer's metrics to the run's files, the terminal and the loggers."""

    def __init__(
        self, config: DictConfig, files: RunFiles, console: RunConsole, started: float, resume_step: int
    ) -> None:
        self.config, self.files, self.console, self.started = config, files, console, started
        self.first_step = resume_step + 1
        self.seconds_to_first_step: float | None = None
        self.loggers = Loggers()
        self.validation_seconds = 0.0
        self.step_seconds: list[float] = []
        self._validation: float | None = None

    def phase(self, text: str) -> None:
        """A stage of the start."""
        self.console.phase(text)

    def warning(self, text: str) -> None:
        """Something the user should see."""
        self.console.note(f"warning: {text}")

    def working(self, text: str, seconds_left: float | None = None) -> None:
        """What is going on beside the steps."""
        self.console.working(text, seconds_left)

    def validated(self, seconds: float) -> None:
        """Validation before the first step is not part of the time to it."""
        self._validation = seconds
        if self.seconds_to_first_step is None:
            self.validation_seconds += seconds

    def validation_items(self, step: int, counts: dict[str, Any]) -> None:
        """One row of validation.jsonl."""
        self.files.append_validation(step, counts)

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
        made_up_for = "time/step" not in row and 0 < step == self.first_step - 1
        record = (self.files.complete_metrics if made_up_for else self.files.append_metrics)(
            step, row | self.loggers.counts()
        )
        self.loggers.log(step, record)
        if step >= self.first_step or "time/step" not in row:
            self.console.step_line(record)

    def pending(self, step: int, values: dict[str, Any]) -> None:
        """The row of a step that is being saved."""
        self.files.write_pending(step, step_record(values))

    def completions(self, rows: list[dict[str, Any]]) -> None:
        """Sampled completions."""
        self.files.append_completions(rows)

    def non_finite(self, rows: list[dict[str, Any]]) -> None:
        """Rows of an optimiser step that was skipped."""
        self.files.append_non_finite(rows)

    def saved(self, step: int, size: int) -> None:
        """Older checkpoints go, where only some are to be kept."""
        run = self.config.run
        metric = f"val/mean@{run.val_samples}"

        def best(steps: list[int]) -> int | None:
            return best_step(self.files.read_metrics(), metric, steps) if run.keep_best else None

        removed = remove_old(Path(self.config.trainer.default_local_dir), run.keep_checkpoints, best)
        gone = f"; removed: {', '.join(map(str, removed))}" if removed else ""
        self.console.log(f"checkpoint of step {step} saved ({size / 1e9:.3g} GB){gone}")


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
    if config.chain.stages:
        from recipe import chain

        return chain.run(config)
    passed_over: list[str] = []
    resume_step = check_output_folder(config, output, passed_over.append)
    warnings = raise_failures(cheap_findings(config))
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
        files.write_config(OmegaConf.to_container(config, resolve=True))
        for text in passed_over:
            screen.note(f"warning: {text}")
        if resume_step:
            # verl loads what its tracker names.
            point_tracker(Path(config.trainer.default_local_dir), resume_step)
            files.truncate_to_step(resume_step)
            screen.note(f"resuming after step {resume_step} of {config.run.steps} from {output}")
            if files.recover_pending(resume_step):
                screen.note(f"the row of step {resume_step} was not written before the run ended; it is now")
            with open_dict(config):
                config.trainer.val_before_train = _validation_is_missing(config, files, resume_step)
        else:
            files.truncate_to_step(-1)
        for warning in warnings:
            screen.note(warning)
        sink = _Sink(config, files, screen, started, resume_step)
        with PREEMPTION.telling(screen.urgent), beating(output) as heart, _watched(config, heart, output):
            beat(START, step=resume_step, saved=resume_step)
            screen.phase("starting Ray")
            with importing("verl_ext.session"), ray_cluster(config):
                from verl_ext.early import start

                early = start(config)
                from verl_ext.session import run_session

                with running_loggers(config, sink.warning) as sink.loggers:
                    run_session(config, sink, early, seed=config.run.seed)
        summary = _summary(config, files, sink)
        files.write_summary(summary)
        write_changes(files, config)
        summary["report"] = str(build_report(output))
        files.write_summary(summary)
        if lines := alarm_lines(files, config):
            screen.text("\n".join(lines))
        screen.summary(summary)
    return summary


def _validation_is_missing(config: DictConfig, files: RunFiles, step: int) -> bool:
    """Whether the step to resume from should have been validated and was not: the run ended, or was cut, before."""
    every = config.run.val_every
    due = every > 0 and (step % every == 0 or step == config.run.steps)
    row = next((record for record in files.read_metrics() if record["step"] == step), None)
    return due and row is not None and row.get(f"val/mean@{config.run.val_samples}") is None


def _watched(config: DictConfig, heart: Heartbeat, output: Path) -> AbstractContextManager[None]:
    limit = config.run.step_timeout
    # Only the main thread can be woken by a signal.
    if limit < 0 or threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return Watchdog(heart, limit, output).watching()


def write_changes(files: RunFiles, config: DictConfig) -> None:
    """``changes.json``; presets that no longer compose are no reason to lose a finished run: it says so instead."""
    try:
        files.write_changes(preset_changes(config))
    except ConfigError as error:
        files.write_changes({"error": str(error)})


def alarm_lines(files: RunFiles, config: DictConfig) -> list[str]:
    """The alarms of a run, a line each, for the terminal."""
    plain = OmegaConf.to_container(config, resolve=True)
    return [f"alarm: {one.line()}" for one in alarms(check_run(files.read_metrics(), files.read_completions(), plain))]


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
