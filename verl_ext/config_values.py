"""Typed blocks of settings: checks of single values, and a mapping turned into its dataclass."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import fields, is_dataclass
from typing import Any


class ConfigError(ValueError):
    """A value that cannot be used; the message names the key, what was found and what is allowed."""


def fail(key: str, found: Any, allowed: str) -> None:
    """Raises ConfigError for a key of the ``distill`` block."""
    raise ConfigError(f"distill.{key} is {found!r}; allowed: {allowed}")


def one_of(key: str, found: Any, allowed: tuple[str, ...]) -> None:
    """Refuses what is not among the allowed words."""
    if found not in allowed:
        fail(key, found, ", ".join(allowed))


def number(key: str, found: Any, low: float, high: float | None = None, *, above: bool = False) -> None:
    """Refuses what is no number within the bounds; ``above`` leaves the lower one out."""
    bound = f"a number {'above' if above else 'from'} {low}" + (f" to {high}" if high is not None else "")
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        fail(key, found, bound)
    if found < low or (above and found == low) or (high is not None and found > high):
        fail(key, found, bound)


def optional_number(key: str, found: Any, low: float, *, above: bool = False) -> None:
    """As :func:`number`; None is fine."""
    if found is not None:
        number(key, found, low, above=above)


def build(cls: type, values: Any, path: str) -> Any:
    """The block ``path`` as its dataclass. Raises ConfigError for an unknown key or a value of another type."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is {values!r}; allowed: a block of keys")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{path}.{unknown[0]} is not a key; {path} has: {', '.join(known)}")
    built = {}
    for name, value in values.items():
        default = known[name].default_factory if known[name].default_factory is not dataclasses.MISSING else None
        nested = default if isinstance(default, type) and is_dataclass(default) else None
        built[name] = build(nested, value, f"{path}.{name}") if nested else _typed(known[name], value, path)
    return cls(**built)


def _typed(spec: dataclasses.Field, value: Any, path: str) -> Any:
    """Refuses a value of another type than the field's; a whole number is fine where a float is expected."""
    declared = str(spec.type)
    if value is None and "None" in declared:
        return None
    kind = declared.split(" ")[0]
    lists = {"list[str]": list, "list[int]": list}
    accepted = {"str": str, "bool": bool, "int": int, "float": (int, float), "dict[str,": dict, **lists}[kind]
    if not isinstance(value, accepted) or (kind in ("int", "float") and isinstance(value, bool)):
        raise ConfigError(f"{path}.{spec.name} is {value!r}; allowed: a value of type {declared}")
    return float(value) if kind == "float" else value
