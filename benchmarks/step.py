"""What does a step of SDPO cost beside GRPO with a reference KL, and what does the question weight cost?

    python benchmarks/step.py [--cycles 20] [--out FILE] [key=value ...]

One run on the real stack trains the same rollouts again and again with a learning rate of 0 and changes the method from
step to step, in turn: GRPO with a KL to a reference policy; SDPO with the student's own prompt as the teacher's (equal
lengths, every row); SDPO and SC-SDPO with their real teacher prompts, first with every row forwarded, then without the
rows whose loss is exactly 0. The reference policy and the teacher are the same second copy of the model.

Left out of the times: rollout, weight sync, validation. Prints the median ratio of the pairs of a cycle with a
bootstrap interval of 95%, in all and by phase. Beside the tiny preset any other works: add `model=... data=...`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from recipe.cluster import prepare_environment, ray_cluster
from recipe.compose import compose_config


class Mode(NamedTuple):
    """One method of the cycle."""

    coefficient: float
    exponent: float = 0.0
    context: str = "sibling"
    compaction: bool = False


MODES = {
    "grpo_kl": Mode(0.0),
    "sdpo_equal_lengths": Mode(1.0, context="none"),
    "sdpo": Mode(1.0),
    "sc_sdpo": Mode(1.0, exponent=0.5),
    "sdpo_compacted": Mode(1.0, compaction=True),
    "sc_sdpo_compacted": Mode(1.0, exponent=0.5, compaction=True),
}
# Phase -> verl's and our timers; a method has the timers it has.
PHASES = {
    "plan, advantages": ("plan", "adv"),
    "student pass": ("student_pass", "old_log_prob"),
    "reference or teacher pass": ("ref", "teacher_pass"),
    "update": ("update_actor",),
    "teacher update": ("teacher_update",),
}
PAIRS = (
    ("sdpo_equal_lengths", "grpo_kl"),
    ("sdpo", "grpo_kl"),
    ("sc_sdpo", "sdpo"),
    ("sdpo_compacted", "sdpo"),
    ("sc_sdpo_compacted", "sdpo_compacted"),
    ("sc_sdpo_compacted", "grpo_kl"),
)


class Times:
    """Keeps the seconds of every step."""

    def __init__(self, steps: int) -> None:
        self.total = steps
        self.steps: list[dict[str, Any]] = []

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One step."""
        if "timing_s/step" not in values:
            return
        seconds = {phase: sum(values.get(f"timing_s/{key}", 0.0) for key in keys) for phase, keys in PHASES.items()}
        self.steps.append(seconds | {"rows": values.get("compaction/rows_forwarded")})
        if step % len(MODES) == 0:
            print(f"step {step} of {self.total}", file=sys.stderr, flush=True)

    def completions(self, rows: list[dict[str, Any]]) -> None: ...

    def non_finite(self, rows: list[dict[str, Any]]) -> None:
        raise RuntimeError(f"{len(rows)} rows of a step that is not finite: its time would mean nothing")

    def phase(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def working(self, text: str, seconds_left: float | None = None) -> None: ...

    def validated(self, seconds: float) -> None: ...

    def pending(self, step: int, values: dict[str, Any]) -> None: ...

    def saved(self, step: int, size: int) -> None: ...


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (10_000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def measure(cycles: int, overrides: list[str]) -> Times:
    """The run; one cycle more than asked for, because the first warms up."""
    steps = len(MODES) * (cycles + 1)
    with tempfile.TemporaryDirectory() as folder:
        config = compose_config([
            "method=sdpo", f"run.steps={steps}", "run.val_every=-1", "run.val_before=false", "run.save_every=-1",
            f"run.output_dir={folder}", "actor_rollout_ref.actor.optim.lr=0", "trainer.experiment_name=replay",
            "skip.rollout_tq.enable=true", "skip.rollout_tq.action=repeat", f"skip.rollout_tq.dump_dir={folder}",
            f"skip.rollout_tq.steps={list(range(1, steps + 1))}".replace(" ", ""),
            "actor_rollout_ref.actor.kl_loss_coef=0.001", *overrides,
        ])  # fmt: skip
        # A run may not have both, because the teacher stands in the reference policy's place: here they take turns.
        config.actor_rollout_ref.actor.use_kl_loss = True
        prepare_environment(config.run.platform)
        times = Times(steps)
        with ray_cluster(config):
            from verl_ext.early import start

            early = start(config)
            from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
            from verl.utils.config import omega_conf_to_dataclass

            from verl_ext.loss import Loss
            from verl_ext.session import run_session
            from verl_ext.trainer import DistillTrainer

            class Alternating(DistillTrainer):
                """Another method every step."""

                def on_step_begin(self) -> None:
                    super().on_step_begin()
                    mode = list(MODES.values())[(self.global_steps - 1) % len(MODES)]
                    self.distill = dataclasses.replace(
                        self.distill,
                        coefficient=mode.coefficient,
                        weighting=dataclasses.replace(self.distill.weighting, alpha=mode.exponent, beta=mode.exponent),
                        compaction=dataclasses.replace(self.distill.compaction, enable=mode.compaction),
                        context=dataclasses.replace(self.distill.context, kind=mode.context),
                        samples=dataclasses.replace(self.distill.samples, per_step=0),
                    )
                    # Only GRPO reads the reference policy's log-probabilities.
                    self.use_reference_policy = not self.distill.enabled
                    self.config.actor_rollout_ref.actor.use_kl_loss = not self.distill.enabled
                    actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
                    self.actor_rollout_wg.set_loss_fn(Loss(self.distill, actor))

                def _update_actor(self, batch: Any, metrics: dict) -> Any:
                    # verl's own, without the statistics that we add to a GRPO run for its report.
                    return PPOTrainerSync._update_actor(self, batch, metrics)

            run_session(config, times, early, trainer_class=Alternating)
    return times


def summarize(times: Times) -> dict[str, Any]:
    """Medians of every method and ratios of the pairs."""
    measured = times.steps[len(MODES) :]
    names = list(MODES)
    seconds = {name: np.array([[step[phase] for phase in PHASES] for step in measured[i :: len(names)]])
               for i, name in enumerate(names)}  # fmt: skip
    result: dict[str, Any] = {"seconds": {}, "ratios": {}}
    for i, name in enumerate(names):
        result["seconds"][name] = {
            "all": round(float(np.median(seconds[name].sum(1))), 4),
            **{phase: round(float(np.median(seconds[name][:, j])), 4) for j, phase in enumerate(PHASES)},
            "rows_forwarded": measured[i]["rows"],
        }
    for one, other in PAIRS:
        ratios = seconds[one].sum(1) / seconds[other].sum(1)
        low, high = interval(ratios)
        result["ratios"][f"{one} / {other}"] = {
            "ratio": round(float(np.median(ratios)), 4), "low": round(low, 4), "high": round(high, 4),
            "by_phase": {
                phase: round(float(np.median(seconds[one][:, j] / seconds[other][:, j])), 4)
                for j, phase in enumerate(PHASES) if (seconds[other][:, j] > 1e-3).all()
            },
        }  # fmt: skip
    return result


def main() -> int:
    """Runs and prints; the result is also written to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=20, help="pairs of each kind (default: 20)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("overrides", nargs="*", help="as of recipe.train")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    result = {
        "date": date.today().isoformat(),
        "machine": device,
        "torch": torch.__version__,
        "cycles": arguments.cycles,
        "overrides": arguments.overrides,
        **summarize(measure(arguments.cycles, arguments.overrides)),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
