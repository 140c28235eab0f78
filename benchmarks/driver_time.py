"""What the driver spends on pass rates, weights and teacher contexts, and how it grows with the batch.

    python benchmarks/driver_time.py [--rows 128 1024 10000 100000] [--out FILE]

No Ray: the pure functions on tiny-world prompts, groups of 8, half of the questions with a success. Median of 3.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from recipe.compose import ROOT
from verl_ext.batch_plan import RowBatch, plan_batch
from verl_ext.config import ContextConfig, WeightingConfig
from verl_ext.pass_rates import group_pass_rates
from verl_ext.weighting import question_weights

GROUP = 8


def make_batch(rows: int) -> RowBatch:
    """Rows of random outcome with distinct questions and demonstrations."""
    random = np.random.default_rng(0)
    questions = rows // GROUP
    rewards = (random.random((questions, GROUP)) < random.random((questions, 1))).reshape(-1).astype(np.float64)
    uid = [f"q{i // GROUP}" for i in range(questions * GROUP)]
    digits = random.integers(0, 10, (questions, 4))
    prompts = [f"Work left to right mod 10: {a}(a)-{b}(b)-{c}(c)-{d}" for a, b, c, d in digits]
    return RowBatch(
        uids=uid,
        rollout_index=[i % GROUP for i in range(len(uid))],
        rewards=torch.from_numpy(rewards),
        errors=[False] * len(uid),
        responses=[f"(a)6-0=6(b)6-8=8(c)8-6=2\\boxed{{{i % 10}}}" for i in range(len(uid))],
        feedback=None,
        raw_prompts=[[{"role": "user", "content": prompts[i // GROUP]}] for i in range(len(uid))],
        prompt_lengths=[28] * len(uid),
        response_lengths=[25] * len(uid),
        question_ids=uid,
    )


def seconds(function) -> float:
    """Median of three calls."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> int:
    """Prints a row per batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 1024, 10_000, 100_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny_world" / "plain")
    weighting = WeightingConfig(alpha=0.5, beta=0.5)
    table = []
    for rows in arguments.rows:
        batch = make_batch(rows)
        rates = group_pass_rates(batch.uids, batch.rewards, None)
        row = {
            "rows": len(batch),
            "pass_rates_ms": seconds(lambda b=batch: group_pass_rates(b.uids, b.rewards, None)),
            "weights_ms": seconds(lambda r=rates: question_weights(r.rates_P, alpha=0.5, beta=0.5)),
            "all_with_contexts_ms": seconds(
                lambda b=batch: plan_batch(b, weighting=weighting, context=ContextConfig(), tokenizer=tokenizer)
            ),
        }
        table.append({key: round(1000 * value, 2) if key.endswith("ms") else value for key, value in row.items()})
        print(table[-1], flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, CPU, 1 thread", "table": table}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
