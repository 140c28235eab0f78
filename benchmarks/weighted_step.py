"""Does the question weight cost anything? SC-SDPO's step time against SDPO's, on the same replayed batch.

    python benchmarks/weighted_step.py [--cycles 20] [--out FILE] [key=value ...]

One run on the real stack trains the same rollouts again and again with a learning rate of 0 and alternates, step by
step: SDPO and SC-SDPO with all rows forwarded, then both with compaction. Rollout and weight sync are left out of the
times. Prints the median ratio of the pairs with a bootstrap interval of 95%.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cluster import prepare_environment, ray_cluster
from recipe.compose import compose_config

MODES = (("sdpo", False), ("sc_sdpo", False), ("sdpo", True), ("sc_sdpo", True))
PHASES = ("plan", "student_pass", "teacher_pass", "update_actor", "teacher_update")
EXPONENTS = {"sdpo": 0.0, "sc_sdpo": 0.5}


class Times:
    """Keeps the seconds of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One step."""
        self.steps.append({key: values.get(f"timing_s/{key}", 0.0) for key in PHASES} | {
            "rows": values.get("compaction/rows_forwarded", 0.0), "driver_ms": values.get("time/driver_plan_ms", 0.0)
        })

    def completions(self, rows: list[dict[str, Any]]) -> None: ...

    def non_finite(self, rows: list[dict[str, Any]]) -> None: ...

    def phase(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def validated(self, seconds: float) -> None: ...


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (10_000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> int:
    """Runs and prints; the result is also written to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=20, help="pairs of each kind")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    steps = len(MODES) * (arguments.cycles + 1)
    with tempfile.TemporaryDirectory() as folder:
        config = compose_config([
            "method=sdpo", f"run.steps={steps}", "run.val_every=-1", "run.val_before=false", "run.save_every=-1",
            f"run.output_dir={folder}", "actor_rollout_ref.actor.optim.lr=0", "trainer.experiment_name=replay",
            "skip.rollout_tq.enable=true", "skip.rollout_tq.action=repeat", f"skip.rollout_tq.dump_dir={folder}",
            f"skip.rollout_tq.steps={list(range(1, steps + 1))}".replace(" ", ""), *arguments.overrides,
        ])  # fmt: skip
        prepare_environment(config.run.platform)
        times = Times()
        with ray_cluster(config):
            from verl_ext.early import start

            early = start(config)
            from verl_ext.session import run_session
            from verl_ext.trainer import DistillTrainer

            class Alternating(DistillTrainer):
                def on_step_begin(self) -> None:
                    super().on_step_begin()
                    method, compaction = MODES[(self.global_steps - 1) % len(MODES)]
                    exponent = EXPONENTS[method]
                    self.distill = dataclasses.replace(
                        self.distill,
                        weighting=dataclasses.replace(self.distill.weighting, alpha=exponent, beta=exponent),
                        compaction=dataclasses.replace(self.distill.compaction, enable=compaction),
                    )

            run_session(config, times, early, trainer_class=Alternating)
    measured = times.steps[len(MODES) :]  # the first cycle warms up
    seconds = np.array([sum(step[phase] for phase in PHASES) for step in measured]).reshape(-1, len(MODES))
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU",
        "pairs": len(seconds),
    }
    for name, (base, weighted) in {"same rows forwarded": (0, 1), "with compaction": (2, 3)}.items():
        ratios = seconds[:, weighted] / seconds[:, base]
        low, high = interval(ratios)
        result[name] = {
            "ratio": round(float(np.median(ratios)), 4), "low": round(low, 4), "high": round(high, 4),
            "sdpo_seconds": round(float(np.median(seconds[:, base])), 4),
            "sc_sdpo_seconds": round(float(np.median(seconds[:, weighted])), 4),
            "sdpo_rows": measured[base]["rows"], "sc_sdpo_rows": measured[weighted]["rows"],
        }  # fmt: skip
    result["driver_ms"] = round(statistics.median(step["driver_ms"] for step in measured), 2)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
