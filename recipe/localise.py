"""Localise: `python -m recipe.localise outputs/RUN --locate verl_ext.verifiers.tiny_world:wrong_result`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.report_charts import nice_ticks, percent
from recipe.run_files import RunFileError, json_line, read_json_lines
from recipe.svg_parts import DOT, GRID, MEAN, svg_line, svg_page, svg_text
from verl_ext.atomic import write_atomically
from verl_ext.localisation import Locate, around_wrong_step, localisation

DESCRIPTION = """Where in the responses of a run the divergence between student and teacher falls (SD-Zero's token-level
self-localisation): by outcome, on the top 5% of the tokens, and on the first wrong step where the task knows it. Reads
the sampled completions of one or more runs; distill.samples.per_step and distill.samples.every say how many there are.
The last line on standard output is one JSON object."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 60, 20, 44, 56


def read_completions(folders: Sequence[Path], steps: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Completions of runs; ``steps`` (first, last) keeps those in between. Raises RunFileError."""
    rows = [row for folder in folders for row in read_json_lines(folder / "completions.jsonl")]
    return [row for row in rows if steps is None or steps[0] <= row["step"] <= steps[1]]


def load_locate(name: str) -> Locate:
    """The function of ``package.module:function``. Raises ValueError."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--locate {name!r}: {error}; expected package.module:function") from error
    return found


def wrong_step_svg(shares: Mapping[int, float], rows: int) -> str:
    """Bars: mean share of the divergence by distance in tokens from the first wrong step."""
    ticks = nice_ticks(0.0, max(shares.values()), 5)
    base, wide = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / len(shares)

    def y(value: float) -> float:
        return base - value / ticks[-1] * (base - TOP)

    parts = [
        svg_text(LEFT, 20, f"Share of the divergence around the first wrong step, {rows} wrong answers", "start", 14)
    ]
    for tick in ticks:
        parts += [
            svg_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), GRID, 1),
            svg_text(LEFT - 8, y(tick) + 4, percent(tick), "end"),
        ]
    for number, (distance, share) in enumerate(sorted(shares.items())):
        left = LEFT + wide * number
        color = MEAN if distance == 0 else DOT
        parts.append(
            f'<rect x="{left + 2:.1f}" y="{y(share):.1f}" width="{wide - 4:.1f}" height="{base - y(share):.1f}" '
            f'fill="{color}"/>'
        )
        if distance % 5 == 0:
            parts.append(svg_text(left + wide / 2, base + 18, f"{distance:+d}" if distance else "0", "middle"))
    parts.append(svg_text((LEFT + WIDTH - RIGHT) / 2, base + 40, "tokens from the wrong result", "middle"))
    return svg_page(WIDTH, HEIGHT, "share of the divergence around the first wrong step", parts)


def lines(found: Mapping[str, Any]) -> list[str]:
    """The summary for the terminal."""
    told = []
    for side in ("right", "wrong"):
        part = found[side]
        if part["rows"]:
            told.append(
                f"{side} answers: {part['rows']}, divergence {part['divergence']:.4f} nats a token, "
                f"{percent(part['top5'])} of it on the top 5% of tokens"
            )
    step = found.get("wrong_step")
    if step and step["rows"]:
        told.append(
            f"first wrong step, {step['rows']} answers: {percent(step['share'])} of the divergence on "
            f"{percent(step['tokens'])} of the tokens; {percent(step['before'])} before it, {percent(step['after'])} "
            f"after it; the largest divergence is there in {percent(step['first'])}"
        )
    return told


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m recipe.localise", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folder of a run")
    made.add_argument(
        "--locate",
        metavar="MODULE:FUNCTION",
        help="(prompt, response) -> characters of the first wrong step, or None; for the tiny world "
        "verl_ext.verifiers.tiny_world:wrong_result",
    )
    made.add_argument("--steps", type=int, nargs=2, metavar=("FIRST", "LAST"), help="only completions of these steps")
    made.add_argument("--threshold", type=float, default=0.5, help="reward from which an answer is right (0.5)")
    made.add_argument("--plot", type=Path, metavar="SVG", help="draw the shares around the wrong step; needs --locate")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.plot and not options.locate:
            raise ValueError("--plot needs --locate")
        locate = load_locate(options.locate) if options.locate else None
        rows = read_completions(options.runs, tuple(options.steps) if options.steps else None)
        found = localisation(rows, threshold=options.threshold, locate=locate)
        if not found["right"]["rows"] + found["wrong"]["rows"]:
            raise RunFileError(
                f"{', '.join(map(str, options.runs))}: no completion carries its divergence; distill.samples.per_step "
                "and distill.samples.every say how many are written"
            )
        if options.plot:
            shares = around_wrong_step(rows, locate, threshold=options.threshold)
            if not shares:
                raise ValueError(f"--plot: {options.locate} found no wrong step")
            write_atomically(options.plot, wrong_step_svg(shares, found["wrong_step"]["rows"]))
    except (RunFileError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(found)))
    print(json_line(found, "localisation"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
