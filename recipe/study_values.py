"""Values of a study's declaration, checked: overrides, seconds, and what Hydra's command line calls a value."""

from __future__ import annotations

import json
from typing import Any

from verl_ext.config import ConfigError

# Set by the runner for every run.
RESERVED = ("run.seed", "run.output_dir")


def override_value(value: Any) -> str:
    """A YAML value as Hydra reads it on the command line."""
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, bool | list) else str(value)


def overrides_of(found: Any, where: str, key: str) -> list[str]:
    """A list of key=value. Raises ConfigError for another thing, or a key that the runner sets."""
    good = isinstance(found, list) and all(isinstance(item, str) for item in found)
    expect(good, where, key, found, "a list of key=value")
    for item in found:
        name, equals, _ = item.partition("=")
        expect(bool(equals) or item.startswith("~"), where, key, item, "key=value")
        if name.lstrip("+") in RESERVED:
            raise ConfigError(f"{where}: {key} sets {name}, which every run is given; use seeds and --outputs")
    return list(found)


def seconds_of(found: Any, where: str, key: str) -> float | None:
    """A number above 0, or None. Raises ConfigError for another thing."""
    good = found is None or (isinstance(found, int | float) and not isinstance(found, bool) and found > 0)
    expect(good, where, key, found, "a number above 0")
    return None if found is None else float(found)


def expect(condition: Any, where: str, key: str, found: Any, allowed: str) -> None:
    """Raises ConfigError with the file, the key, what was found and what is allowed, where the condition is false."""
    if not condition:
        raise ConfigError(f"{where}: {key} is {found!r}; allowed: {allowed}")
