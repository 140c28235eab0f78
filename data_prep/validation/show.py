"""A report for people: a table with one line per check and file, then the rows."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.validation.report import FAILED, NOT_RUN, NOTED, Report

_STYLES = {FAILED: "bold red", NOT_RUN: "yellow", NOTED: "cyan"}
_PIPE_WIDTH = 200


def show(report: Report, limit: int, stream: IO[str]) -> None:
    """Prints the report.

    Args:
        report: what was found.
        limit: findings named per check and file; 0: all.
        stream: where to, as a rule stdout.
    """
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=_PIPE_WIDTH)
    table = Table(box=None, pad_edge=False)
    for name in ("file", "check"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "problems", "notes"):
        table.add_column(name, justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("", overflow="fold")
    above = ""
    for check in report.checks:
        name, above = "" if check.file == above else check.file, check.file
        verdict = Text(check.verdict, style=_STYLES.get(check.verdict, "green"))
        facts = "; ".join(part for part in (check.not_run, check.facts) if part)
        numbers = [str(number) for number in (check.rows, check.problems, check.notes)]
        table.add_row(Text(name), check.name, *numbers, verdict, Text(facts))
    console.print(table)
    for check in report.checks:
        if not check.findings:
            continue
        shown = check.findings if limit == 0 else check.findings[:limit]
        console.print(Text(f"\n{check.name}, {check.file}:"))
        for finding in shown:
            console.print(Text(f"  {finding}"), soft_wrap=True)
        if len(shown) < len(check.findings):
            rest = len(check.findings) - len(shown)
            console.print(Text(f"  and {rest} more (--show 0 shows all, --report FILE.json writes all)"))
    console.print()
    unwell = sum(check.verdict in (FAILED, NOT_RUN) for check in report.checks)
    console.print("no problems found" if report.ok else f"{unwell} of {len(report.checks)} checks failed or not run")
