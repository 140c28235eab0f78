"""What a check of the doctor found: one line, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from verl_ext.config import ConfigError
from verl_ext.sample_store import StoreError

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
STATUSES = (OK, SKIP, WARN, FAIL)
"""From the best to the worst; ``skip``: not looked at, and the line says why."""

_STYLES = {OK: "green", SKIP: "dim", WARN: "yellow", FAIL: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    status: str
    line: str
    todo: str = ""


def attempt(name: str, check: Callable[[], str | None | Finding]) -> Finding:
    """Runs a check: a returned text is its line, ConfigError and StoreError are failures with their own words.

    Anything else that is raised is a failure too, named by its type: one broken check must not hide the others.
    """
    try:
        found = check()
    except (ConfigError, StoreError) as error:
        return Finding(name, FAIL, str(error))
    except Exception as error:
        line = (str(error).strip().splitlines() or ["no message"])[0]
        return Finding(name, FAIL, f"{type(error).__name__}: {line}", "the check itself broke: please report it")
    return found if isinstance(found, Finding) else Finding(name, OK, found or "fine")


def raise_failures(findings: Iterable[Finding]) -> list[str]:
    """The warnings as lines. Raises ConfigError for the first failure."""
    warnings = []
    for finding in findings:
        text = f"{finding.name}: {finding.line}" + (f"; {finding.todo}" if finding.todo else "")
        if finding.status == FAIL:
            raise ConfigError(text)
        if finding.status == WARN:
            warnings.append(f"warning: {text}")
    return warnings


def worst(findings: Iterable[Finding]) -> str:
    """The status of the whole; ``ok`` where nothing warns or fails."""
    found = max((STATUSES.index(finding.status) for finding in findings), default=0)
    return OK if found <= STATUSES.index(SKIP) else STATUSES[found]


def as_records(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(finding) for finding in findings]


def print_table(findings: Sequence[Finding], *, width: int | None = None) -> None:
    """The table on standard output, rows in the order of the checks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=width)
    if width is None and not console.is_terminal:
        console = Console(width=160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "", "found"):
        table.add_column(column, no_wrap=column != "found", overflow="fold")
    for finding in findings:
        line = Text(finding.line)
        if finding.todo:
            line.append(f"\n→ {finding.todo}", style="italic")
        table.add_row(Text(finding.name), Text(finding.status, style=_STYLES[finding.status]), line)
    console.print(table)
