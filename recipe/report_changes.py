"""``changes.json`` of a run as the report shows it: what the user set against the presets, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.report_completions import shortened
from recipe.run_files import RunFileError, read_json_object

MAX_VALUE = 300  # characters
Line = tuple[str, str, str]
"""Key, value of the presets, value of the run."""


@dataclass(frozen=True)
class ChangesView:
    """``own``: keys that the user set; ``following``: others that differ. ``error`` says why nothing is known."""

    presets: list[str] = field(default_factory=list)
    own: list[Line] = field(default_factory=list)
    following: list[Line] = field(default_factory=list)
    error: str = ""


def changes_view(path: Path) -> ChangesView:
    """Reads the file. Raises RunFileError where it holds something else."""
    if not path.exists():
        return ChangesView(error=f"{path.name} is written when a run ends, and this run has none.")
    found = read_json_object(path)
    if "error" in found:
        return ChangesView(error=str(found["error"]))
    changes, presets = found.get("changes"), found.get("presets")
    if not isinstance(changes, list) or not isinstance(presets, list) or not all(isinstance(o, dict) for o in changes):
        raise RunFileError(f'{path}: expected "presets" and "changes", a list each; found: {", ".join(found) or "{}"}')
    return ChangesView(
        list(map(str, presets)),
        _lines([one for one in changes if one.get("set")]),
        _lines([one for one in changes if not one.get("set")]),
    )


def _lines(changes: Sequence[dict[str, Any]]) -> list[Line]:
    return [(str(one.get("key")), _text(one.get("preset")), _text(one.get("run"))) for one in changes]


def _text(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return shortened(text, MAX_VALUE, "config.yaml")
