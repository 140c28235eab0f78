"""What must hold for a run's questions before Ray starts: pass rates of this very run, and reference texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from omegaconf import DictConfig

from verl_ext.config import ConfigError, DistillConfig, distill_config
from verl_ext.question_data import file_list
from verl_ext.reference_context import check_reference, check_special_tokens
from verl_ext.stages import stages, step_at, switch_step

NAMED = 5
"""Rows that a message names."""


def check_questions(config: DictConfig) -> None:
    """Raises ConfigError or StoreError, naming the setting, the file or the rows."""
    distill = distill_config(config.distill)
    if not distill.enabled:
        return
    try:
        switch_step(distill, config.run.steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    parts = stages(distill)
    _check_recomputing(distill, parts, config.run.steps)
    if any(stage.weighting.store for stage in parts):
        _check_stores(config, {stage.weighting.store for stage in parts} - {None})
    _check_references(config, parts)


def _check_recomputing(distill: DistillConfig, blocks: list[DistillConfig], steps: int) -> None:
    """What asks for new pass rates does so while it holds: a key that the second stage does not set holds in both."""
    switch = switch_step(distill, steps)
    own = distill.schedule.second.get("weighting", {})
    for key in ("recompute_every", "recompute_at"):
        parts = [("distill.weighting", blocks[0], 1, steps)]
        if switch is not None and key in own:
            second = ("distill.schedule.second.weighting", blocks[1], switch, steps)
            parts = [("distill.weighting", blocks[0], 1, switch), second]
        for block, stage, begin, end in parts:
            value = getattr(stage.weighting, key)
            if value is None:
                continue
            at = [step_at(value, steps)] if key == "recompute_at" else range(0, steps, value)
            if not any(begin <= done < end for done in at):
                raise ConfigError(
                    f"{block}.{key} is {value}; allowed: what falls on a step from {begin} to {end - 1} (run.steps is "
                    f"{steps}), else no pass rates are taken again"
                )


def _check_stores(config: DictConfig, folders: set[str]) -> None:
    from verl.utils import hf_tokenizer

    from verl_ext.pass_rate_store import check_same_rollouts, read_pass_rates
    from verl_ext.run_sampling import expected_rollouts
    from verl_ext.sample_store import StoreError

    model = config.actor_rollout_ref.model
    tokenizer = hf_tokenizer(
        model.get("tokenizer_path") or model.path, trust_remote_code=model.get("trust_remote_code", False)
    )
    if model.get("custom_chat_template"):
        tokenizer.chat_template = model.custom_chat_template
    expected = expected_rollouts(config, tokenizer)
    ids = [str(row["question_id"]) for _, _, row in _training_rows(config)]
    for folder in sorted(folders):
        table = read_pass_rates(Path(folder), threshold=config.distill.context.success_threshold)
        check_same_rollouts(table, expected, what="this run")
        missing = table.missing(ids)
        if missing:
            raise StoreError(
                f"distill.weighting.store: {folder} has no samples of {len(missing)} of the {len(ids)} questions of "
                f"data.train_files, the first is {missing[0]}; run recipe.pass_rates on this data, it draws the rest"
            )


def _check_references(config: DictConfig, blocks: list[DistillConfig]) -> None:
    for stage in blocks:
        sequences = stage.sequences
        if sequences.replays:
            key = f"distill.sequences.reference_key={sequences.reference_key}"
            _check_texts(config, key, sequences.reference_key, lists=True)
        if stage.context.kind == "reference":
            key = f"distill.context.reference_key={stage.context.reference_key}"
            _check_texts(
                config,
                key,
                stage.context.reference_key,
                # Pairs are left out one by one and counted.
                some_will_do=stage.pairs,
                lists=False,
                thinking_removed=stage.context.remove_thinking,
            )


def _check_texts(config: DictConfig, setting: str, key: str, *, some_will_do: bool = False, **options: bool) -> None:
    """Every training question has its reference text, and no text spells a special token of the tokenizer.

    ``some_will_do``: a single one with a text is enough.
    """
    from transformers import AutoTokenizer

    rows = list(_training_rows(config))
    infos = [row for _, _, row in rows]

    def places(found: list[Any]) -> str:
        named = ", ".join(f"{rows[one[0]][0]} row {rows[one[0]][1]} (question {one[1]})" for one in found[:NAMED])
        return named + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")

    try:
        missing = check_reference(infos, key, **options)
    except ValueError as error:
        raise ConfigError(f"{setting}: data.train_files: {error}") from error
    if missing and not (some_will_do and len(missing) < len(rows)):
        raise ConfigError(
            f"{setting}: {len(missing)} of {len(rows)} training rows have no text there: {places(missing)}. Leave them "
            "out of the file, or give another key"
        )
    model = config.actor_rollout_ref.model
    tokenizer = AutoTokenizer.from_pretrained(
        model.get("tokenizer_path") or model.path, trust_remote_code=bool(model.get("trust_remote_code", False))
    )
    special = check_special_tokens(infos, key, tokenizer, **options)
    if special and not (some_will_do and len(special) + len(missing) < len(rows)):
        raise ConfigError(
            f"{setting}: the text of {len(special)} training rows spells a special token of the tokenizer, which would "
            f"end a turn in the middle: {places(special)}; the first is {special[0][2]!r}"
        )


def _training_rows(config: DictConfig) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """File, row number and ``extra_info`` of the training data."""
    for file in file_list(config.data.train_files):
        for number, row in enumerate(parquet.read_table(file, columns=["extra_info"])["extra_info"].to_pylist()):
            yield file, number, row
