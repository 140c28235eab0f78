"""The tiny world: a task, a tokenizer and a model small enough to show on-policy self-distillation on a laptop.

Write the data:             python -m data_prep.tiny_world --out data/tiny_world
Remake the checkpoint:      python -m data_prep.tiny_world --train-model models/tiny_world/plain
Check a checkpoint:         python -m data_prep.tiny_world --measure models/tiny_world/plain

The same questions with other answer formats, judged by the verifiers of real data sets, and the checkpoint for both:

    python -m data_prep.tiny_world --flavour multiple_choice --out data/tiny_world_mcq
    python -m data_prep.tiny_world --flavour tool_call --out data/tiny_world_tools
    python -m data_prep.tiny_world --flavour formats --threads 1 --train-model models/tiny_world/formats

A checkpoint for the data of the plain world that can also revise an attempt (SD-Zero):

    python -m data_prep.tiny_world --flavour revision --train-model models/tiny_world/revision

Level = number of steps of a question (1 to 6). Test questions come from a part of the world that neither the training
sets nor the warm start ever see, whatever the seeds and sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.schema import make_row, write_json, write_parquet
from data_prep.tiny.contexts import question
from data_prep.tiny.flavours import FLAVOURS
from data_prep.tiny.formats import FORMATS, Asked
from data_prep.tiny.task import MAX_LEVEL, PoolSpec, derivation, designed_pass_rate, make_pool
from verl_ext.verifiers.tiny_world import Problem

DATA_SOURCE = "tiny_world"
DATA_FLAVOURS = ("plain", *FORMATS)
SOLVED = 0.9  # designed pass rate from which the warm-started model has a question solved


def make_rows(
    problems: list[Problem], split: str, error_scale: float = 1.0, flavour: str = "plain"
) -> list[dict[str, Any]]:
    """The rows of one split, in verl's format (see data_prep.schema), for one of ``DATA_FLAVOURS``."""
    if flavour in FORMATS:
        asked = [asked_question(problem, flavour) for problem in problems]
        return [_format_row(question, split, index, error_scale) for index, question in enumerate(asked)]
    return [
        make_row(
            data_source=DATA_SOURCE,
            prompt=[{"role": "user", "content": question(problem)}],
            ground_truth=str(problem.answer),
            split=split,
            index=index,
            level=problem.level,
            problem=problem.text,
            solution=derivation(problem),
            designed_pass_rate=round(designed_pass_rate(problem, error_scale), 6),
        )
        for index, problem in enumerate(problems)
    ]


def asked_question(problem: Problem, flavour: str) -> Asked:
    """The problem in an answer format; the options depend on the problem alone, so its question id never changes."""
    return FORMATS[flavour].draw(problem, random.Random(f"{flavour} {problem.text}"))


def _format_row(asked: Asked, split: str, index: int, error_scale: float) -> dict[str, Any]:
    return make_row(
        data_source=asked.data_source,
        prompt=[{"role": "user", "content": asked.question()}],
        ground_truth=asked.ground_truth,
        split=split,
        index=index,
        ability=asked.ability,
        level=asked.problem.level,
        problem=asked.problem.text,
        solution=asked.response(asked.right_attempt()),
        designed_pass_rate=round(asked.designed_pass_rate(error_scale), 6),
        **asked.extra_info(),
    )


def write_data(
    out: Path,
    *,
    train_size: int = 300,
    test_size: int = 150,
    levels: tuple[int, ...] = tuple(range(1, MAX_LEVEL + 1)),
    seed: int = 0,
    error_scale: float = 1.0,
    flavour: str = "plain",
    solved_share: float | None = None,
) -> dict[str, Any]:
    """Write train.parquet, test.parquet and manifest.json; returns the manifest.

    Args:
        solved_share: of the training questions that the model gets right from the start (:func:`training_pool`). The
            test questions stay what they are.
    """
    manifest: dict[str, Any] = {
        "data_source": FORMATS[flavour].data_source if flavour in FORMATS else DATA_SOURCE,
        "seed": seed,
        "levels": list(levels),
        "error_scale": error_scale,
        "splits": {},
    }
    if solved_share is not None:
        manifest["solved_share"] = solved_share
    train = PoolSpec(train_size, levels, held_out=False, seed=seed)
    pools = {
        "train": make_pool(train) if solved_share is None else training_pool(train, solved_share, error_scale),
        "test": make_pool(PoolSpec(test_size, levels, held_out=True, seed=seed)),
    }
    for split, problems in pools.items():
        rows = make_rows(problems, split, error_scale, flavour)
        write_parquet(rows, out / f"{split}.parquet")
        rates = [row["extra_info"]["designed_pass_rate"] for row in rows]
        manifest["splits"][split] = {
            "questions": len(rows),
            "questions_by_level": dict(sorted(Counter(problem.level for problem in problems).items())),
            "designed_pass_rate": round(sum(rates) / len(rates), 4),
        }
    write_json(manifest, out / "manifest.json")
    return manifest


def training_pool(spec: PoolSpec, solved_share: float, error_scale: float = 1.0) -> list[Problem]:
    """A pool in which this share of the questions has a designed pass rate of at least ``SOLVED``, and no other has.

    For the question what the distillation of solved questions does (SC-SDPO gives them weight 0, SDPO 1). Levels are in
    equal shares in both parts, as far as the numbers allow.

    Raises:
        ValueError: a share outside [0, 1], or not enough questions.
    """
    if not 0 <= solved_share <= 1:
        raise ValueError(f"the share of solved questions is {solved_share}; expected a number from 0 to 1")
    solved = round(spec.size * solved_share)
    pool: list[Problem] = []
    for size, wanted in ((solved, True), (spec.size - solved, False)):
        part = PoolSpec(size, spec.levels, spec.held_out, spec.seed)
        if size:
            pool += make_pool(
                part, keep=lambda p, wanted=wanted: (designed_pass_rate(p, error_scale) >= SOLVED) == wanted
            )
    random.Random(f"solved {spec.seed}").shuffle(pool)
    return pool


def parse_levels(text: str) -> tuple[int, ...]:
    """``1-6`` or ``2,4,6``."""
    try:
        if "-" in text:
            low, high = (int(part) for part in text.split("-"))
            levels = tuple(range(low, high + 1))
        else:
            levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        levels = ()
    if not levels or not all(1 <= level <= MAX_LEVEL for level in levels):
        raise argparse.ArgumentTypeError(f"{text!r}; expected levels from 1 to {MAX_LEVEL}, e.g. 1-6 or 2,4,6")
    return levels


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.tiny_world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_argument_group("what to do (any combination)")
    action.add_argument("--out", type=Path, metavar="DIR", help="write train.parquet, test.parquet and manifest.json")
    action.add_argument(
        "--train-model", type=Path, metavar="DIR", help="train the checkpoint from scratch (minutes) and write it"
    )
    action.add_argument("--measure", type=Path, metavar="DIR", help="measure the accuracies of an existing checkpoint")
    data = parser.add_argument_group("data")
    data.add_argument("--train-size", type=int, default=300, help="training questions (default: %(default)s)")
    data.add_argument("--test-size", type=int, default=150, help="held-out questions (default: %(default)s)")
    data.add_argument(
        "--levels", type=parse_levels, default=parse_levels("1-6"), help="difficulty: 1-6 (default), 2-3 or 2,4,6"
    )
    data.add_argument(
        "--solved-share",
        type=float,
        metavar="SHARE",
        help=f"share of the training questions with a designed pass rate of at least {SOLVED} (default: as drawn, .13)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the warm start (default: %(default)s)")
    parser.add_argument(
        "--error-scale",
        type=float,
        default=1.0,
        help="factor on the error rates the model is warm-started with; above 1 it starts out worse (default: 1)",
    )
    described = "; ".join(f"{name}: {flavour.description}" for name, flavour in FLAVOURS.items())
    parser.add_argument("--flavour", choices=list(FLAVOURS), default="plain", help=f"{described} (default: plain)")
    model = parser.add_argument_group("model")
    model.add_argument("--steps", type=int, help="optimiser steps of the warm start (default: those of the recipe)")
    model.add_argument(
        "--threads", type=int, default=2, help="CPU threads; part of what fixes the bytes (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; 0 on success."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.out or args.train_model or args.measure):
        parser.error("nothing to do: give --out, --train-model or --measure")
    if args.out and args.flavour not in DATA_FLAVOURS:
        parser.error(f"--flavour {args.flavour} has no data set; --out takes one of {', '.join(DATA_FLAVOURS)}")
    if args.error_scale < 0:
        parser.error(f"--error-scale is {args.error_scale}; expected a number of at least 0")
    if args.threads < 1 or (args.steps is not None and args.steps < 1):
        parser.error(f"--threads is {args.threads} and --steps is {args.steps}; expected at least 1")
    # Read when torch is first loaded: waiting threads sleep. Where they spin, a busy machine is ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if args.out:
            manifest = write_data(
                args.out,
                train_size=args.train_size,
                test_size=args.test_size,
                levels=args.levels,
                seed=args.seed,
                error_scale=args.error_scale,
                flavour=args.flavour,
                solved_share=args.solved_share,
            )
            print(f"{args.out}: {json.dumps(manifest['splits'])}")
        if args.train_model:
            _train_model(args)
        if args.measure:
            _measure(args.measure, args.flavour)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _train_model(args: argparse.Namespace) -> None:
    from data_prep.tiny.format_sampling import measure_flavour
    from data_prep.tiny.warm_start import WarmStart, save, train

    settings = WarmStart(
        flavour=args.flavour,
        steps=args.steps or FLAVOURS[args.flavour].steps,
        error_scale=args.error_scale,
        seed=args.seed,
        threads=args.threads,
    )
    model, tokenizer = train(settings)
    accuracies = measure_flavour(model, tokenizer, args.flavour)
    save(model, tokenizer, args.train_model, settings, accuracies)
    print(f"{args.train_model}: {json.dumps(accuracies, indent=2)}")


def _measure(folder: Path, flavour: str) -> None:
    """Measure a checkpoint; its manifest, where it has one, knows its flavour better than the command line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data_prep.tiny.format_sampling import measure_flavour

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no checkpoint (no config.json)")
    manifest = folder / "manifest.json"
    if manifest.is_file():
        flavour = json.loads(manifest.read_text(encoding="utf-8"))["settings"]["flavour"]
    accuracies = measure_flavour(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), flavour
    )
    print(f"{folder}: {json.dumps(accuracies, indent=2)}")


if __name__ == "__main__":
    sys.exit(main())
