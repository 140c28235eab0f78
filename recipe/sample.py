"""Sample: `python -m recipe.sample model=tiny data=tiny_world hardware=cpu sample.k=8 sample.out=DIR`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.cluster import importing, prepare_environment, ray_cluster
from recipe.command import command_line, preset_lines
from recipe.compose import compose_config
from recipe.console import RunConsole
from recipe.environment import versions
from recipe.output_folder import check_writable
from recipe.sample_data import read_questions
from recipe.sample_settings import SampleConfig, sample_config
from verl_ext.config import ConfigError
from verl_ext.sample_store import MANIFEST, SampleStore, StoreError, read_store
from verl_ext.sampling import Sampler, SampleRequest, SampleResult, SamplingSettings, plan_jobs, store_settings
from verl_ext.sampling_prompts import PromptBuilder, PromptError
from verl_ext.verifier_config import verifier_config
from verl_ext.verifier_watch import VerifierBroken, VerifierWatch

HELP = """Draw and verify samples of a model on verl's own rollout servers, into a store that can be topped up.

  python -m recipe.sample sample.out=DIR [group=preset ...] [key=value ...]

Presets:
{groups}

Keys:
  sample.out=DIR            folder of the store; samples it holds are not drawn again
  sample.k=N                samples per question (8)
  sample.split=train|test   data.train_files or data.val_files (test)
  sample.limit=N            only the first N questions
  sample.checkpoint=DIR     model folder, or a checkpoint that holds one (the preset's model)
  sample.temperature=T  sample.top_p=P  sample.top_k=K  sample.seed=N
  sample.max_tokens=N       of a response (data.max_response_length)
  sample.concurrency=N      requests under way at a time (256)
  sample.verify_workers=N   threads of the verifier (8)
  actor_rollout_ref.rollout.*, data.*, reward.*          every key of verl's own configuration

Ctrl-C keeps every finished sample; the same command goes on. The last line on standard output is one JSON object:
questions, samples, drawn, mean (over questions, of the share of right answers), pass_rate_std, pass_rate_min,
pass_rate_max, truncated, verifier_errors, seconds, store.

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""
GROUPS = ("model", "data", "hardware")
SECONDS_BETWEEN_LINES = 5.0
VERDICTS_BETWEEN_LOOKS = 64
Finish = Callable[[dict[str, Any], RunConsole], dict[str, Any]]
REFUSALS = (ConfigError, StoreError, PromptError, VerifierBroken)


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration. Raises ConfigError."""
    config = compose_config(overrides, name="sample")
    sample_config(config)
    return config


def run(config: DictConfig, console: RunConsole | None = None, *, finish: Finish | None = None) -> dict[str, Any]:
    """Draws what the store lacks, in an existing Ray cluster or one of its own; returns the summary.

    Args:
        finish: what a command does with the full store; it is given the summary and returns its own.

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
    total = len(requests) * settings.k
    with console or RunConsole(
        folder / "sample.log", total, config.run.quiet, unit="sample", tail_lines=config.run.log_tail
    ) as screen:
        screen.phase(f"{len(requests)} questions x {settings.k} samples into {folder}")
        if repeats:
            screen.note(f"{repeats} rows repeat a question and are left out")
        try:
            drawn = _draw(config, block, settings, requests, folder, screen)
            summary = _summary(folder, requests, settings.k, screen)
            summary |= {"drawn": drawn, "seconds": round(time.perf_counter() - started, 1), "store": str(folder)}
            if finish is not None:
                summary = finish(summary, screen)
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
    """The number of new samples. Everything that can go wrong without a server does so before Ray starts."""
    from verl_ext.model_identity import checkpoint_weights, local_folder, model_identity
    from verl_ext.verification import Verifier

    model = config.actor_rollout_ref.model
    if block.checkpoint:
        with open_dict(config):
            model.path = str(checkpoint_weights(block.checkpoint).absolute())
            model.tokenizer_path = None
    identity = model_identity(model.path)
    weights = local_folder(model.path)
    tokenizer = _tokenizer(config)
    template_kwargs = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create())
    prompts = PromptBuilder(tokenizer, template_kwargs)
    verifier = Verifier.from_config(config, workers=block.verify_workers)
    length = config.actor_rollout_ref.rollout.max_model_len or _position_limit(weights)
    stored = store_settings(identity, settings, prompts, verifier)
    try:
        with SampleStore(folder, stored, info={"versions": versions()}) as store:
            missing = plan_jobs(requests, settings, prompts, store, length)
            if not missing:
                screen.note("the store holds them all")
                return 0
            screen.note(f"{len(missing)} samples are missing; starting Ray and the rollout servers")
            with importing("verl.workers.rollout.llm_server"), ray_cluster(config):
                from verl_ext.rollout_servers import standalone_servers, stop_token_ids

                with standalone_servers(config) as servers:
                    sampler = Sampler(
                        servers.get_client(),
                        tokenizer,
                        settings,
                        verifier,
                        template_kwargs=template_kwargs,
                        max_model_len=length,
                        stop_token_ids=stop_token_ids(weights),
                        concurrency=block.concurrency,
                    )
                    screen.phase("sampling")
                    before = len(requests) * settings.k - len(missing)
                    report = _Progress(screen, before, verifier_config(config.verifier).max_error_rate)
                    return len(sampler.run(requests, store, report))
    finally:
        verifier.close()


class _Progress:
    """A line every few seconds, with the share of right answers so far and the time left; stops a broken verifier."""

    def __init__(self, screen: RunConsole, done_before: int, max_error_rate: float) -> None:
        self._screen, self._done_before = screen, done_before
        self._watch = VerifierWatch(max_error_rate, lambda text: screen.note(f"warning: {text}"))
        self._results: list[SampleResult] = []
        self._first: float | None = None
        self._last = 0.0
        self._right = self._judged = 0.0

    def __call__(self, result: SampleResult, done: int, total: int) -> None:
        if result.acc is not None:
            self._right += result.acc
            self._judged += 1
        self._results.append(result)
        if done % VERDICTS_BETWEEN_LOOKS == 0 or done == total:
            self._watch.look(
                "sampling",
                [{"status": row.status, "error": row.error} for row in self._results],
                lambda i: f"question {self._results[i].question_id}, response {self._results[i].text[:80]!r}",
            )
        now = time.monotonic()
        if self._first is None:
            # The first one takes the servers' warm-up; the pace is measured from here.
            self._first = self._last = now
        if now - self._last < SECONDS_BETWEEN_LINES and done < total:
            return
        self._last = now
        right = f"{self._right / self._judged:.3f} right" if self._judged else "none judged"
        left = (now - self._first) / max(1, done - 1) * (total - done)
        self._screen.progress(self._done_before + done, f"samples, {right}", left)


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


def _tokenizer(config: DictConfig) -> Any:
    """As verl's workers load it."""
    from verl.utils import hf_tokenizer

    model = config.actor_rollout_ref.model
    path = model.get("tokenizer_path") or model.path
    try:
        tokenizer = hf_tokenizer(path, trust_remote_code=model.get("trust_remote_code", False))
    except Exception as error:
        raise ConfigError(f"the tokenizer of {path} cannot be loaded: {error}") from error
    if model.get("custom_chat_template"):
        tokenizer.chat_template = model.custom_chat_template
    return tokenizer


def _position_limit(folder: Path) -> int | None:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return settings.get("max_position_embeddings") or settings.get("text_config", {}).get("max_position_embeddings")


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
