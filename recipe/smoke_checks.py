"""What the steps of the smoke test have to leave behind: read from the runs' own files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from recipe.checkpoints import newest_complete
from recipe.console_format import format_number, format_seconds
from recipe.doctor_machine import in_units
from recipe.findings import FAIL, WARN
from recipe.run_files import RunFileError, read_json_lines, read_json_object
from recipe.smoke_run import SmokeFailure
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError

SELF_CHECK = "self_check/divergence_largest"


def doctor_found(target: Path) -> Callable[[Path], str]:
    """Takes the doctor's JSON out of its log into ``target``; fails where a finding does."""

    def check(log: Path) -> str:
        found = _last_object(log)
        write_atomically(target, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        by_status = {status: [one for one in found["findings"] if one["status"] == status] for status in (FAIL, WARN)}
        if by_status[FAIL]:
            raise SmokeFailure("; ".join(f"{one['name']}: {one['line']}" for one in by_status[FAIL]))
        warned = f"; warns of {', '.join(one['name'] for one in by_status[WARN])}" if by_status[WARN] else ""
        return f"{len(found['findings'])} checks{warned}"

    return check


def _last_object(log: Path) -> dict[str, Any]:
    """The last line that is the doctor's JSON object: Ray may print behind it."""
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if "findings" in found:
                return found
    raise SmokeFailure(f"{log.name} has no line with the doctor's JSON object")


def data_written(folder: Path) -> Callable[[Path], str]:
    """Both data sets are there."""

    def check(_: Path) -> str:
        names = [f"{kind}/{split}.parquet" for kind in ("tiny_world", "arithmetic") for split in ("train", "test")]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise SmokeFailure(f"{folder} lacks {', '.join(missing)}")
        return ", ".join(names)

    return check


def trained(
    folder: Path, steps: int, wanted: Mapping[str, Any], *, saved: int | None = None, resumed: int | None = None
) -> Callable[[Path], str]:
    """A run of ``steps`` steps, each once, with finite losses, that ran what it should have.

    Args:
        folder: the run's output.
        wanted: key of the configuration → value that the run has to have had, so that a preset that changed does not
            pass for the path that is to be tested.
        saved: step of the newest complete checkpoint, every byte of which is read.
        resumed: step after which the run said that it goes on.
    """

    def check(log: Path) -> str:
        try:
            rows = [row for row in read_json_lines(folder / "metrics.jsonl") if row["step"] > 0]
            summary = read_json_object(folder / "summary.json")
        except (OSError, RunFileError) as error:
            raise SmokeFailure(f"the run left no results: {error}") from error
        _steps_and_losses(rows, steps)
        config = OmegaConf.create(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        for key, value in wanted.items():
            if (found := OmegaConf.select(config, key)) != value:
                raise SmokeFailure(f"the run had {key}={found!r}, the test is for {value!r}")
        parts = [f"loss {' '.join(format_number(row['loss']) for row in rows)}"]
        if resumed is not None:
            if not re.search(rf"\bresuming after step {resumed} of {steps}\b", log.read_text("utf-8", "replace")):
                raise SmokeFailure(f"the run did not say that it resumes after step {resumed}")
            parts.insert(0, f"went on after step {resumed}")
        if saved is not None:
            parts.append(_checkpoint(folder, saved))
        difference = next((row[SELF_CHECK] for row in rows if row.get(SELF_CHECK) is not None), None)
        if difference is not None:
            parts.append(f"teacher without a context differs by {format_number(difference)}")
        if summary.get("seconds_per_step") is not None:
            parts.append(f"{format_seconds(summary['seconds_per_step'])} a step")
        return ", ".join(parts)

    return check


def _steps_and_losses(rows: list[dict[str, Any]], steps: int) -> None:
    found = [row["step"] for row in rows]
    if found != list(range(1, steps + 1)):
        raise SmokeFailure(f"metrics.jsonl has the steps {found}, wanted are 1 to {steps}, each once")
    for row in rows:
        loss = row.get("loss")
        if loss is None:
            rate = format_number(row.get("pass_rate/mean"))
            raise SmokeFailure(
                f"step {row['step']} has no loss (mean pass rate {rate}): no question was answered both rightly and "
                "wrongly, or it was not finite"
            )
        if not math.isfinite(loss):
            raise SmokeFailure(f"the loss of step {row['step']} is {loss}")


def _checkpoint(folder: Path, step: int) -> str:
    try:
        manifest = newest_complete(folder / "checkpoints")
    except ConfigError as error:
        raise SmokeFailure(str(error)) from error
    if manifest is None or manifest.step != step:
        found = "none" if manifest is None else f"that of step {manifest.step}"
        raise SmokeFailure(f"the newest complete checkpoint is {found}, wanted is step {step}")
    return f"checkpoint of step {step} ({in_units(manifest.bytes)})"
