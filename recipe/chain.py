"""A method of several stages: `python -m recipe.train method=sd_zero …` (SD-Zero, arXiv 2604.12002), `method=rft …`.

Every stage is a command of its own that can be resumed; the chain gives each its folder, model and data under
``run.output_dir``, and notes in ``chain.json`` what is done. A stage that is done is skipped, unless its settings have
changed: that is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf, open_dict

from data_prep.schema import json_text
from recipe.chain_settings import ChainConfig, chain_config
from recipe.cluster import prepare_environment, ray_cluster
from recipe.console_format import format_seconds
from recipe.output_folder import check_writable, unused_folder
from recipe.run_files import RunFiles
from verl_ext.answer_keys import answer_keys
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError
from verl_ext.heartbeat import beat, beating
from verl_ext.question_data import file_list
from verl_ext.sample_store import differences, read_store
from verl_ext.validation import QuestionAnswers, QuestionKey, group_answers, metrics_of
from verl_ext.validation_items import item_counts

RECORD = "chain.json"
FRESH = "distil_questions.parquet"
# What decides a stage's result, beside what decided those before it.
DECIDES: dict[str, tuple[str, ...]] = {
    "collect": (
        "actor_rollout_ref.model",
        "data.train_files",
        "data.apply_chat_template_kwargs",
        "data.max_prompt_length",
        "data.max_response_length",
        "distill.context",
        "srt",
        "run.seed",
        "verifier.function",
        "verifier.options",
    ),
    "sft": ("sft",),
    "distil": ("chain.fresh_questions", "actor_rollout_ref", "algorithm", "data", "distill", "run.steps"),
    "evaluate": ("run.val_samples", "chain.evaluate", "chain.evaluate_revisions", "data.val_files"),
}
IRRELEVANT = (
    *("srt.out", "srt.concurrency", "srt.verify_workers", "sft.out", "sft.files"),
    "actor_rollout_ref.rollout.val_kwargs.n",  # run.val_samples again
)


def run(config: DictConfig) -> dict[str, Any]:
    """Runs what is missing of a chain; inside an existing Ray cluster or one of its own.

    Returns:
        the summary: method, steps (of the distillation), metric, before, after, samples (drawn for training), stages
        (the summary of each), report.

    Raises:
        ConfigError: the configuration or a stage's earlier settings do not fit; names the key.
    """
    started = time.perf_counter()
    prepare_environment(config.run.platform)
    chain = chain_config(config)
    folder = Path(str(config.run.output_dir)).absolute()
    check_writable(folder, "run.output_dir")
    record = _read_record(folder)
    settings = _settings(config, chain)
    _check_unchanged(settings, folder, record)
    missing = [stage for stage in chain.stages if stage not in record]
    _say(f"chain in {folder}: {', '.join(f'{s} (done)' if s in record else s for s in chain.stages)}")
    if missing:
        with beating(folder), ray_cluster(_with_room(config)):
            for number, stage in enumerate(chain.stages, 1):
                if stage in record:
                    continue
                _say(f"stage {number} of {len(chain.stages)}: {stage}")
                beat(f"stage {stage}", step=0, saved=0)
                begun = time.perf_counter()
                summary = STAGE[stage](config, folder, record)
                seconds = round(time.perf_counter() - begun, 1)
                record[stage] = {"settings": settings[stage], "summary": summary, "seconds": seconds}
                write_atomically(folder / RECORD, json_text(record))
                _say(f"stage {number} of {len(chain.stages)}: {stage} done in {format_seconds(seconds)}")
    summary = _summary(config, folder, record, time.perf_counter() - started)
    print(json.dumps(summary), flush=True)
    return summary


def _say(text: str) -> None:
    print(text, flush=True)


def _with_room(config: DictConfig) -> DictConfig:
    """One cluster for every stage: rollout servers alone, fine-tuning, and the training with all its actors."""
    from recipe.cluster import needed

    config = config.copy()
    with open_dict(config):
        config.run.ray_num_cpus = config.run.ray_num_cpus or int(needed(config)["CPU"]) + 2
    return config


# ---------------------------------------------------------------------------------------------------------- the record


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); remove it to run the stages again") from error
    return record


def _settings(config: DictConfig, chain: ChainConfig) -> dict[str, dict[str, Any]]:
    """What decides each stage: its own keys and those of the stages before it, resolved and as JSON holds them."""
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    for key in IRRELEVANT:
        OmegaConf.update(resolved, key, None)
    found: dict[str, dict[str, Any]] = {}
    so_far: dict[str, Any] = {}
    for stage in chain.stages:
        so_far |= {key: _plain(OmegaConf.select(resolved, key)) for key in DECIDES[stage]}
        found[stage] = json.loads(json.dumps(so_far))
    return found


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _check_unchanged(settings: Mapping[str, Mapping[str, Any]], folder: Path, record: Mapping[str, Any]) -> None:
    for stage, asked in settings.items():
        if stage not in record:
            continue
        changed = differences(record[stage]["settings"], asked, "it")
        if changed:
            raise ConfigError(
                f"{folder} holds the stage {stage} with other settings: {'; '.join(changed[:3])}; choose another "
                f"run.output_dir, or remove {stage!r} (and what follows it) from {folder / RECORD} to run it again"
            )


# ---------------------------------------------------------------------------------------------------------- the stages


def _changed(config: DictConfig, **values: Any) -> DictConfig:
    """A copy with other values; ``__`` stands for the dot."""
    config = config.copy()
    with open_dict(config):
        for key, value in values.items():
            OmegaConf.update(config, key.replace("__", "."), value)
    return config


def _collect(config: DictConfig, folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    from recipe import srt

    return srt.collect(_changed(config, srt__out=str(folder / "collect"), srt__split="train"))


def _sft(config: DictConfig, folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """One fine-tuning for each file of collect, each going on from the one before (SD-Zero's public code has two)."""
    from recipe import sft

    files = record["collect"]["summary"]["files"]
    model, summaries = str(config.actor_rollout_ref.model.path), []
    for number, file in enumerate(files):
        out = folder / ("sft" if len(files) == 1 else f"sft_{number + 1}")
        asked = _changed(config, sft__files=[file], sft__out=str(out), actor_rollout_ref__model__path=model)
        summaries.append(sft.run(asked))
        model = summaries[-1]["model"]
    return {"model": model, "runs": summaries}


def _start_model(config: DictConfig, record: Mapping[str, Any]) -> str:
    """The student at the beginning of the distillation."""
    return record["sft"]["summary"]["model"] if "sft" in record else str(config.actor_rollout_ref.model.path)


def _distil(config: DictConfig, folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    from recipe import train

    files = file_list(config.data.train_files)
    if chain_config(config).fresh_questions:
        files = [str(write_fresh_questions(config, folder / FRESH))]
    asked = _changed(
        config,
        chain__stages=[],
        actor_rollout_ref__model__path=_start_model(config, record),
        actor_rollout_ref__actor__checkpoint__save_contents=["model", "optimizer", "extra", "hf_model"],
        data__train_files=files,
        run__output_dir=str(unused_folder(folder / "distil")),
        run__save_every=config.run.save_every if config.run.save_every > 0 else config.run.steps,
        # The evaluation does this for all models with the same samples.
        run__val_before=bool(config.forgetting.files),
    )
    summary = train.run(asked)
    checkpoints = Path(asked.run.output_dir) / "checkpoints"
    return summary | {"checkpoint": str(checkpoints / f"global_step_{config.run.steps}")}


def write_fresh_questions(config: DictConfig, path: Path) -> Path:
    """Writes the rows of the training data that collect did not ask.

    Raises:
        ConfigError: collect asked them all; names the keys.
    """
    asked = _asked(config)
    tables = []
    for file in file_list(config.data.train_files):
        table = pq.read_table(file)
        ids = table["extra_info"].combine_chunks().field("question_id").to_pylist()
        tables.append(table.filter(pa.array([str(name) not in asked for name in ids])))
    fresh = pa.concat_tables(tables)
    if not fresh.num_rows:
        raise ConfigError(
            f"chain.fresh_questions=true, and collect asked all {len(asked)} training questions; set srt.limit, or "
            "chain.fresh_questions=false to distil on the same ones"
        )
    pq.write_table(fresh, path)
    return path


def _asked(config: DictConfig) -> set[str]:
    from recipe.sample_data import read_questions

    end = None if config.srt.limit is None else config.srt.skip + config.srt.limit
    return {request.question_id for request in read_questions(config, "train", end)[0][config.srt.skip :]}


def _evaluate(config: DictConfig, folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Base, fine-tuned and distilled model on the same questions, and how well each revises its own attempts."""
    from recipe import srt

    chain = chain_config(config)
    models: dict[str, str | None] = {"base": None}
    if "sft" in record:
        models["sft"] = record["sft"]["summary"]["model"]
    if "distil" in record:
        models["distil"] = record["distil"]["summary"]["checkpoint"]
    models = {name: checkpoint for name, checkpoint in models.items() if name in chain.evaluate}
    reviser = chain.evaluate_revisions if config.distill.context.kind == "revision" else 0
    validation = config.actor_rollout_ref.rollout.val_kwargs
    found: dict[str, Any] = {}
    for name, checkpoint in models.items():
        out = folder / "evaluate" / name
        summary = srt.collect(
            _changed(
                config,
                srt__out=str(out),
                srt__split="test",
                srt__skip=0,
                srt__limit=None,
                srt__attempts=config.run.val_samples,
                srt__revisions=reviser,
                srt__revise_right=True,
                srt__revise_wrong=True,
                srt__temperature=validation.temperature,
                srt__top_p=validation.top_p,
                srt__top_k=-1,
                srt__checkpoint=checkpoint,
                srt__write=False,
            )
        )
        found[name] = {
            **_accuracy(config, out / "attempts"),
            **{f"reviser/{key}": summary[key] for key in ("correction_rate", "retention") if reviser},
        }
    return found


def _accuracy(config: DictConfig, store: Path) -> dict[str, float]:
    """Of the samples of a store, as validation in training counts it."""
    rows = read_store(store)[1]
    return {
        **metrics_of(_answers(rows), answer_keys(config)),
        "response/length": sum(row["tokens"] for row in rows) / len(rows),
        "response/truncated": sum(row["truncated"] for row in rows) / len(rows),
    }


def _answers(rows: list[dict[str, Any]]) -> dict[QuestionKey, QuestionAnswers]:
    """The samples of a store by question."""
    rows = sorted(rows, key=lambda row: (row["question_id"], row["sample"]))
    verdicts = {key: [row[key] for row in rows] for key in ("acc", "pred", "status")}
    return group_answers(["evaluation"] * len(rows), [row["question_id"] for row in rows], verdicts)


def _item_counts(store: Path) -> dict[str, Any]:
    """Right answers by question, as a validation in training writes them."""
    questions = _answers(read_store(store)[1])
    return item_counts(questions, list(questions), [name for _, name in questions])


STAGE: dict[str, Callable[[DictConfig, Path, Mapping[str, Any]], dict[str, Any]]] = {
    "collect": _collect,
    "sft": _sft,
    "distil": _distil,
    "evaluate": _evaluate,
}


# ------------------------------------------------------------------------------------------------------------ the end


def _summary(config: DictConfig, folder: Path, record: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Writes the run's files: one line of metrics for each evaluated model, in the order of the stages."""
    from recipe.report import build_report
    from recipe.train import write_changes

    evaluated = record.get("evaluate", {}).get("summary", {})
    metric = f"val/mean@{config.run.val_samples}"
    distil = record.get("distil", {}).get("summary", {})
    drawn = _drawn(config, record)
    summary = {
        "method": config.distill.method,
        "steps": distil.get("steps", 0),
        "metric": metric,
        "before": evaluated.get("base", {}).get(metric),
        "after": list(evaluated.values())[-1].get(metric) if evaluated else None,
        "seconds_to_first_step": distil.get("seconds_to_first_step"),
        "seconds_per_step": distil.get("seconds_per_step"),
        "samples": drawn,
        "seconds": round(seconds, 1),
        "stages": {name: stage["summary"] for name, stage in record.items()},
        "report": "",
    }
    files = RunFiles(folder)
    with files:
        files.truncate_to_step(-1)
        files.write_config(OmegaConf.to_container(config, resolve=True))
        for step, (name, metrics) in enumerate(evaluated.items()):
            files.append_metrics(step, {"stage": name, **metrics})
            store = folder / "evaluate" / name / "attempts"
            if store.is_dir():  # it may have been removed since, as the largest part of the folder
                files.append_validation(step, _item_counts(store))
        files.write_summary(summary)
        write_changes(files, config)
        if evaluated:
            summary["report"] = str(build_report(folder))
            files.write_summary(summary)
    return summary


def _drawn(config: DictConfig, record: Mapping[str, Any]) -> int:
    """Samples of the model that the training used: attempts, revisions and rollouts."""
    collected = record.get("collect", {}).get("summary", {})
    steps = record.get("distil", {}).get("summary", {}).get("steps", 0)
    rollouts = steps * config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    return collected.get("attempts", 0) + collected.get("revisions", 0) + rollouts
