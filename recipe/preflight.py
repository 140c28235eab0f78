"""What must hold on this machine before minutes are spent on starting: data, model, attention kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as parquet
from omegaconf import DictConfig

from recipe.adapter_checks import check_targets
from recipe.memory import known_architectures
from recipe.question_checks import check_questions
from recipe.revision_checks import check_revision, resolve_phrases
from verl_ext.config import ConfigError, distill_config
from verl_ext.logger_names import extra_loggers
from verl_ext.question_data import file_list
from verl_ext.stages import stages
from verl_ext.verifier_config import VerifierConfig, check_function, verifier_config
from verl_ext.vocabulary import check_same_vocabulary

COLUMNS = {
    "prompt": "list of {role, content}",
    "data_source": "text",
    "reward_model": "{ground_truth, style}",
    "extra_info": "{index, question_id, ...}",
}


def preflight(config: DictConfig) -> None:
    """Raises ConfigError that names the file, row, key or package and what to do.

    Writes into ``config`` what depends on the model: the phrases of the context "revision".
    """
    for _, part in parts(config):
        part()


def parts(config: DictConfig) -> list[tuple[str, Callable[[], None]]]:
    """The checks by name, in their order; each raises ConfigError (or StoreError). :mod:`recipe.doctor` lists them."""
    return [
        ("revision phrases", lambda: resolve_phrases(config)),
        ("loggers", lambda: check_loggers(config)),
        ("attention kernels", lambda: check_attention(config)),
        ("verifier", lambda: check_function(verifier_config(config.verifier))),
        ("model and lengths", lambda: check_lengths(config, check_model(config))),
        ("teacher and support", lambda: check_teacher(config)),
        ("adapter", lambda: check_targets(config)),
        ("revision turn", lambda: check_revision(config)),
        ("data files", lambda: check_data(config)),
        ("questions", lambda: check_questions(config)),
    ]


def check_data(config: DictConfig) -> None:
    """Every data file is there and has what the trainer reads."""
    for key in ("train_files", "val_files"):
        files = file_list(config.data[key])
        if not files:
            raise ConfigError(f"data.{key} names no file: this data preset is for evaluation (recipe.sample)")
        for file in files:
            check_parquet(Path(file), f"data.{key}")
    for file in config.forgetting.files:
        check_parquet(Path(str(file)), "forgetting.files")
    if config.forgetting.function is not None:
        check_function(VerifierConfig(function=config.forgetting.function, options=dict(config.forgetting.options)))


def _how_to_make(path: Path) -> str:
    """The command that writes a file of a data preset: its folder under ``data/`` has the command's name."""
    parts = path.parts
    name = parts[parts.index("data") + 1] if "data" in parts[:-2] else ""
    flavours = {"tiny_world_mcq": "multiple_choice", "tiny_world_tools": "tool_call"}
    if name in flavours:
        return f"python -m data_prep.tiny_world --flavour {flavours[name]} --out data/{name} makes it"
    if name.isidentifier() and find_spec(f"data_prep.{name}") is not None:
        return f"python -m data_prep.{name} --out data/{name} makes it"
    return "python -m data_prep.NAME --out DIR makes the data sets of this project"


def check_parquet(path: Path, key: str) -> None:
    """The columns that the trainer and the verifier read are there, in every row."""
    if not path.exists():
        raise ConfigError(f"{key}: {path} does not exist; {_how_to_make(path)}")
    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise ConfigError(f"{key}: {path} is not a readable parquet file: {error}") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ConfigError(
            f"{key}: {path} has no column {missing[0]!r} ({COLUMNS[missing[0]]}); "
            f"it has {', '.join(table.column_names)}"
        )
    if table.num_rows == 0:
        raise ConfigError(f"{key}: {path} has no rows")
    for row, (prompt, reward, extra) in enumerate(
        zip(*(table[name].to_pylist() for name in ("prompt", "reward_model", "extra_info")), strict=True)
    ):
        if not prompt or not isinstance(prompt, list) or not str(prompt[-1].get("content") or "").strip():
            raise ConfigError(f"{key}: {path}, row {row}: prompt is {prompt!r}, expected a list of messages with text")
        if prompt[-1].get("role") != "user":
            role = prompt[-1].get("role")
            raise ConfigError(f"{key}: {path}, row {row}: the last message is of {role!r}, expected user")
        if not isinstance(reward, dict) or reward.get("ground_truth") is None:
            raise ConfigError(f"{key}: {path}, row {row}: reward_model.ground_truth is missing")
        for name in ("question_id", "index"):
            if not isinstance(extra, dict) or extra.get(name) in (None, ""):
                raise ConfigError(f"{key}: {path}, row {row}: extra_info.{name} is missing")


def check_loggers(config: DictConfig) -> None:
    """The loggers that are asked for exist here, and none is asked for what it would not get."""
    extra_loggers(config.trainer.logger)
    if config.trainer.log_val_generations:
        raise ConfigError(
            f"trainer.log_val_generations is {config.trainer.log_val_generations}; allowed: 0. Completions are in "
            "completions.jsonl and the report (distill.samples.*), not in loggers"
        )


def check_attention(config: DictConfig) -> None:
    """Packed rows on GPUs need flash-attn; without it verl falls back to something slow, or fails late."""
    wanted = config.actor_rollout_ref.model.override_config.get("attn_implementation")
    if wanted == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ConfigError(
            "actor_rollout_ref.model.override_config.attn_implementation is flash_attention_2 and flash-attn "
            "is not installed; give scripts/setup.sh a prebuilt wheel (FLASH_ATTN_WHEEL=...), use the image, or set it "
            "to sdpa with actor_rollout_ref.model.use_remove_padding=false (padded rows: slower, more memory)"
        )


def check_teacher(config: DictConfig) -> None:
    """The support fits the vocabulary, and another model as teacher has the student's vocabulary."""
    if config.distill.coefficient == 0:
        return
    path = str(config.actor_rollout_ref.model.path)
    folder = Path(path).expanduser()
    if (folder / "config.json").exists():
        vocabulary = json.loads((folder / "config.json").read_text()).get("vocab_size")
        for divergence in (stage.divergence for stage in stages(distill_config(config.distill))):
            if divergence.support != "full" and vocabulary is not None and divergence.topk > vocabulary:
                raise ConfigError(
                    f"distill.divergence.topk is {divergence.topk}; allowed: up to {vocabulary}, the model's vocabulary"
                )
    if config.distill.teacher.kind == "external":
        check_same_vocabulary(
            path,
            str(config.distill.teacher.path),
            trust_remote_code=bool(config.actor_rollout_ref.model.get("trust_remote_code", False)),
        )


def check_model(config: DictConfig) -> int | None:
    """The model's number of positions; None for a hub name that is not in the table of :mod:`recipe.memory`."""
    path = str(config.actor_rollout_ref.model.path)
    if not path.startswith(("/", ".", "~")):
        return known_architectures().get(path, {}).get("max_position_embeddings")
    folder = Path(path).expanduser()
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"actor_rollout_ref.model.path: {folder} holds no config.json; expected a Hugging Face folder"
        )
    return json.loads((folder / "config.json").read_text()).get("max_position_embeddings")


def check_lengths(config: DictConfig, positions: int | None) -> None:
    """Student and teacher sequences fit the model."""
    if positions is None:
        return
    student = config.data.max_prompt_length + config.data.max_response_length
    if student > positions:
        raise ConfigError(
            f"data.max_prompt_length + data.max_response_length = {student}; "
            f"allowed: up to the model's {positions} positions"
        )
    longest = max(stage.context.max_length for stage in stages(distill_config(config.distill)))
    teacher = longest + config.data.max_response_length
    if config.distill.coefficient > 0 and teacher > positions:
        raise ConfigError(
            f"distill.context.max_length + data.max_response_length = {teacher}; "
            f"allowed: up to the model's {positions} positions"
        )
