"""What the report says about a run before its curves: header and key numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.alarm_looks import Record
from recipe.console_format import format_seconds, validation_key
from recipe.report_charts import percent
from recipe.run_files import as_number

# Where a fact stands in the configuration: the first of these dotted keys that has a value.
FACT_KEYS: dict[str, tuple[str, ...]] = {
    "Method": ("method.name", "method", "recipe.method.name", "recipe.method", "trainer.experiment_name"),
    "Model": ("model.name", "actor_rollout_ref.model.path", "model.path", "model"),
    "Data": ("data.name", "recipe.data", "data.train_files"),
    "Hardware": ("hardware.name", "recipe.hardware", "hardware"),
}
LIBRARY_KEYS = ("environment.versions", "environment.libraries", "versions", "libraries")
MACHINE_KEYS = ("environment.machine", "machine")


@dataclass(frozen=True)
class KeyNumber:
    """One of the large numbers at the top."""

    label: str
    value: str
    detail: str = ""
    tone: str = ""  # "good", "bad" or nothing


def lookup(config: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key, or None."""
    value: Any = config
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _first(config: Mapping[str, Any], keys: Sequence[str], kinds: tuple[type, ...]) -> Any:
    return next((value for key in keys if isinstance(value := lookup(config, key), kinds) and value), None)


def describe(config: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record]) -> list[tuple[str, str]]:
    """The header's lines: method, model, data, hardware, steps, libraries, machine; only what is known."""
    facts: list[tuple[str, str]] = []
    for name, keys in FACT_KEYS.items():
        value = summary.get(name.lower()) or _first(config, keys, (str, list))
        if value:
            facts.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    done = records[-1]["step"]
    planned = next(
        (as_number(lookup(config, key)) for key in ("trainer.total_training_steps", "steps") if lookup(config, key)),
        None,
    )
    facts.append(("Steps", f"{done} of {planned:.0f}" if planned and planned > done else str(done)))
    for name, keys in (("Libraries", LIBRARY_KEYS), ("Machine", MACHINE_KEYS)):
        value = _first(config, keys, (str, Mapping))
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        if value:
            facts.append((name, value))
    return facts


def key_numbers(records: Sequence[Record], summary: Mapping[str, Any]) -> list[KeyNumber]:
    """Validation before and after, what a step takes, and how much of the data trains."""
    cards: list[KeyNumber] = []
    metric = summary.get("metric")
    if not isinstance(metric, str) or not _known(records, metric):
        metric = next((key for record in records if (key := validation_key(record))), None)
    if metric:
        first, last = _known(records, metric)[0], _known(records, metric)[-1]
        name = metric.removeprefix("val/")
        if first[0] == last[0]:
            cards.append(KeyNumber(f"validation {name}", percent(first[1]), f"measured once, at step {first[0]}"))
        else:
            change = 100 * (last[1] - first[1])
            tone = "good" if change > 0 else "bad" if change < 0 else ""
            detail = f"{change:+.1f} points, step {first[0]} → {last[0]}"
            cards.append(KeyNumber(f"validation {name}", f"{percent(first[1])} → {percent(last[1])}", detail, tone))
    rewards = [value for _, value in _known(records, "reward/mean")]
    if rewards:
        cards.append(KeyNumber("training reward", f"{rewards[0]:.2f} → {rewards[-1]:.2f}", "first and last step"))
    start = as_number(summary.get("seconds_to_first_step"))
    if start is None:
        start = next((value for _, value in _known(records, "time/to_first_step")), None)
    if start is not None:
        cards.append(KeyNumber("to the first step", format_seconds(start), "start-up included"))
    times = [value for step, value in _known(records, "time/step") if step > 0]
    if times:
        cards.append(KeyNumber("per step", format_seconds(statistics.median(times)), f"median of {len(times)}"))
    shares = [value for _, value in _known(records, "rows/train_share")]
    if shares:
        cards.append(KeyNumber("rows that train", percent(statistics.fmean(shares)), "mean over steps"))
    return cards


def _known(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    return [(one["step"], value) for one in records if (value := as_number(one.get(key))) is not None]
