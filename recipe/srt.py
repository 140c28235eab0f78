"""Collect for self-revision training: `python -m recipe.srt collect model=tiny data=tiny_world srt.out=DIR`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.cluster import prepare_environment
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.drawing import use_checkpoint
from recipe.output_folder import check_writable
from recipe.sample import REFUSALS
from recipe.sample_data import read_questions
from recipe.srt_collection import Collection, stores_in
from recipe.srt_phrases import phrases_of
from recipe.srt_settings import SrtConfig, srt_config
from verl_ext.config import ConfigError
from verl_ext.contexts import checked_messages
from verl_ext.sample_store import read_store
from verl_ext.sampling import SampleRequest
from verl_ext.sampling_prompts import PromptError

COMMANDS = """Self-revision training (SRT), the first phase of SD-Zero.

  python -m recipe.srt collect srt.out=DIR [group=preset ...] [key=value ...]

Commands:
  collect   attempts, their revisions behind a control phrase, and training rows of those that are right

  python -m recipe.srt collect --help     its keys
"""
HELP = """Let a model answer every question, revise its answers, and make training rows of the revisions that are right.

  python -m recipe.srt collect srt.out=DIR [group=preset ...] [key=value ...]

Each attempt is judged and continued in its own assistant turn behind a phrase: one that asks to rephrase where it is
right, one that asks to correct where it is wrong (SD-Zero, arXiv 2604.12002). Revisions that are right are kept,
cleaned of polite openers and repeated tails. `python -m recipe.sft sft.files=[DIR/sft.parquet]` trains on the rows.

Presets:
{groups}

Keys:
  srt.out=DIR               folder; samples that its stores hold are not drawn again
  srt.split=train|test      data.train_files or data.val_files (train)
  srt.skip=N  srt.limit=N   without the first N questions (0), of the rest the first N (all)
  srt.attempts=N            first responses per question (1)
  srt.revisions=N           revisions per attempt (3); 0: none, rows of the right attempts themselves (RFT)
  srt.revise_right=BOOL  srt.revise_wrong=BOOL               which attempts are revised (true, true)
  srt.temperature=T  srt.top_p=P  srt.top_k=K  srt.seed=N    of both rounds (1.0, 0.9, -1, 0)
  srt.max_tokens=N          of an attempt (data.max_response_length)
  srt.revision_max_tokens=N of a revision (srt.max_tokens)
  srt.checkpoint=DIR        model folder, or a checkpoint that holds one (the preset's model)
  srt.per_attempt=N         keep at most N right revisions of an attempt (all)
  srt.per_question=N        with srt.revisions=0, keep at most N right attempts of a question (all)
  srt.max_traces=N          keep at most N traces, spread over the questions (all)
  srt.losses=joint|generation|revision|two_stage             which rows are written (joint)
  srt.placement=assistant|user    where the phrase stands in the rows of L_revision (assistant)
  srt.generation_rows=N  srt.revision_rows=N                 sizes of the two stages (all)
  srt.max_length=N          tokens of a row; longer ones are left out, never cut (no bound)
  srt.write=BOOL            false: draw and count only (true)
  srt.concurrency=N         requests under way at a time (256)
  srt.verify_workers=N      threads of the verifier (8)
  distill.context.phrases=auto|paper|qwen|olmo  distill.context.phrase_right=TEXT  distill.context.phrase_wrong=TEXT
  distill.context.success_threshold=R     score from which an answer is right (0.5)
  actor_rollout_ref.rollout.*, data.*, reward.*          every key of verl's own configuration

DIR/attempts and DIR/revisions are the stores, DIR/traces.parquet the traces, DIR/sft.parquet (two_stage:
sft_generation.parquet and sft_revision.parquet) the training rows; DIR/manifest.json counts what was dropped, by
branch and reason. Ctrl-C keeps every finished sample; the same command goes on. The last line on standard output is one
JSON object: questions, attempts, right, wrong, mean (over questions, of the share of right attempts), revisions,
correction_rate (share of right ones among the revisions of wrong attempts), retention (of right attempts), traces,
traces_right, traces_wrong, rows, dropped_attempts_REASON, dropped_revisions_REASON, dropped_rows_too_long, files
(with commas between them), drawn, seconds.

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""
CONFIG = "train"


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration. Raises ConfigError."""
    config = compose_config(overrides, name=CONFIG)
    srt_config(config)
    return config


def collect(config: DictConfig, console: RunConsole | None = None) -> dict[str, Any]:
    """Draws what the stores lack, in an existing Ray cluster or one of its own, and writes traces and training rows.

    Returns:
        the summary that is also the last line on standard output; ``files`` is a list here.

    Raises:
        ConfigError, StoreError, PromptError: the configuration, a store, the chat template or a prompt does not fit;
            before Ray starts.
        StoreError: also where a branch has no attempt to revise or no right revision; the stores are kept.
    """
    started = time.perf_counter()
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    block = srt_config(config)
    prepare_environment(config.run.platform)
    folder = Path(str(block.out)).absolute()
    check_writable(folder, "srt.out")
    use_checkpoint(config, block.checkpoint)
    phrases = phrases_of(config) if block.revisions else None
    questions, repeats = _questions(config, block)
    # Not more than this; how many attempts are revised is known after the first round.
    total = len(questions) * block.attempts * (1 + block.revisions)
    with console or RunConsole(
        folder / "collect.log", total, config.run.quiet, unit="sample", tail_lines=config.run.log_tail
    ) as screen:
        rounds = f"{block.attempts} attempts" + f" x {block.revisions} revisions" * bool(block.revisions)
        screen.phase(f"{len(questions)} questions x {rounds} into {folder}")
        if repeats:
            screen.note(f"{repeats} rows repeat a question and are left out")
        try:
            summary = Collection(config, block, phrases, questions, folder, screen).run()
        except REFUSALS as error:
            refused = error
        except KeyboardInterrupt:
            held = sum(len(read_store(store)[1]) for store in stores_in(folder))
            screen.progress(held, "samples are in the stores; the same command goes on")
            raise
        else:
            summary["seconds"] = round(time.perf_counter() - started, 1)
            screen.summary(summary | {"files": ",".join(summary["files"])})
            return summary
    # Raised outside the console: it would explain a refusal like a crash, with the log.
    raise refused


def _questions(config: DictConfig, block: SrtConfig) -> tuple[list[SampleRequest], int]:
    end = None if block.limit is None else block.skip + block.limit
    found, repeats = read_questions(config, block.split, end)
    questions = found[block.skip :]
    if not questions:
        raise ConfigError(f"srt.skip is {block.skip}; allowed: less than the {len(found)} questions of the data")
    for question in questions:
        try:
            checked_messages(question.messages, question.question_id)
        except ValueError as error:
            raise PromptError(f"question {question.question_id}: {error}") from error
    return questions, repeats


def help_text() -> str:
    """What `collect --help` prints."""
    return HELP.format(groups=preset_lines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(COMMANDS)
        return 0
    if arguments[0] != "collect":
        print(f"error: {arguments[0]!r} is no command of recipe.srt; there is: collect", file=sys.stderr)
        return 2
    return command_line(
        arguments[1:],
        help_text=help_text,
        config_name=CONFIG,
        run=lambda overrides: collect(compose(overrides)),
        refusals=REFUSALS,
    )


if __name__ == "__main__":
    sys.exit(main())
