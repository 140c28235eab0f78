"""Compare evaluations: `python -m recipe.compare_evaluations A B`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipe.command import exit_code
from recipe.evaluation_comparison import ComparisonError, check_comparable, compare_groups, read_evaluation
from recipe.evaluation_items import ItemError
from recipe.paired import Comparison
from recipe.run_files import RunFileError, json_line
from verl_ext.atomic import write_atomically
from verl_ext.sample_store import StoreError

DESCRIPTION = """Compare two evaluations of the same questions: difference, interval, permutation p-values, verdict.

  python -m recipe.compare_evaluations A B
  python -m recipe.compare_evaluations A1 A2 A3 --against B1 B2 B3     several training runs of each method

A and B are folders of `python -m recipe.evaluate`. Questions are paired. With one run of each the interval speaks about
other questions answered by these two runs; only with several runs of each can it speak about the methods."""
EPILOG = """Refused by name: other questions, another k, k larger than the samples, an empty or unfinished evaluation,
one whose samples were judged, drawn or prompted otherwise (--other-settings compares them all the same).
The last line on standard output is one JSON object."""


def text(comparison: Comparison, metric: str, settings: Sequence[str]) -> str:
    """What is shown to people."""
    difference = comparison.difference
    about = {
        "items": "other questions of the same kind, answered by these runs; it says nothing about other training runs",
        "seeds": "other training runs, on these questions",
        "seeds and items": "other training runs on other questions",
    }[difference.population]
    lines = [
        f"{metric}: A - B = {difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f}, "
        f"{100 * difference.level:g}% interval)",
        f"speaks about {about}",
        f"{difference.n_items} questions, {difference.n_seeds} run{'s' if difference.n_seeds > 1 else ''} of each",
    ]
    for label, value in (("questions", comparison.p_items), ("runs", comparison.p_seeds)):
        if value is not None:
            lines.append(f"permutation p over {label}: {value:.4g}")
    lines.append(f"{comparison.claim}: {comparison.verdict}")
    return "\n".join([*lines, *(f"differs: {line}" for line in settings)])


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m recipe.compare_evaluations",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("evaluations", nargs="+", type=Path, metavar="DIR", help="A and B; with --against, the runs of A")
    made.add_argument("--against", nargs="+", type=Path, metavar="DIR", help="the runs of B")
    made.add_argument("--metric", default="mean", help="mean (default), maj or pass@k, item by item")
    made.add_argument("--samples", type=int, metavar="N", help="only the first N samples of each question")
    made.add_argument("--delta", type=float, default=0.0, help="least difference of interest, a share (0)")
    made.add_argument(
        "--population",
        choices=["items", "seeds", "seeds and items"],
        help="what the interval speaks about (items; with several runs of each: seeds and items)",
    )
    made.add_argument(
        "--pairing",
        choices=["paired", "unpaired"],
        help="of runs, in the order given: paired where those of one seed share something (unpaired)",
    )
    made.add_argument("--level", type=float, default=0.95, help="of confidence (0.95)")
    made.add_argument("--leave-out-unjudged", action="store_true", help="go without questions that lack verdicts")
    made.add_argument("--other-settings", action="store_true", help="compare although sampling or verifier differ")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object there too")
    return made


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The comparison as plain values. Raises ComparisonError or ValueError."""
    folders = (arguments.evaluations, arguments.against)
    if arguments.against is None:
        if len(arguments.evaluations) != 2:
            raise ComparisonError(
                f"{len(arguments.evaluations)} evaluations given; expected A and B, or the runs of A --against the "
                "runs of B"
            )
        folders = ([arguments.evaluations[0]], [arguments.evaluations[1]])
    first, second = ([read_evaluation(folder) for folder in group] for group in folders)
    settings = check_comparable([*first, *second], other_settings=arguments.other_settings)
    several = min(len(first), len(second)) > 1
    comparison = compare_groups(
        first,
        second,
        metric=arguments.metric,
        samples=arguments.samples,
        leave_out_unjudged=arguments.leave_out_unjudged,
        delta=arguments.delta,
        population=arguments.population or ("seeds and items" if several else "items"),
        pairing=arguments.pairing or ("unpaired" if several or len(first) != len(second) else "paired"),
        level=arguments.level,
    )
    print(text(comparison, arguments.metric, settings), file=sys.stderr)
    found = asdict(comparison)
    found = {"metric": arguments.metric, **found.pop("difference"), **found}
    found |= {name: [str(folder) for folder in group] for name, group in zip("AB", folders, strict=True)}
    found["differing_settings"] = settings
    if arguments.out is not None:
        write_atomically(arguments.out, json_line(found) + "\n")
    print(json_line(found))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    given = parser().parse_args(arguments)
    return exit_code(lambda: run(given), (ComparisonError, ItemError, RunFileError, StoreError, ValueError))


if __name__ == "__main__":
    sys.exit(main())
