"""Sample: `python -m recipe.sample model=tiny data=tiny_world hardware=cpu sample.k=8 sample.out=DIR`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.cluster import prepare_environment
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.drawing import Drawer, chat_template_kwargs, load_tokenizer, use_checkpoint
from recipe.output_folder import check_writable
from recipe.sample_data import context_identity, read_questions, teacher_questions
from recipe.sample_settings import SampleConfig, sample_config
from verl_ext.config import ConfigError, distill_config
from verl_ext.sample_store import MANIFEST, StoreError, read_store
from verl_ext.sampling import SampleRequest, SamplingSettings
from verl_ext.sampling_prompts import PromptError
from verl_ext.verifier_watch import VerifierBroken

HELP = """Draw and verify samples of a model on verl's own rollout servers, into a store that can be topped up.

  python -m recipe.sample sample.out=DIR [group=preset ...] [key=value ...]

Presets:
{groups}

Keys:
  sample.out=DIR            folder of the store; samples it holds are not drawn again
  sample.k=N                samples per question (8)
  sample.split=train|test   data.train_files or data.val_files (test)
  sample.limit=N            only the first N questions
  sample.context=true       the model reads the teacher's prompt: what distill.context (context=reference) makes of the
                            question; questions without one are left out
  sample.checkpoint=DIR     model folder, or a checkpoint that holds one (the preset's model)
  sample.temperature=T  sample.top_p=P  sample.top_k=K  sample.seed=N
  sample.max_tokens=N       of a response (data.max_response_length)
  sample.concurrency=N      requests under way at a time (256)
  sample.verify_workers=N   threads of the verifier (8)
  actor_rollout_ref.rollout.*, data.*, reward.*          every key of verl's own configuration

Ctrl-C keeps every finished sample; the same command goes on. The last line on standard output is one JSON object:
questions, samples, drawn, mean (over questions, of the share of right answers), pass_rate_std, pass_rate_min,
pass_rate_max, truncated, verifier_errors, left_out (questions without a teacher's prompt), seconds, store.

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""
GROUPS = ("model", "data", "hardware")
NAMED = 5
"""Questions that a line names."""
Finish = Callable[[dict[str, Any], dict[str, list[str]], RunConsole], dict[str, Any]]
REFUSALS = (ConfigError, StoreError, PromptError, VerifierBroken)


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration. Raises ConfigError."""
    config = compose_config(overrides, name="sample")
    sample_config(config)
    return config


def run(config: DictConfig, console: RunConsole | None = None, *, finish: Finish | None = None) -> dict[str, Any]:
    """Draws what the store lacks, in an existing Ray cluster or one of its own; returns the summary.

    Args:
        finish: what a command does with the full store; it is given the summary and, with ``sample.context``, reason
            -> ids of the questions that were left out, and returns its own summary.

    Raises:
        ConfigError, StoreError, PromptError: the configuration, the store or a prompt does not fit; before Ray starts.
    """
    started = time.perf_counter()
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    block = sample_config(config)
    prepare_environment(config.run.platform)
    folder = Path(str(block.out)).absolute()
    check_writable(folder, "sample.out")
    settings = block.sampling(config.data.max_response_length)
    requests, repeats = read_questions(config, block.split, block.limit)
    left_out: dict[str, list[str]] = {}
    if block.context:
        use_checkpoint(config, block.checkpoint)
        requests, left_out = teacher_questions(
            requests, distill_config(config.distill).context, load_tokenizer(config), chat_template_kwargs(config)
        )
    total = len(requests) * settings.k
    with console or RunConsole(
        folder / "sample.log", total, config.run.quiet, unit="sample", tail_lines=config.run.log_tail
    ) as screen:
        screen.phase(f"{len(requests)} questions x {settings.k} samples into {folder}")
        if repeats:
            screen.note(f"{repeats} rows repeat a question and are left out")
        for reason, names in left_out.items():
            if names:
                first = ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
                screen.note(f"{len(names)} questions are left out, {reason}: {first}")
        try:
            drawn = _draw(config, block, settings, requests, folder, screen)
            summary = _summary(folder, requests, settings.k, screen)
            summary |= {"drawn": drawn, "left_out": sum(map(len, left_out.values()))}
            summary |= {"seconds": round(time.perf_counter() - started, 1), "store": str(folder)}
            if finish is not None:
                summary = finish(summary, left_out, screen)
        except REFUSALS as error:
            refused = error
        except KeyboardInterrupt:
            if (folder / MANIFEST).exists():
                screen.progress(len(read_store(folder)[1]), "samples are in the store; the same command goes on")
            raise
        else:
            screen.summary(summary)
            return summary
    # Raised outside the console: it would explain a refusal like a crash, with the log.
    raise refused


def _summary(folder: Path, requests: Sequence[SampleRequest], k: int, screen: RunConsole) -> dict[str, Any]:
    wanted = {request.question_id for request in requests}
    rows = [row for row in read_store(folder)[1] if row["question_id"] in wanted and row["sample"] < k]
    summary = summarize(rows)
    if summary["verifier_errors"]:
        first = next(row for row in rows if row["status"] != "ok")
        screen.note(f"warning: {summary['verifier_errors']} verifier errors; the first: {first['error']}")
    return summary


def _draw(
    config: DictConfig,
    block: SampleConfig,
    settings: SamplingSettings,
    requests: list[SampleRequest],
    folder: Path,
    screen: RunConsole,
) -> int:
    """The number of new samples."""
    context = distill_config(config.distill).context if block.context else None
    with (
        Drawer(
            config,
            checkpoint=block.checkpoint,
            verify_workers=block.verify_workers,
            concurrency=block.concurrency,
            template_kwargs=None if context is None else context.template_kwargs,
        ) as drawer,
        # Without a context the settings are those of the stores there are.
        drawer.store(folder, settings, None if context is None else {"context": context_identity(context)}) as store,
    ):
        return drawer.draw(requests, settings, store, screen)


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts, mean accuracy and spread of the pass rates; verifier errors are left out of both and counted.

    A question with verifier errors only has no pass rate.
    """
    verdicts: dict[str, list[float]] = {}
    samples = truncated = errors = 0
    for row in rows:
        samples += 1
        truncated += bool(row["truncated"])
        verdicts.setdefault(row["question_id"], [])
        if row["status"] == "ok":
            verdicts[row["question_id"]].append(float(row["acc"]))
        else:
            errors += 1
    rates = [sum(values) / len(values) for values in verdicts.values() if values]
    return {
        "questions": len(verdicts),
        "samples": samples,
        "mean": round(statistics.fmean(rates), 6) if rates else None,
        "pass_rate_std": round(statistics.pstdev(rates), 6) if rates else None,
        "pass_rate_min": round(min(rates), 6) if rates else None,
        "pass_rate_max": round(max(rates), 6) if rates else None,
        "truncated": truncated,
        "verifier_errors": errors,
    }


def help_text() -> str:
    """What `--help` prints."""
    return HELP.format(groups=preset_lines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    return command_line(
        arguments,
        help_text=help_text,
        config_name="sample",
        run=lambda overrides: run(compose(overrides)),
        refusals=REFUSALS,
    )


if __name__ == "__main__":
    sys.exit(main())
