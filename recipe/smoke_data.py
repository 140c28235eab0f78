"""Questions for the first contact with a cluster, made here: no download, and some that a small model can solve.

    python -m recipe.smoke_data --out DIR

``DIR/tiny_world`` is the tiny world's data for its own model; ``DIR/arithmetic`` has the same columns and asks for sums
and products in plain words, boxed as in GSM8K. Easy and hard ones are mixed: SC-SDPO weights by pass rates that are
neither 0 nor 1.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import tiny_world
from data_prep.schema import make_row, write_parquet

SIZES = {"train": 64, "test": 16}
DATA_SOURCE = "smoke_arithmetic"
WORDS = "Work out {problem}. Think step by step, then give the result as \\boxed{{number}}."
TERMS = 5


def problem(rng: random.Random) -> str:
    """A sum of up to :data:`TERMS` terms, each a number or a product of two."""
    terms = [
        f"{rng.randint(2, 99)} * {rng.randint(2, 29)}" if rng.random() < 0.5 else str(rng.randint(2, 999))
        for _ in range(rng.randint(1, TERMS))
    ]
    text = terms[0]
    for term in terms[1:]:
        text += rng.choice((" + ", " - ")) + term
    return text


def value(text: str) -> int:
    """Of such a sum."""
    total, sign = 0, 1
    for word in text.replace(" * ", "*").split():
        if word in ("+", "-"):
            sign = 1 if word == "+" else -1
            continue
        left, _, right = word.partition("*")
        total += sign * int(left) * int(right or 1)
    return total


def rows(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different questions, the same ones each time; no question of ``test`` is in ``train``."""
    rng, found = random.Random(seed), list[str]()
    while len(found) < sum(SIZES.values()):
        text = problem(rng)
        if text not in found:
            found.append(text)
    chosen = found[:count] if split == "train" else found[-count:]
    return [
        make_row(
            data_source=DATA_SOURCE,
            prompt=[{"role": "user", "content": WORDS.format(problem=text)}],
            ground_truth=str(value(text)),
            split=split,
            index=index,
            problem=text,
        )
        for index, text in enumerate(chosen)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipe.smoke_data", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    out: Path = parser.parse_args(arguments).out
    sizes = ["--train-size", str(SIZES["train"]), "--test-size", str(SIZES["test"])]
    if code := tiny_world.main(["--out", str(out / "tiny_world"), *sizes, "--levels", "1-3"]):
        return code
    (out / "arithmetic").mkdir(parents=True, exist_ok=True)
    for split, count in SIZES.items():
        write_parquet(rows(split, count), out / "arithmetic" / f"{split}.parquet")
    print(f"{out}: {', '.join(f'{count} {split}' for split, count in SIZES.items())} questions of each kind")
    return 0


if __name__ == "__main__":
    sys.exit(main())
