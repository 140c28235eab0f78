"""Do runs that must agree agree? Replays the same rollouts through variants of one method and compares them.

    python benchmarks/replay_equality.py --out DIR [--steps 4] [--prompts 8] [--only NAME ...]

Every variant runs on the real stack with the rollouts of the first run (verl's rollout skip). `exact` variants must
give the same weights bit for bit; the others the same loss and gradient norm within fp32 rounding. Exits with 1 where
one does not. About half a minute a variant on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.cluster import prepare_environment, ray_cluster
from recipe.compose import compose_config
from recipe.train import run

TOLERANCE = 2e-5
"""Relative, on the loss and the gradient norm of the first step (fp32 sums in another order)."""


@dataclass
class Variant:
    """One run and what it must equal."""

    name: str
    overrides: list[str] = field(default_factory=list)
    like: str = "sdpo"
    exact: bool = False
    prepare: Callable[[Path, Path], None] | None = None


def _resume_from(step: int) -> Callable[[Path, Path], None]:
    """The folder of a run that was stopped after ``step``."""

    def prepare(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        for folder in (target / "checkpoints").glob("global_step_*"):
            if int(folder.name.rsplit("_", 1)[1]) > step:
                shutil.rmtree(folder)
        (target / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))

    return prepare


VARIANTS = [
    Variant("sdpo", ["method=sdpo"], exact=True),
    Variant("kernel_at_zero", ["method=sc_sdpo", "distill.weighting.alpha=0", "distill.weighting.beta=0"], exact=True),
    Variant("resumed_at_2", ["method=sdpo"], exact=True, prepare=_resume_from(2)),
    Variant("all_rows_forwarded", ["method=sdpo", "distill.compaction.enable=false"]),
    Variant(
        "micro_batch_1",
        ["method=sdpo", "actor_rollout_ref.actor.use_dynamic_bsz=false"]
        + ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]
        + ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4"],
    ),
    Variant(
        "micro_batch_4",
        ["method=sdpo", "actor_rollout_ref.actor.use_dynamic_bsz=false"]
        + ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"]
        + ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4"],
    ),
    Variant(
        "small_token_budget",
        ["method=sdpo", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=400"]
        + ["actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=400"]
        + ["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=400"],
    ),
    Variant("packed", ["method=sdpo", "actor_rollout_ref.model.use_remove_padding=true"]),
    Variant("two_ranks", ["method=sdpo", "trainer.n_gpus_per_node=2"]),
    Variant("support_from_a_student_pass", ["method=sdpo", "distill.teacher.states=log_probs"]),
    Variant("from_hidden_states", ["method=sdpo", "distill.divergence.inputs=hidden_states"]),
    Variant("full", ["method=sdpo", "divergence=jsd_full"], like="full", exact=True),
    Variant(
        "full_two_ranks_packed",
        ["method=sdpo", "divergence=jsd_full", "trainer.n_gpus_per_node=2"]
        + ["actor_rollout_ref.model.use_remove_padding=true"],
        like="full",
    ),
    Variant("faithful", ["method=sdpo_faithful"], like="faithful", exact=True),
    Variant(
        "faithful_with_verls_old_log_probs",
        ["method=sdpo_faithful", "distill.reuse_log_probs=never"],
        like="faithful",
    ),
    Variant("sc_sdpo", ["method=sc_sdpo"], like="sc_sdpo", exact=True),
    Variant("grpo", ["method=grpo"], like="grpo", exact=True),
    Variant("grpo_with_verls_old_log_probs", ["method=grpo", "distill.reuse_log_probs=never"], like="grpo"),
    Variant("sc_sdpo_all_rows", ["method=sc_sdpo", "distill.compaction.enable=false"], like="sc_sdpo"),
    Variant(
        "sc_sdpo_two_ranks_packed",
        ["method=sc_sdpo", "trainer.n_gpus_per_node=2", "actor_rollout_ref.model.use_remove_padding=true"],
        like="sc_sdpo",
    ),
]


def main() -> int:
    """Runs the variants and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; those already there are kept")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a batch, 8 rollouts each")
    parser.add_argument("--only", nargs="*", help="names of variants (sdpo and sc_sdpo always run)")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    common = [
        f"run.steps={arguments.steps}",
        "run.val_every=-1",
        "run.val_before=false",
        "run.save_every=2",
        "run.quiet=true",
        f"data.train_batch_size={arguments.prompts}",
        "distill.fingerprints=true",
        "trainer.experiment_name=replay",
        "skip.rollout_tq.enable=true",
        f"skip.rollout_tq.dump_dir={out}/rollouts",
        f"skip.rollout_tq.steps={list(range(1, arguments.steps + 1))}".replace(" ", ""),
    ]
    chosen = [v for v in VARIANTS if not arguments.only or v.name in arguments.only or v.name == v.like]
    prepare_environment("cpu")
    largest = compose_config(common + ["trainer.n_gpus_per_node=2"])
    with ray_cluster(largest):
        for variant in chosen:
            folder = out / variant.name
            if (folder / "summary.json").exists() and variant.prepare is None:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            if variant.prepare is not None:
                variant.prepare(out / variant.like, folder)
            print(f"running {variant.name}", flush=True)
            run(compose_config(common + variant.overrides + [f"run.output_dir={folder}"]))
    failures = 0
    rows = []
    for variant in chosen:
        rows.append(_compare(out, variant))
        failures += not rows[-1]["agrees"]
    (out / "equality.json").write_text(json.dumps(rows, indent=1))
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    return 1 if failures else 0


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _compare(out: Path, variant: Variant) -> dict[str, Any]:
    mine, reference = _records(out / variant.name), _records(out / variant.like)
    loss, norm = "distill/loss" if "distill/loss" in reference[0] else "loss", "actor/grad_norm"
    worst = max(abs(mine[0][key] - reference[0][key]) / max(abs(reference[0][key]), 1e-12) for key in (loss, norm))
    prints = [
        [{key: value for key, value in record.items() if key.startswith("fingerprint/")} for record in records]
        for records in (mine, reference)
    ]
    identical = prints[0] == prints[1] and [r[loss] for r in mine] == [r[loss] for r in reference]
    return {
        "variant": variant.name,
        "like": variant.like,
        "agrees": identical if variant.exact else worst <= TOLERANCE,
        "identical": identical,
        "relative_difference": float(f"{worst:.3g}"),
        "last_loss": mine[-1][loss],
        "reference_last_loss": reference[-1][loss],
        "steps": len(mine),
    }


if __name__ == "__main__":
    sys.exit(main())
