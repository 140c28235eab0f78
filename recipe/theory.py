"""Theory figures: `python -m recipe.theory --output docs/theory`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipe.output_folder import check_writable
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError


def write_figures(folder: Path) -> list[Path]:
    """Draws every figure of ``docs/theory.md`` into the folder; the same files each time.

    Raises:
        ConfigError: nothing can be written there.
    """
    check_writable(folder, "--output")
    from recipe.theory_figures import FIGURES

    paths = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.svg"
        write_atomically(path, draw())
        print(path)
        paths.append(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipe.theory",
        description="Draw the theory figures (gradient norms, weight bias, learnability, SNR bell) as SVG files. "
        "docs/theory.md says which equation and function each one shows.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the SVG files")
    options = parser.parse_args(arguments)
    try:
        write_figures(options.output)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
