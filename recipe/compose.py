"""From command-line overrides to one validated configuration, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe import (
    chain_settings,
    evaluation_settings,
    sample_settings,
    settings,
    sft_settings,
    snr_settings,
    srt_settings,
    teacher_text_settings,
)
from recipe.pair_checks import check_pairs
from verl_ext import config as distill
from verl_ext import forgetting_config
from verl_ext.adapter import check_adapter, is_adapter_off
from verl_ext.config import ConfigError
from verl_ext.stages import stages
from verl_ext.verifier_config import VerifierConfig, route_through_pool, verifier_config

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
GROUPS = (
    "method", "model", "data", "hardware", "teacher", "context", "divergence", "weighting", "sequences", "adapter",
    "layout",
)  # fmt: skip
EVALUATION = "evaluation"
"""The group that only `python -m recipe.evaluate` has."""


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="distill_schema", node=distill.defaults())
    store.store(name="run_schema", node=settings.defaults())
    store.store(name="sample_schema", node=sample_settings.defaults())
    store.store(name="text_schema", node=teacher_text_settings.defaults())
    store.store(name="evaluation_schema", node=evaluation_settings.defaults())
    store.store(name="snr_schema", node=snr_settings.defaults())
    store.store(name="chain_schema", node=chain_settings.defaults())
    store.store(name="sft_schema", node=sft_settings.defaults())
    store.store(name="srt_schema", node=srt_settings.defaults())
    store.store(name="forgetting_schema", node=forgetting_config.defaults())
    store.store(name="verifier_schema", node=asdict(VerifierConfig()))
    OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)


def choices(group: str) -> list[str]:
    """Names of a group's presets."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose_config(overrides: Sequence[str], name: str = "train") -> DictConfig:
    """Composes and checks the configuration.

    Raises:
        ConfigError: an override that does not exist, a wrong type or value; one message with what is allowed.
    """
    config = _compose(overrides, name)
    if "run" in config:
        config.run.overrides = list(overrides)
    check(config)
    route_through_pool(config)
    return config


def compose_presets(overrides: Sequence[str], name: str = "train") -> DictConfig:
    """What the presets say by themselves, not checked: a value that only the user can give may be missing.

    Raises:
        ConfigError: a preset that does not exist.
    """
    config = _compose(overrides, name)
    route_through_pool(config)
    return config


def _compose(overrides: Sequence[str], name: str) -> DictConfig:
    _register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            search_path = f"hydra.searchpath=[file://{_verl_config()}]"
            return compose(config_name=name, overrides=[search_path, *(_ours(o) for o in overrides)])
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        raise ConfigError(_readable(error, overrides)) from error


def _verl_config() -> Path:
    """verl's YAML, found without importing verl: the import reads the environment that the configuration decides."""
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("verl is not installed; run scripts/setup.sh")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


def _ours(override: str) -> str:
    """`data=NAME` is our preset; without the package it would replace verl's own data block."""
    return f"data@_global_={override[5:]}" if override.startswith("data=") else override


def _readable(error: BaseException, overrides: Sequence[str]) -> str:
    """Hydra's message in one line, and the presets that exist where a preset was asked for."""
    text = " ".join(str(error.__cause__ or error).split())
    for override in overrides:
        key, _, value = override.partition("=")
        if key in (*GROUPS, EVALUATION) and value not in choices(key):
            return f"{key}={value} does not exist; {key} is one of: {', '.join(choices(key))}"
        if override.split("=")[0].strip("+~") and "=" not in override and not override.startswith("~"):
            return f"{override!r} is not an override; write key=value"
    if "Key '" in text and "is not in struct" in text:
        key = text.split("Key '")[1].split("'")[0]
        near = next((o for o in overrides if key in o), key)
        return f"{near}: there is no key {key!r} there (a key that verl's YAML lacks is added with a leading +). {text}"
    return text


def check(config: DictConfig) -> None:
    """Everything that can be known before Ray starts. Raises ConfigError."""
    distill.build(settings.RunConfig, OmegaConf.to_container(config.run, resolve=True), "run").validate()
    verifier_config(config.verifier)
    _check_forgetting(config)
    chain_settings.chain_config(config)
    method = distill.distill_config(config.distill)
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    _check_batch(config)
    check_adapter(config, method)
    for stage in stages(method):
        if stage.enabled:
            _check_distillation(config, stage)
            check_pairs(config, stage)
    for key in ("max_actor_ckpt_to_keep", "remove_previous_ckpt_in_save"):
        if config.trainer.get(key):
            raise ConfigError(
                f"trainer.{key} is {config.trainer[key]}; allowed: not set, because verl forgets what it saved "
                "before a resume and leaves our files behind; set run.keep_checkpoints"
            )
    missing = [key for key in OmegaConf.missing_keys(config) if not key.startswith(("critic", "reward.reward_model"))]
    if missing:
        raise ConfigError(f"{sorted(missing)[0]} has no value")
    tokens = config.data.max_prompt_length + config.data.max_response_length
    if rollout.max_model_len and rollout.max_model_len < tokens:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_model_len is {rollout.max_model_len}; allowed: at least "
            f"data.max_prompt_length + data.max_response_length = {tokens}"
        )
    if actor.strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(f"actor_rollout_ref.actor.strategy is {actor.strategy!r}; allowed: fsdp, fsdp2")


def _check_forgetting(config: DictConfig) -> None:
    asked = forgetting_config.forgetting_config(config.forgetting)
    if asked.files and not (config.run.val_before and config.run.val_every > 0):
        raise ConfigError(
            f"forgetting.files is {asked.files}; allowed: only with run.val_before=true (found "
            f"{config.run.val_before}) and run.val_every above 0 (found {config.run.val_every}), because it is asked "
            "together with the first and the last validation"
        )


def _check_batch(config: DictConfig) -> None:
    actor, batch = config.actor_rollout_ref.actor, config.data.train_batch_size
    for key in (
        "data.train_batch_size",
        "data.max_prompt_length",
        "data.max_response_length",
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        "actor_rollout_ref.rollout.n",
        "trainer.n_gpus_per_node",
        "trainer.nnodes",
    ):
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key} is {value!r}; allowed: a whole number from 1")
    if batch % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size is {actor.ppo_mini_batch_size}; "
            f"allowed: a divisor of data.train_batch_size = {batch}"
        )
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    rows = actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    if rows % ranks:
        raise ConfigError(
            f"a mini-batch has {actor.ppo_mini_batch_size} prompts x {config.actor_rollout_ref.rollout.n} rollouts = "
            f"{rows} rows; allowed: a multiple of the {ranks} ranks"
        )


def _check_distillation(config: DictConfig, method: distill.DistillConfig) -> None:
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    n = config.actor_rollout_ref.rollout.n
    if method.context.kind == "sibling" and n < 2 and not (method.context.feedback or method.context.own_success):
        raise ConfigError(
            f"actor_rollout_ref.rollout.n is {n}; allowed: at least 2 with context=sibling, because a row's "
            "demonstration is another rollout of its group"
        )
    weighting = method.weighting
    if weighting.rates == "batch" and not weighting.ignores_rates and n < 2:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n is {n}; allowed: at least 2 with distill.weighting.rates=batch, because one "
            "rollout has a pass rate of 0 or 1 only"
        )
    correction = config.algorithm.get("rollout_correction") or {}
    asked = [key for key in ("rollout_is", "rollout_rs", "bypass_mode") if correction.get(key)]
    if method.sequences.source == "reference" and asked:
        raise ConfigError(
            f"algorithm.rollout_correction.{asked[0]} is {correction[asked[0]]!r}; allowed: null with "
            "distill.sequences.source=reference, because replayed text was not sampled"
        )
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    teachers = (method.teacher.workers or 1) * method.teacher.nodes
    if not method.teacher.beside and ranks % teachers:
        raise ConfigError(
            f"distill.teacher.workers x distill.teacher.nodes is {teachers}; allowed: a divisor of the student's "
            f"{ranks} ranks, whose rows it reads"
        )
    _check_sequence_parallel(config)
    if actor.ppo_epochs != 1:
        raise ConfigError(f"actor_rollout_ref.actor.ppo_epochs is {actor.ppo_epochs}; allowed: 1 with distillation")
    if model.use_fused_kernels:
        raise ConfigError("actor_rollout_ref.model.use_fused_kernels is true; allowed: false (logits are needed)")
    needs_reference = actor.use_kl_loss or config.algorithm.use_kl_in_reward
    if needs_reference and method.teacher.kind != "live" and not is_adapter_off(method, model):
        raise ConfigError(
            f"distill.teacher.kind is {method.teacher.kind!r} together with a KL term; allowed: live, because the "
            "teacher stands in the reference policy's place"
        )
    dtype = config.actor_rollout_ref.ref.fsdp_config.model_dtype
    if dtype != "fp32" and method.teacher.moves:
        raise ConfigError(
            f"actor_rollout_ref.ref.fsdp_config.model_dtype is {dtype!r}; "
            "allowed: fp32 with a teacher that follows the student (bf16 does not follow slow averages)"
        )


def _check_sequence_parallel(config: DictConfig) -> None:
    rollout_model = config.actor_rollout_ref
    size = rollout_model.actor.ulysses_sequence_parallel_size
    if size == 1:
        return
    attention = rollout_model.model.override_config.get("attn_implementation")
    if attention != "flash_attention_2" or not rollout_model.model.use_remove_padding:
        raise ConfigError(
            f"actor_rollout_ref.actor.ulysses_sequence_parallel_size is {size}; allowed: 1, or with "
            "attn_implementation=flash_attention_2 and use_remove_padding=true (found "
            f"{attention}, {rollout_model.model.use_remove_padding})"
        )
    teacher = rollout_model.ref.ulysses_sequence_parallel_size
    if teacher != size:
        raise ConfigError(
            f"actor_rollout_ref.ref.ulysses_sequence_parallel_size is {teacher}; allowed: the student's {size}, "
            "because both must have their rows on the same ranks"
        )


def as_text(config: Any) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(config, resolve=True)
