"""What a run over several nodes must have left in its files. Read after its end; shared by the campaigns on nodes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.attempts import ATTEMPTS
from recipe.checkpoints import newest_complete
from recipe.run_files import read_json_lines
from verl_ext.config import ConfigError

NUMBERS = ("loss", "reward/mean", "time/step")
"""Of every row, finite: a step that was made has them all."""


def steps_amiss(rows: Sequence[dict[str, Any]], steps: int) -> dict[str, list[int]]:
    """Steps of 1 to ``steps`` without a row, and those with more than one or beyond the last."""
    counts = Counter(row["step"] for row in rows if row["step"] > 0)
    return {
        "lost": [step for step in range(1, steps + 1) if not counts[step]],
        "doubled": sorted(step for step, count in counts.items() if count > 1 or step > steps),
    }


def not_finite(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What should be a finite number and is not, as "STEP KEY" (null is how the files write what is not finite)."""
    wrong = []
    for row in rows:
        for key in NUMBERS if row["step"] > 0 else ():
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                wrong.append(f"{row['step']} {key}")
    return wrong


def run_checks(folder: Path, steps: int, ranks: int) -> dict[str, Any]:
    """Rows, last checkpoint and attempts of a finished run in ``folder``.

    Returns:
        steps_lost, steps_doubled, not_finite, checkpoint_step (None: none is whole), checkpoint_ranks,
        ranks_without_files, outcomes (of the supervisor's attempts), finished (whether there is a summary).
    """
    metrics, attempts = folder / "metrics.jsonl", folder / ATTEMPTS
    rows = read_json_lines(metrics) if metrics.exists() else []
    amiss = steps_amiss(rows, steps)
    try:
        manifest = newest_complete(folder / "checkpoints")
    except ConfigError:
        manifest = None
    files = manifest.files if manifest else {}
    return {
        "steps_lost": amiss["lost"],
        "steps_doubled": amiss["doubled"],
        "not_finite": not_finite(rows),
        "checkpoint_step": manifest.step if manifest else None,
        "checkpoint_ranks": manifest.world_size if manifest else None,
        "ranks_without_files": [
            rank for rank in range(ranks) if not any(f"_world_size_{ranks}_rank_{rank}." in name for name in files)
        ],
        "outcomes": [row["outcome"] for row in read_json_lines(attempts)] if attempts.exists() else [],
        "finished": (folder / "summary.json").exists(),
    }


def complaints(found: dict[str, Any], steps: int, ranks: int) -> list[str]:
    """What :func:`run_checks` found wrong, in words; empty: nothing."""
    said = []
    for key, words in (
        ("steps_lost", "steps without a row in metrics.jsonl"),
        ("steps_doubled", "steps with several rows, or beyond the last"),
        ("not_finite", "numbers that are missing or not finite"),
        ("ranks_without_files", "ranks without a file in the last checkpoint"),
    ):
        if found[key]:
            said.append(f"{words}: {', '.join(map(str, found[key]))}")
    if found["checkpoint_step"] != steps:
        said.append(f"the newest whole checkpoint is of step {found['checkpoint_step']}, not {steps}")
    elif found["checkpoint_ranks"] != ranks:
        said.append(f"the last checkpoint is of {found['checkpoint_ranks']} ranks, not {ranks}")
    if not found["finished"]:
        said.append("the run has no summary: it did not finish")
    return said
