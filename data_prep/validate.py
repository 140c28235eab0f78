"""Checks prepared data files before a run: schema, empty fields, duplicates, overlap, prompt lengths, verifier.

    python -m data_prep.validate data/gsm8k
    python -m data_prep.validate train.parquet test.parquet --tokenizer MODEL --max-prompt-length 1024

A folder stands for the *.parquet files directly in it. Rows are counted from 0, as in the files. Overlap is looked for
between files whose extra_info.split differ, and between files named train* and files named test*, val*, eval* or dev*.

The verifier has to score the gold answer of every row 1, and wrong responses not. It is the one of --verifier; else the
one that a manifest.json beside the file names:
    {"verifier": "verl_ext.verifiers.NAME:compute_score"}   or
    {"verifier": {"function": "verl_ext.verifiers.NAME:compute_score", "options": {...}}}
A manifest may only name verifiers of this project; name others with --verifier. The gold response of a row is what
gold_response(ground_truth, extra_info) of the verifier's module returns (None: there is none to check); else
extra_info["demonstration"] or extra_info["solution"] where not empty; else the ground truth.

Exit status: 0 no problems (notes are no problems), 1 problems, or a check that was asked for could not be run,
2 wrong usage or an unreadable file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from data_prep.progress import ProgressLine
from data_prep.schema import write_json
from data_prep.validation.files import TEST, TRAIN, FileError, expand, read_rows, read_schema, side
from data_prep.validation.gold import check_gold
from data_prep.validation.lengths import PromptLengths, TokenizerError
from data_prep.validation.questions import Question, check_duplicates, check_overlap, question
from data_prep.validation.report import Check, Report
from data_prep.validation.rows import check_columns, check_empty, check_schema
from data_prep.validation.show import show
from data_prep.validation.verifiers import NoVerifier, choose_verifier, gold_response_of
from verl_ext.config import ConfigError
from verl_ext.verifier_config import VerifierConfig, check_function
from verl_ext.verifier_pool import PoolSettings, VerifierError, VerifierPool

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What to check, and how.

    Attributes:
        tokenizer: folder or hub name for the prompt lengths; None: they are not counted.
        max_prompt_length: ``data.max_prompt_length`` in tokens; longer prompts are problems. None: no limit.
        template_kwargs: ``data.apply_chat_template_kwargs``.
        verifier: ``package.module:function`` or ``path/to/file.py:function``; None: as the module says.
        options: its keyword arguments; only with ``verifier``.
        gold: whether the verifier is asked at all.
        time_limit: seconds of the verifier per response.
        processes: of the verifier, side by side.
    """

    tokenizer: str | None = None
    max_prompt_length: int | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    verifier: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    gold: bool = True
    time_limit: float = 10.0
    processes: int = 2

    def __post_init__(self) -> None:
        if self.options and self.verifier is None:
            raise ValueError("options without a verifier; give both")
        if self.max_prompt_length is not None and self.tokenizer is None:
            raise ValueError("a longest prompt length without a tokenizer; give both")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length is {self.max_prompt_length}; expected at least 1")
        if not 0 < self.time_limit < float("inf"):
            raise ValueError(f"time_limit is {self.time_limit}; expected seconds above 0")
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}; expected at least 1")


@dataclass
class _File:
    """What is kept of a file after its rows were read once."""

    path: Path
    questions: list[Question] = field(default_factory=list)
    splits: set[str] = field(default_factory=set)
    data_sources: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return str(self.path)

    def usable_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Reads the file again, without the rows that break the schema."""
        usable = iter(self.questions)
        following = next(usable, None)
        for number, row in read_rows(self.path):
            if following is not None and number == following.row:
                yield number, row
                following = next(usable, None)


def validate(files: Sequence[str | Path], settings: Settings | None = None, progress: Progress | None = None) -> Report:
    """Runs all checks on all files.

    Args:
        files: parquet files, or folders of them.
        settings: see there.
        progress: called with what is done, and how many of how many steps are.

    Raises:
        FileError: a file is not there or no readable parquet file; the message has a line for each.
        TokenizerError: the tokenizer cannot be used.
    """
    settings = settings or Settings()
    paths = expand(files)
    schemas, unreadable = {}, []
    for path in paths:
        try:
            schemas[path] = read_schema(path)
        except FileError as error:
            unreadable.append(str(error))
    if unreadable:
        raise FileError("\n".join(unreadable))
    lengths = None
    if settings.tokenizer is not None:
        lengths = PromptLengths(settings.tokenizer, settings.max_prompt_length, settings.template_kwargs)
    checks: list[Check] = []
    read: list[_File] = []
    for path in paths:
        file = _File(path)
        checks += _check_rows(file, *schemas[path], lengths, progress)
        if file.questions:
            read.append(file)
            if settings.gold:
                checks += _check_verifier(file, settings, progress)
    checks += [_check_overlap(*pair) for pair in combinations(read, 2) if _to_compare(*pair)]
    return Report(checks)


def _check_rows(
    file: _File, schema: Any, count: int, lengths: PromptLengths | None, progress: Progress | None
) -> list[Check]:
    """One reading of a file: all that needs no verifier and no other file."""
    of_schema, of_empty = Check("schema", file.name), Check("empty fields", file.name)
    of_lengths, of_duplicates = Check("prompt lengths", file.name), Check("duplicates", file.name)
    if not check_columns(schema, count, of_schema):
        return [of_schema]
    for number, row in read_rows(file.path):
        if progress is not None:
            progress(f"{file.name}: rows", number + 1, count)
        if not check_schema(number, row, of_schema):
            continue
        check_empty(number, row, of_empty)
        file.questions.append(question(number, row))
        file.data_sources.add(row["data_source"])
        if row["extra_info"]["split"]:
            file.splits.add(row["extra_info"]["split"])
        if lengths is not None:
            lengths.count(number, row, of_lengths)
    check_duplicates(file.questions, of_duplicates)
    if lengths is None:
        return [of_schema, of_empty, of_duplicates]
    lengths.finish(of_lengths)
    return [of_schema, of_empty, of_duplicates, of_lengths]


def _check_verifier(file: _File, settings: Settings, progress: Progress | None) -> list[Check]:
    gold, must_fail = Check("gold answers", file.name), Check("must fail", file.name)
    report = None if progress is None else lambda done, total: progress(f"{file.name}: verifier", done, total)
    try:
        chosen = choose_verifier(file.path, file.data_sources, settings.verifier, settings.options)
        pool_settings = PoolSettings(
            function=chosen.function,
            options=chosen.options,
            processes=settings.processes,
            time_limit=settings.time_limit,
            queue_size=4 * settings.processes,  # rows can be megabytes each
        )
        # First in a process with a limit on its start, then here: a module that hangs on import must not hang us.
        with VerifierPool(pool_settings) as pool:
            check_function(VerifierConfig(function=pool_settings.function, options=dict(chosen.options)))
            gold_response = gold_response_of(pool_settings.function)
            check_gold(file.usable_rows, file.questions, pool, gold_response, gold, must_fail, report)
    except (NoVerifier, VerifierError, ConfigError) as error:
        gold.not_run = must_fail.not_run = " ".join(str(error).split())
    else:
        gold.facts += f"; {chosen.function}, from {chosen.origin}"
    return [gold, must_fail]


def _to_compare(first: _File, second: _File) -> bool:
    return {side(first.path), side(second.path)} == {TRAIN, TEST} or first.splits != second.splits


def _check_overlap(first: _File, second: _File) -> Check:
    trained = [(side(file.path) or "".join(file.splits)) == TRAIN for file in (first, second)]
    if trained == [False, True]:
        first, second = second, first
    check = Check("overlap", f"{first.name} / {second.name}")
    check_overlap(first.questions, second.questions, (first.name, second.name), check)
    return check


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object; expected e.g. {{"mode": "strict"}}')
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="parquet file, or folder of parquet files")
    prompts = parser.add_argument_group("prompt lengths")
    prompts.add_argument("--tokenizer", metavar="DIR_OR_HUB", help="count the prompts' tokens with this tokenizer")
    prompts.add_argument("--max-prompt-length", type=int, metavar="N", help="tokens; longer prompts are problems")
    prompts.add_argument(
        "--template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help='data.apply_chat_template_kwargs of the run, e.g. {"enable_thinking": false}',
    )
    verifier = parser.add_argument_group("verifier")
    verifier.add_argument("--verifier", metavar="MODULE:FUNCTION", help="or path/to/file.py:function")
    verifier.add_argument("--options", type=_json_object, default={}, metavar="JSON", help="its keyword arguments")
    verifier.add_argument("--no-gold", action="store_true", help="do not run the verifier")
    verifier.add_argument(
        "--time-limit", type=float, default=10.0, metavar="S", help="seconds per response (default: %(default)s)"
    )
    verifier.add_argument("--processes", type=int, default=2, metavar="N", help="side by side (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--show", type=int, default=10, metavar="N", help="rows named per check; 0: all (default: %(default)s)"
    )
    output.add_argument("--report", type=Path, metavar="FILE.json", help="write everything that was found")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks; the exit status is in the module's docstring."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.show < 0:
        parser.error(f"--show is {args.show}; expected at least 0")
    try:
        settings = Settings(
            tokenizer=args.tokenizer,
            max_prompt_length=args.max_prompt_length,
            template_kwargs=args.template_kwargs,
            verifier=args.verifier,
            options=args.options,
            gold=not args.no_gold,
            time_limit=args.time_limit,
            processes=args.processes,
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        with ProgressLine() as progress:
            report = validate(args.files, settings, progress)
    except (FileError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    show(report, args.show, sys.stdout)
    if args.report is not None:
        try:
            write_json(report.to_json(), args.report)
        except OSError as error:
            print(f"--report: {error}", file=sys.stderr)
            return 2
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
