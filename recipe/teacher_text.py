"""Teacher text: `python -m recipe.teacher_text model=tiny data=tiny_world hardware=cpu sample.out=DIR text.out=OUT`."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe import sample
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.pass_rates import summarize
from recipe.sample_data import read_questions
from recipe.sample_settings import SampleConfig, sample_config
from recipe.teacher_text_data import FILE, LEFT_OUT, REASONS, ChosenTexts, check_sources, choose_texts, write_data
from recipe.teacher_text_settings import TeacherTextConfig, text_config
from verl_ext.config import ConfigError
from verl_ext.question_data import file_list
from verl_ext.reference_text import SpecialTokens
from verl_ext.sample_store import StoreError, read_manifest
from verl_ext.verifier_config import verifier_config

HELP = """Let a teacher answer every training question, and make training data that carries its answers.

  python -m recipe.teacher_text sample.out=DIR text.out=DIR2 [group=preset ...] [key=value ...]

PACED's distillation track trains along the teacher's own text. The teacher is the model of this command:

  python -m recipe.teacher_text actor_rollout_ref.model.path=TEACHER data=dapo_math sample.out=DIR text.out=DIR2
  python -m recipe.train method=paced_distill sequences=teacher_text data=dapo_math data.train_files=DIR2/{file} \\
    distill.teacher.path=TEACHER

PBSD with a teacher that is not on the rollout servers replays fair samples, drawn with the reference solution in the
teacher's prompt. Give both commands the same keys of the context:

  python -m recipe.teacher_text method=pbsd teacher=frozen sequences=pairs_replayed data=openthoughts_math \
    sample.context=true text.only_right=false sample.out=DIR text.out=DIR2
  python -m recipe.train method=pbsd teacher=frozen sequences=pairs_replayed data=openthoughts_math \
    data.train_files=DIR2/{file}

Presets:
{groups}

Keys: those of `python -m recipe.sample`, with sample.split=train and sample.k=8; among them
  actor_rollout_ref.model.path=DIR        the teacher, or
  sample.checkpoint=DIR     a model folder of it, or a checkpoint that holds one
  sample.out=DIR            folder of the sample store; samples it holds are not drawn again
  sample.k=N                samples per question
  sample.limit=N            only the first N questions
  text.out=DIR2             folder of the new training data
  text.key=NAME             field of extra_info for the texts (teacher_text), as in distill.sequences.reference_key
  sample.context=true       the teacher reads what context=reference makes of the question; the longer prompt and
                            the response must fit into actor_rollout_ref.rollout.max_model_len
  text.only_right=false     wrong, unjudged and repeated texts too
  text.per_question=N       at most N texts of a question, the first ones (null: all)
  distill.context.success_threshold=R     score from which a sample is right (0.5)

DIR2/{file} has the rows of data.train_files, all columns as they are, and in extra_info the list of the
question's texts: samples that are right, not cut off, and spell no special token of the tokenizer, each once
(text.only_right=false: right or wrong, repeated ones too). Questions without one are left out; DIR2/manifest.json lists
them by reason, those without a teacher's prompt under not_sampled and again under context.
Ctrl-C keeps every finished sample; the same command goes on.

{last_line}

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""
HELP_WIDTH = 120
LAST_LINE = """The last line on standard output is one JSON object: questions, kept, texts; questions without a text by
the reason that took their last sample ({reasons}); samples, and those of them that gave no text ({faults}); mean (over
questions, of the share of right samples), file, drawn, seconds, store."""


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration. Raises ConfigError."""
    config = compose_config(overrides, name="teacher_text")
    _blocks(config)
    return config


def _blocks(config: DictConfig) -> tuple[SampleConfig, TeacherTextConfig]:
    block, text = sample_config(config), text_config(config)
    if block.split != "train":
        raise ConfigError(f"sample.split is {block.split!r}; allowed: train, whose rows the texts are written into")
    return block, text


def run(config: DictConfig) -> dict[str, Any]:
    """Draws what the store lacks (:func:`recipe.sample.run`) and writes the training data; returns the summary.

    Raises:
        ConfigError, StoreError, PromptError: the configuration, the data, the store or a prompt does not fit; before
            Ray starts.
        StoreError: also where no question has a text to write, or a sample cannot be read; nothing is written then.
    """
    block, text = _blocks(config)
    store, folder = Path(str(block.out)).absolute(), Path(str(text.out)).absolute()
    _check_out(folder, store)
    questions = [request.question_id for request in read_questions(config, block.split)[0]]
    files = file_list(config.data.train_files)
    schema = check_sources(files, text.key, folder)
    threshold = config.distill.context.success_threshold

    def finish(summary: dict[str, Any], left_out: dict[str, list[str]], screen: RunConsole) -> dict[str, Any]:
        from verl_ext.pass_rate_store import read_pass_rates

        # The store may hold samples of a question whose prompt is over a limit that was lowered since.
        without = {name for names in left_out.values() for name in names}
        sampled = [name for name in questions[: block.limit] if name not in without]
        # First, because it checks every row of the store.
        rates = read_pass_rates(store, threshold=threshold, samples=block.k).only(sampled)
        chosen = choose_texts(
            store,
            questions,
            sampled=sampled,
            samples=block.k,
            threshold=threshold,
            per_question=text.per_question,
            special_token=_special_tokens(config, block).first_in,
            only_right=text.only_right,
        )
        counts = _counts(chosen, len(questions))
        if not chosen.texts:
            raise StoreError(f"{store} holds no text to train on; questions by reason: {_listed(chosen.dropped)}")
        write_data(folder, files, schema, chosen.texts, _facts(config, store, chosen, counts, left_out))
        screen.note(f"{counts['texts']} texts of {counts['kept']} of {counts['questions']} questions: {folder / FILE}")
        told = {key: summary[key] for key in ("drawn", "seconds", "store")}
        return counts | {"mean": summarize(rates)["mean"], "file": str(folder / FILE)} | told

    return sample.run(config, finish=finish)


def _check_out(folder: Path, store: Path) -> None:
    """Nothing is made here: the folder appears with its files. Raises ConfigError."""
    # Both have a manifest.json, and that of a store is what its samples are worth.
    if folder.resolve() == store.resolve() or any(folder.glob("samples-*.jsonl")):
        raise ConfigError(f"text.out is {folder}, a folder of samples; allowed: another folder than that of any store")
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"text.out is {folder}, but nothing can be written into {there}; choose another folder")


def _special_tokens(config: DictConfig, block: SampleConfig) -> SpecialTokens:
    """Of the teacher's tokenizer, which is the student's too: both score the same tokens."""
    from transformers import AutoTokenizer

    from verl_ext.model_identity import checkpoint_weights

    model = config.actor_rollout_ref.model
    path = checkpoint_weights(block.checkpoint) if block.checkpoint else model.get("tokenizer_path") or model.path
    return SpecialTokens(AutoTokenizer.from_pretrained(path, trust_remote_code=bool(model.get("trust_remote_code"))))


def _counts(chosen: ChosenTexts, questions: int) -> dict[str, int]:
    """Flat, every reason with its number, 0 too."""
    return {
        "questions": questions,
        "kept": len(chosen.texts),
        "texts": chosen.count,
        **{f"dropped_{reason}": len(names) for reason, names in chosen.dropped.items()},
        "samples": chosen.samples,
        **{f"samples_{fault}": count for fault, count in chosen.left_out.items()},
    }


def _listed(dropped: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{reason} {len(names)}" for reason, names in dropped.items() if names) or "none"


def _facts(
    config: DictConfig,
    store: Path,
    chosen: ChosenTexts,
    counts: Mapping[str, int],
    left_out: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """What the manifest says beside the files."""
    (block, text), verifier, held = _blocks(config), verifier_config(config.verifier), read_manifest(store)
    judged = {"function": verifier.function, "options": verifier.options} if verifier.function else None
    return {
        "made_by": "python -m recipe.teacher_text",
        "text": {"key": text.key, "only_right": text.only_right, "per_question": text.per_question},
        "success_threshold": config.distill.context.success_threshold,
        "sampled": {"k": block.k, "limit": block.limit},
        "store": {"folder": str(store), "key": held["key"], "settings": held["settings"]},
        "context": {"left_out": dict(left_out)} if block.context else None,
        "verifier": judged,
        "counts": dict(counts),
        "dropped": dict(chosen.dropped),
    }


def help_text() -> str:
    """What `--help` prints."""
    last_line = LAST_LINE.format(
        reasons=", ".join(f"dropped_{name}" for name in REASONS),
        faults=", ".join(f"samples_{name}" for name in LEFT_OUT),
    )
    return HELP.format(file=FILE, groups=preset_lines(), last_line=textwrap.fill(last_line, HELP_WIDTH))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    return command_line(
        arguments,
        help_text=help_text,
        config_name="teacher_text",
        run=lambda overrides: run(compose(overrides)),
        refusals=sample.REFUSALS,
    )


if __name__ == "__main__":
    sys.exit(main())
