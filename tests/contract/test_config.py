"""Every preset composes, says what its source says, and a wrong value is refused with the key and what is allowed."""

from __future__ import annotations

import copy
import dataclasses
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from recipe import (
    evaluation_settings,
    sample_settings,
    settings,
    sft_settings,
    snr_settings,
    srt_settings,
    teacher_text_settings,
)
from recipe.compose import CONF, EVALUATION, GROUPS, ROOT, check, choices, compose_config
from recipe.study_file import read_study
from recipe.train import help_text, main
from verl_ext import config as distill
from verl_ext import forgetting_config
from verl_ext.config import ConfigError, DistillConfig, distill_config
from verl_ext.contexts import FEEDBACK_TEMPLATE, REPROMPT_TEMPLATE, SOLUTION_TEMPLATE
from verl_ext.reference_context import OPSD_TEMPLATE, OPSD_V1_TEMPLATE, SDFT_TEMPLATE
from verl_ext.verifier_config import VerifierConfig

pytestmark = pytest.mark.contract

PRESETS = [f"{group}={name}" for group in GROUPS for name in choices(group)]


BLOCKS = {"distill": dataclasses.asdict(DistillConfig()), "run": settings.defaults(),
          "sample": sample_settings.defaults(), "verifier": dataclasses.asdict(VerifierConfig()),
          "forgetting": forgetting_config.defaults(), "snr": snr_settings.defaults(),
          "text": teacher_text_settings.defaults(), "sft": sft_settings.defaults(),
          "srt": srt_settings.defaults(), "evaluation": evaluation_settings.defaults()}  # fmt: skip


def block(*overrides: str) -> dict[str, Any]:
    """The composed ``distill`` block."""
    return OmegaConf.to_container(compose_config(overrides).distill, resolve=True)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}.{key}" if prefix else key).items()}


# ------------------------------------------------------------------------------------------------------ composition


def test_the_primary_config_is_sc_sdpo_on_the_tiny_world_and_validates() -> None:
    config = compose_config([])
    assert config.distill.method == "sc_sdpo"
    assert config.actor_rollout_ref.model.path == str(ROOT / "models" / "tiny_world" / "plain")
    assert isinstance(distill_config(config.distill), DistillConfig)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_validates(preset: str) -> None:
    external = ["distill.teacher.path=some/model"]
    methods = ("paced_distill", "paced_two_stage", "paced_two_stage_reversed")
    needed = dict.fromkeys(["teacher=external", *(f"method={name}" for name in methods)], external)
    needed["adapter=lora"] = ["teacher=frozen"]
    needed |= {"sequences=pairs": ["method=pbsd"], "sequences=pairs_replayed": ["method=pbsd", "teacher=frozen"]}
    needed |= dict.fromkeys(("sequences=reference", "sequences=teacher_text"), ["context=none", "weighting=uniform"])
    config = compose_config([preset, *needed.get(preset, [])])
    distill_config(config.distill)
    assert OmegaConf.to_container(config, resolve=True), "every interpolation resolves"


def test_the_configs_of_the_other_commands_compose() -> None:
    config = compose_config(["sample.out=somewhere"], name="sample")
    assert sample_settings.sample_config(config).k == sample_settings.SampleConfig().k
    assert sample_settings.sample_config(compose_config(["sample.out=x"], name="pass_rates")).split == "train"
    assert snr_settings.snr_config(compose_config(["snr.out=x"], name="snr")).bins == snr_settings.SnrConfig().bins
    assert compose_config(["sample.out=x", "text.out=y"], name="teacher_text").text.key == "teacher_text"


STUDIES = {
    **{"paced": 3, "paced_ablations": 3, "opsd": 1, "pbsd": 3, "pbsd_stability": 3, "pbsd_teachers": 3},
    **{"sc_sdpo": 8, "sc_sdpo_ablations": 3, "sdpo_ablations": 3},
}


@pytest.mark.parametrize(("name", "seeds"), STUDIES.items())
def test_every_entry_of_a_declared_study_composes(name: str, seeds: int) -> None:
    study = read_study(CONF / "study" / f"{name}.yaml")
    first = {run.entry: run for run in study.runs if run.seed == 0}
    assert len(first) == len(study.entries) and len(study.runs) == seeds * len(first)
    composed = {entry: compose_config(run.overrides) for entry, run in first.items()}
    parts = ("distill", "actor_rollout_ref.model.path", "actor_rollout_ref.actor.optim.lr", "data.train_batch_size")
    different = {tuple(str(OmegaConf.select(config, key)) for key in parts) for config in composed.values()}
    assert len(different) == len(composed), "no entry repeats another"


def test_the_overview_s_own_entries_compose_and_are_no_other_study_s() -> None:
    study = read_study(CONF / "study" / "all_methods.yaml")
    first = [run for run in study.own_runs if run.seed == 0]
    methods = {run.entry: compose_config(run.overrides).distill.method for run in first}
    assert methods == {"paced_self_akl": "paced_self", "sdft_long": "sdft"}
    shown = {run.overrides for run in study.runs if run.owner is not None}
    assert not shown & {run.overrides for run in first}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sc_sdpo_solved", "data.train_files", str(ROOT / "data/tiny_world_solved/train.parquet")),
        ("sc_sdpo_strict", "verifier.options.mode", "strict"),
        ("sc_sdpo_learning_rates", "actor_rollout_ref.actor.optim.lr", 2e-4),
    ],
)
def test_the_studies_around_sc_sdpo_s_differ_from_it_in_one_thing(name: str, key: str, value: object) -> None:
    main, other = (read_study(CONF / "study" / f"{one}.yaml") for one in ("sc_sdpo", name))
    assert OmegaConf.select(compose_config(other.runs[0].overrides), key) == value
    shared = set(main.runs[0].overrides) - {"data=tiny_world"}
    assert all(shared - {"method=sc_sdpo"} <= set(run.overrides) for run in other.runs)
    if name == "sc_sdpo_learning_rates":
        assert not {run.seed for run in main.runs} & {run.seed for run in other.runs}, "tuned on seeds of its own"
    else:
        assert [run.seed for run in other.runs] == [run.seed for run in main.runs]
        assert other.questions == main.questions


def test_the_repository_s_groups_are_the_ones_the_commands_know() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders - {"study", EVALUATION} == set(GROUPS)


# ---------------------------------------------------------------------------------------------- one source of defaults


def test_the_dataclasses_are_the_only_source_of_defaults() -> None:
    assert distill.defaults() == dataclasses.asdict(DistillConfig())
    assert distill_config(distill.defaults()) == DistillConfig()
    assert distill_config({}) == DistillConfig()
    assert settings.defaults() == dataclasses.asdict(settings.RunConfig())
    assert sample_settings.defaults() == dataclasses.asdict(sample_settings.SampleConfig())


def test_a_composed_block_has_exactly_the_keys_of_the_dataclass() -> None:
    assert set(flat(block())) == set(flat(dataclasses.asdict(DistillConfig())))
    run = OmegaConf.to_container(compose_config([]).run)
    assert set(run) == {field.name for field in dataclasses.fields(settings.RunConfig)}


def yaml_files() -> list[Path]:
    return [path for path in CONF.rglob("*.yaml") if path.parent.name != "study" and path.name != "agent_loops.yaml"]


@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_that_a_yaml_file_sets_in_our_blocks_exists_in_the_dataclass(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = {key: value for key, value in (yaml.safe_load(text) or {}).items() if key != "defaults"}
    package = text.splitlines()[0].removeprefix("# @package ").strip() if text.startswith("# @package") else ""
    if package.startswith("distill."):
        found = {"distill": {package.removeprefix("distill."): found}}
    known = {f"distill.{key}" for key in flat(dataclasses.asdict(DistillConfig()))}
    known |= {f"run.{key}" for key in dataclasses.asdict(settings.RunConfig())}
    for name in ("sample", "evaluation", "forgetting", "snr", "text", "sft", "srt"):
        known |= {f"{name}.{key}" for key in BLOCKS[name]}
    known |= {f"verifier.{key}" for key in dataclasses.asdict(VerifierConfig())}
    found.get("distill", {}).get("schedule", {}).pop("second", None)  # checked where the preset composes
    found.get("distill", {}).get("context", {}).pop("template_kwargs", None)  # they belong to the chat template
    found.get("verifier", {}).pop("options", None)  # they belong to the function: test_data_presets.py
    # A block may be empty by now; that names no key.
    ours = {key for key, value in flat(found).items() if key.split(".")[0] in BLOCKS and value != {}}
    assert ours <= known


def test_the_templates_are_sdpo_s_byte_for_byte() -> None:
    context = block("method=sdpo")["context"]
    assert (
        context["reprompt_template"]
        == REPROMPT_TEMPLATE
        == ("{prompt}{solution}{feedback}\n\nCorrectly solve the original question.")
    )
    assert context["solution_template"] == SOLUTION_TEMPLATE == "\nCorrect solution:\n\n{successful_previous_attempt}"
    assert (
        context["feedback_template"]
        == FEEDBACK_TEMPLATE
        == ("\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}")
    )


def test_configuration_docs_name_every_key_with_its_default() -> None:
    rows = [
        line
        for line in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(tuple(f"| `{name}." for name in BLOCKS))
    ]
    documented = {line.split("`")[1]: [cell.strip() for cell in line.strip("|").split("|")] for line in rows}
    expected = {f"{name}.{key}": value for name, values in BLOCKS.items() for key, value in flat(values).items()}
    assert set(documented) == set(expected)
    for key, value in expected.items():
        if key.endswith("_template"):
            continue
        shown = documented[key][2].strip("`")
        assert yaml.safe_load(shown) == value, f"{key}: the page says {shown}, the default is {value!r}"


def test_the_methods_page_names_functions_keys_and_presets_that_exist() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:verl_ext|recipe)\.[\w.]+)`", page)
    assert len(names) > 20
    for name in names:
        assert pkgutil.resolve_name(name) is not None
    keys = set(flat(BLOCKS))
    for key in re.findall(r"`((?:distill|run|forgetting|snr)\.[a-z_.]+[a-z])`", page):
        assert key in keys or any(known.startswith(f"{key}.") for known in keys), key
    for group, preset in re.findall(rf"`({'|'.join(GROUPS)})=(\w+)`", page):
        assert preset in choices(group), f"{group}={preset}"
    assert [name for name in choices("method") if f"`{name}`" not in page and f"method={name}" not in page] == []


# --------------------------------------------------------------------------------------------------- published presets

PACED_WEIGHT = {
    "distill.weighting.alpha": 1.0,
    "distill.weighting.beta": 1.0,
    "distill.weighting.normalizer": "mean_active",
    "distill.weighting.rates": "store",
    "distill.weighting.samples": 8,
    "actor_rollout_ref.actor.optim.lr": 1e-7,
    "actor_rollout_ref.rollout.temperature": 1.0,
}

SD_ZERO = {
    "distill.coefficient": 1.0,
    "distill.teacher.kind": "frozen",
    "distill.context.kind": "revision",
    "distill.context.placement": "assistant",
    "distill.weighting.alpha": 0.0,
    "distill.divergence.aggregation": "token-mean",
    "data.train_batch_size": 128,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.actor.optim.lr": 5e-6,
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "srt.attempts": 1,
    "srt.revisions": 3,
    "srt.temperature": 1.0,
    "srt.top_p": 0.9,
    "srt.limit": 10_000,
    "srt.max_traces": 6000,
    "sft.lr": 5e-6,
    "sft.epochs": 3,
    "sft.schedule": "cosine",
    "sft.warmup": 0.05,
    "sft.weight_decay": 1e-4,
    "sft.betas": [0.9, 0.95],
    "sft.max_length": 32768,
    "chain.stages": ["collect", "sft", "distil", "evaluate"],
    "chain.fresh_questions": True,
}

OPSD = {
    "distill.coefficient": 1.0,
    "distill.teacher.kind": "frozen",
    "distill.context.kind": "reference",
    "distill.context.reference_key": "solution",
    "distill.context.template_kwargs": {"enable_thinking": True},
    "distill.sequences.source": "student_rollouts",
    "distill.divergence.support": "full",
    "distill.divergence.aggregation": "token-mean",
    "distill.weighting.alpha": 0.0,
    "distill.weighting.beta": 0.0,
    "data.train_batch_size": 32,
    "data.apply_chat_template_kwargs": {"enable_thinking": False},
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.temperature": 1.1,
    "actor_rollout_ref.rollout.top_p": 0.95,
    "actor_rollout_ref.rollout.top_k": 20,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_k": -1,
}

PUBLISHED = {
    "method=opsd": OPSD
    | {
        "distill.context.reference_template": OPSD_TEMPLATE,
        "distill.divergence.kind": "forward_kl",
        "distill.divergence.clip": 0.05,
        "distill.divergence.clip_level": "entry",
        "actor_rollout_ref.actor.optim.lr": 5e-6,
        "actor_rollout_ref.actor.optim.clip_grad": 0.1,
        "run.steps": 100,
        "run.save_every": 25,
        "run.val_every": 25,
        "actor_rollout_ref.rollout.val_kwargs.n": 12,
    },
    "method=opsd_v1": OPSD
    | {
        "distill.context.reference_template": OPSD_V1_TEMPLATE,
        "distill.divergence.kind": "jsd",
        "distill.divergence.alpha": 0.5,
        "distill.divergence.clip": None,
        "actor_rollout_ref.actor.optim.lr": 2e-4,
        "actor_rollout_ref.actor.optim.clip_grad": 1.0,
        "run.steps": 500,
        "run.save_every": 50,
        "actor_rollout_ref.rollout.val_kwargs.n": 16,
    },
    "method=sdft": {
        "distill.coefficient": 1.0,
        "distill.teacher.kind": "ema",
        "distill.teacher.update_rate": 0.01,
        "distill.context.kind": "reference",
        "distill.context.reference_key": "demonstration",
        "distill.context.reference_template": SDFT_TEMPLATE,
        "distill.sequences.source": "student_rollouts",
        "distill.divergence.kind": "forward_kl",
        "distill.divergence.support": "full",
        "distill.divergence.clip": None,
        "distill.divergence.skip_tokens": 3,
        "distill.divergence.rollout_correction": True,
        "distill.weighting.alpha": 0.0,
        "distill.weighting.beta": 0.0,
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_is_threshold": 2.0,
        "data.train_batch_size": 32,
        "actor_rollout_ref.rollout.n": 1,
        "actor_rollout_ref.actor.optim.lr": 2e-5,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.lr_warmup_steps": -1,  # so that the ratio counts
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.1,
        "actor_rollout_ref.actor.optim.clip_grad": 1.0,
    },
    "method=pbsd": {
        "distill.coefficient": 1.0,
        "distill.carrier": "preference",
        "distill.preference": {"beta": 0.1, "beta_final": None, "pair_filter": "none", "log_prob": "sum"},
        "distill.sequences.source": "pairs",
        "distill.sequences.positive": "teacher",
        "distill.teacher.kind": "live",
        "distill.context.kind": "reference",
        "distill.context.reference_template": OPSD_TEMPLATE,
        "distill.weighting.alpha": 0.0,
        "actor_rollout_ref.rollout.n": 2,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.rollout.top_p": 1.0,
        "actor_rollout_ref.rollout.top_k": -1,
        "actor_rollout_ref.actor.optim.lr": 5e-6,
        "actor_rollout_ref.actor.optim.clip_grad": 0.1,
    },
    "method=sd_zero": SD_ZERO | {"distill.divergence.kind": "reverse_kl", "srt.losses": "joint", "run.steps": 70},
    "method=sd_zero_code": SD_ZERO
    | {
        "distill.divergence.kind": "mixed",
        "distill.divergence.alpha": 0.5,
        "distill.divergence.support": "teacher_topk",
        "distill.divergence.topk": 64,
        "distill.divergence.tail": False,
        "srt.losses": "two_stage",
        "srt.placement": "user",
        "srt.revise_right": False,
    },
    "method=rft": {
        "srt.attempts": 4,
        "srt.revisions": 0,
        "distill.coefficient": 0.0,
        "chain.stages": ["collect", "sft", "evaluate"],
    },
    "method=sdpo": {
        "distill.coefficient": 1.0,
        "distill.carrier": "loss",
        "distill.teacher.kind": "ema",
        "distill.teacher.update_rate": 0.05,
        "distill.context.kind": "sibling",
        "distill.context.demonstration": "first",
        "distill.context.own_success": False,
        "distill.context.remove_thinking": True,
        "distill.context.success_threshold": 0.5,
        "distill.context.feedback": False,
        "distill.divergence.kind": "jsd",
        "distill.divergence.alpha": 0.5,
        "distill.divergence.support": "student_topk",
        "distill.divergence.topk": 100,
        "distill.divergence.tail": True,
        "distill.divergence.aggregation": "seq-mean-token-mean",
        "distill.weighting.alpha": 0.0,
        "distill.weighting.beta": 0.0,
        "actor_rollout_ref.actor.optim.lr": 1e-5,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 10,
        "actor_rollout_ref.rollout.n": 8,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "data.train_batch_size": 32,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
        "distill.context.max_length": 10240,
        "data.apply_chat_template_kwargs": {"enable_thinking": False},
        "actor_rollout_ref.ref.fsdp_config.model_dtype": "fp32",
    },
    "method=sc_sdpo": {
        "distill.weighting.alpha": 0.5,
        "distill.weighting.beta": 0.5,
        "distill.weighting.normalizer": "mean",
        "distill.weighting.cap": None,
        "distill.divergence.kind": "jsd",
        "distill.teacher.update_rate": 0.05,
        "actor_rollout_ref.actor.optim.lr": 1e-5,
    },
    "method=sdpo_rich_feedback": {
        "distill.divergence.kind": "reverse_kl",
        "distill.divergence.topk": 20,
        "distill.divergence.ratio_clip": 2.0,
        "distill.teacher.update_rate": 0.01,
        "distill.context.feedback": True,
        "distill.context.feedback_only_without_solution": True,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
    },
    "method=sdpo_faithful": {
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_is_threshold": 2.0,
        "distill.divergence.rollout_correction": True,
        "distill.divergence.ratio_clip": 2.0,
        "distill.divergence.kind": "jsd",
    },
    "method=sdpo_token": {"distill.carrier": "advantage", "distill.coefficient": 1.0},
    "method=sdpo_grpo": {"distill.coefficient": 0.5, "algorithm.norm_adv_by_std_in_grpo": True},
    "method=grpo": {
        "distill.coefficient": 0.0,
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "actor_rollout_ref.actor.clip_ratio_low": 0.2,
        "actor_rollout_ref.actor.clip_ratio_high": 0.28,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "algorithm.use_kl_in_reward": False,
    },
    "method=dr_grpo": {
        "distill.coefficient": 0.0,
        "algorithm.norm_adv_by_std_in_grpo": False,
        "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-sum-norm",
        "actor_rollout_ref.actor.loss_scale_factor": 48,  # the tiny world's longest response
    },
    "method=grpo_without_std": {
        "algorithm.norm_adv_by_std_in_grpo": False,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
        "algorithm.rollout_correction.rollout_is": "token",
    },
    "method=kernel_grpo": {
        "algorithm.adv_estimator": "pass_rate_kernel",
        "algorithm.pass_rate_kernel.alpha": 0.0,
        "algorithm.pass_rate_kernel.beta": 0.0,
    },
    "weighting=beta_kernel": {"distill.weighting.alpha": 1.0, "distill.weighting.beta": 1.0},
    # PACED (arXiv 2603.11178 v3).
    "method=paced_distill": {
        "distill.coefficient": 1.0,
        "distill.teacher.kind": "external",
        "distill.context.kind": "none",
        "distill.sequences.source": "reference",
        "distill.divergence.kind": "forward_kl",
        "distill.divergence.support": "full",
        **PACED_WEIGHT,
    },
    "method=paced_self": {
        "distill.coefficient": 1.0,
        "distill.teacher.kind": "frozen",
        "distill.context.kind": "reference",
        "distill.sequences.source": "student_rollouts",
        "distill.divergence.kind": "reverse_kl",
        "distill.divergence.support": "full",
        **PACED_WEIGHT,
    },
    "method=paced_two_stage": {
        "distill.sequences.source": "reference",
        "distill.divergence.kind": "forward_kl",
        "distill.schedule.switch": 0.5,
        "distill.schedule.second.divergence.kind": "reverse_kl",
        "distill.schedule.second.sequences.source": "student_rollouts",
        "distill.schedule.recompute_pass_rates": True,
        **PACED_WEIGHT,
    },
    "method=paced_two_stage_reversed": {
        "distill.sequences.source": "student_rollouts",
        "distill.divergence.kind": "reverse_kl",
        "distill.schedule.switch": 0.5,
        "distill.schedule.second.divergence.kind": "forward_kl",
        "distill.schedule.second.sequences.source": "reference",
        **PACED_WEIGHT,
    },
    "method=paced_teacher": {
        "distill.coefficient": 0.0,
        "data.train_batch_size": 128,
        "actor_rollout_ref.rollout.n": 8,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.kl_loss_coef": 0.001,
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
    },
}


def test_every_method_is_held_to_its_source() -> None:
    assert {f"method={name}" for name in choices("method")} <= set(PUBLISHED)


@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_a_published_preset_has_the_values_its_source_states(preset: str) -> None:
    external = preset.startswith("method=paced") and preset not in ("method=paced_self", "method=paced_teacher")
    teacher = ["distill.teacher.path=some/model"] if external else []
    config = compose_config([preset, "model=qwen3_8b", "hardware=gpu", *teacher])
    found = {}
    for key in PUBLISHED[preset]:
        value = OmegaConf.select(config, key)
        found[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    assert found == PUBLISHED[preset]


# k, temperature, top-p, top-k, new tokens (None: the data's), thinking,.
SAMPLED = {
    ("default", "tiny_world"): (8, 1.0, 1.0, -1, None, False),
    ("sdpo", "sciknoweval_physics"): (16, 0.6, 0.95, -1, None, False),
    ("sdpo", "tooluse"): (16, 0.6, 0.95, -1, None, False),
    ("sdpo_rich_feedback", "livecodebench"): (4, 0.6, 0.95, -1, None, False),
    ("paced", "math500"): (8, 0.6, 0.8, 20, None, False),
    ("sd_zero", "hmmt"): (8, 0.7, 1.0, -1, 32768, False),
    ("pbsd", "aime25"): (12, 1.0, 1.0, -1, 38912, True),
    ("opsd_v1", "aime24"): (16, 1.0, 1.0, -1, 38912, True),
    ("greedy", "mmlu"): (1, 0.0, 1.0, -1, None, False),
}


def test_every_evaluation_preset_has_its_settings_stated_here() -> None:
    assert {name for name, _ in SAMPLED} == set(choices(EVALUATION))


@pytest.mark.parametrize(("setting", "data"), SAMPLED)
def test_an_evaluation_preset_samples_as_its_source_does(setting: str, data: str) -> None:
    arguments = ["model=qwen3_8b", f"data={data}", "hardware=gpu", f"evaluation={setting}", "sample.out=x"]
    config = compose_config(arguments, name="evaluate")
    block = sample_settings.sample_config(config)
    assert evaluation_settings.evaluation_config(config).setting == setting
    thinking = config.data.apply_chat_template_kwargs.enable_thinking
    found = (block.k, block.temperature, block.top_p, block.top_k, block.max_tokens, thinking)
    assert found == SAMPLED[setting, data] and block.split == "test"
    tokens = block.sampling(config.data.max_response_length).max_tokens
    assert config.actor_rollout_ref.rollout.max_model_len >= config.data.max_prompt_length + tokens


@pytest.mark.parametrize(
    ("method", "data"), [("opsd", "openthoughts_math"), ("opsd_v1", "openthoughts_math"), ("sdft", "tooluse")]
)
@pytest.mark.parametrize("model", ["qwen3_1_7b", "qwen3_4b", "qwen3_8b"])
def test_opsd_and_sdft_keep_their_words_on_their_own_data(method: str, data: str, model: str) -> None:
    alone = compose_config([f"method={method}", f"model={model}"])
    config = compose_config([f"method={method}", f"model={model}", f"data={data}", "hardware=gpu"])
    for key in ("reference_key", "reference_template", "template_kwargs"):
        assert config.distill.context[key] == alone.distill.context[key]
    lengths = {"openthoughts_math": (1024, 1024), "tooluse": (2048, 8192)}[data]
    assert (config.data.max_prompt_length, config.data.max_response_length) == lengths
    tiny = compose_config([f"method={method}", "model=tiny", "data=tiny_world", "hardware=cpu"])
    assert tiny.distill.context.reference_key == "solution"  # all that the tiny world's rows have


def test_sc_sdpo_with_exponents_of_zero_is_sdpo_but_for_the_name() -> None:
    zero = compose_config(["method=sc_sdpo", "distill.weighting.alpha=0", "distill.weighting.beta=0"])
    sdpo = compose_config(["method=sdpo"])
    mine, reference = (flat(OmegaConf.to_container(config, resolve=True)) for config in (zero, sdpo))
    different = {key for key in mine if mine[key] != reference[key]}
    names = {"distill.method", "trainer.experiment_name", "actor_rollout_ref.rollout.trace.experiment_name"}
    # The third is what was asked for, not a setting.
    assert different == names | {"run.overrides"} and {mine[key] for key in names} == {"sc_sdpo"}


@pytest.mark.parametrize(("model", "positions"), [("qwen3_1_7b", 40960), ("qwen25_math_7b", 4096)])
def test_the_lengths_of_paced_s_models_fit_their_positions(model: str, positions: int) -> None:
    preset = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    response, limit = preset["data"]["max_response_length"], preset["actor_rollout_ref"]["rollout"]["max_model_len"]
    assert preset["data"]["max_prompt_length"] == 1024
    assert 1024 + response <= limit <= positions
    assert preset["distill"]["context"]["max_length"] + response <= positions


@pytest.mark.parametrize("model", ["qwen3_8b", "olmo3_7b", "llama31_8b"])
def test_a_published_model_has_the_lengths_of_sdpo_s_runs(model: str) -> None:
    preset = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    assert preset["data"]["max_prompt_length"] == 2048 and preset["data"]["max_response_length"] == 8192
    assert preset["distill"]["context"]["max_length"] == 10240
    # Teacher prompt and response have to fit; the student's sequence is shorter.
    assert preset["actor_rollout_ref"]["rollout"]["max_model_len"] >= 2048 + 8192


def test_the_command_line_wins_over_every_preset() -> None:
    config = compose_config(["method=sdpo", "teacher=live", "divergence=forward_kl_student_topk", "run.steps=7"])
    assert (config.distill.teacher.kind, config.distill.divergence.kind) == ("live", "forward_kl")
    assert config.trainer.total_training_steps == 7


def test_gpu_presets_ask_for_flash_attention_with_packed_rows() -> None:
    model = compose_config(["model=qwen3_8b", "hardware=gpu"]).actor_rollout_ref.model
    assert model.use_remove_padding and model.override_config.attn_implementation == "flash_attention_2"


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=nope"], ["method=nope", "sc_sdpo"]),
        (["data=nope"], ["data=nope", "tiny_world"]),
        (["hello"], ["'hello'", "key=value"]),
        (["run.stepz=3"], ["run.stepz=3", "'stepz'"]),
        (["+run.stepz=3"], ["run.stepz", "steps"]),
        (["distill.teacher.rate=1"], ["distill.teacher.rate=1"]),
        (["+distill.teacher.rate=1"], ["distill.teacher.rate", "update_rate"]),
        (["distill.context.max_length=abc"], ["distill.context.max_length is 'abc'", "int"]),
        (["run.quiet=maybe"], ["run.quiet is 'maybe'", "bool"]),
        (["distill.weighting.alpha=-1"], ["distill.weighting.alpha is -1.0", "from 0.0"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and "=" in value[-1] else None,
)
def test_a_wrong_setting_is_refused_with_the_key_the_value_and_what_is_allowed(
    overrides: list[str], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    message = str(caught.value)
    assert [part for part in expected if part not in message] == []
    assert "\n" not in message


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose_config([])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run.steps": 0}, ["run.steps is 0", "from 1"]),
        ({"actor_rollout_ref.rollout.n": 1}, ["actor_rollout_ref.rollout.n is 1", "at least 2"]),
        (
            {"actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2},
            ["ulysses_sequence_parallel_size is 2", "allowed: 1, or with attn_implementation=flash_attention_2"],
        ),
        (
            {
                "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2,
                "actor_rollout_ref.ref.ulysses_sequence_parallel_size": 1,
                "actor_rollout_ref.model.use_remove_padding": True,
                "actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2",
            },
            ["ref.ulysses_sequence_parallel_size is 1", "the student's 2"],
        ),
        ({"actor_rollout_ref.actor.ppo_epochs": 2}, ["ppo_epochs is 2", "allowed: 1"]),
        ({"actor_rollout_ref.model.use_fused_kernels": True}, ["use_fused_kernels", "logits"]),
        ({"actor_rollout_ref.actor.use_kl_loss": True}, ["distill.teacher.kind is 'ema'", "KL", "live"]),
        (
            {"algorithm.use_kl_in_reward": True, "distill.teacher.kind": "frozen"},
            ["distill.teacher.kind is 'frozen'", "KL"],
        ),
        ({"actor_rollout_ref.ref.fsdp_config.model_dtype": "bf16"}, ["model_dtype is 'bf16'", "fp32"]),
        ({"actor_rollout_ref.actor.ppo_mini_batch_size": 5}, ["ppo_mini_batch_size is 5", "divisor", "16"]),
        ({"trainer.n_gpus_per_node": 3}, ["16 prompts x 8 rollouts = 128 rows", "3 ranks"]),
        ({"actor_rollout_ref.rollout.max_model_len": 64}, ["max_model_len is 64", "= 112"]),
        ({"actor_rollout_ref.actor.strategy": "megatron"}, ["strategy is 'megatron'", "fsdp2"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_do_not_fit_together_are_refused_with_the_key_the_value_and_what_is_allowed(
    composed: DictConfig, changes: dict[str, Any], expected: list[str]
) -> None:
    config = copy.deepcopy(composed)
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    with pytest.raises(ConfigError) as caught:
        check(config)
    message = str(caught.value)
    assert [part for part in expected if part not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("teacher", 3, "a block of keys"),
        ("coefficient", 1.5, "from 0.0 to 1.0"),
        ("coefficient", True, "type float"),
        ("carrier", "gradient", "loss, advantage"),
        ("advantage_clip", 0.0, "above 0.0"),
        ("poll_interval", 0.0, "above 0.0"),
        ("teacher.kind", "oracle", "ema, frozen, live, synced, trust_region, external"),
        ("teacher.update_rate", 1.1, "from 0.0 to 1.0"),
        ("teacher.on_negative_gap", "panic", "warn, stop, ignore"),
        ("context.demonstration", "last", "shortest"),
        ("context.feedback_template", "x", "{feedback_raw}"),
        ("divergence.kind", "hellinger", "jsd, mixed, akl"),
        ("divergence.topk", 1.5, "type int"),
        ("divergence.topk", 0, "from 1"),
        ("divergence.tail", 1, "type bool"),
        ("divergence.alpha", float("nan"), "from 0.0 to 1.0"),
        ("weighting.normalizer", "sum", "mean_active"),
        ("weighting.normalizer", "constant", "a positive number"),
        ("weighting.cap", 0.0, "above 0.0"),
        ("samples.every", 0, "from 1"),
        ("sequences.source", "gold", "student_rollouts"),
    ],
)
def test_a_wrong_value_of_the_method_block_is_refused(key: str, value: Any, expected: str) -> None:
    values: dict[str, Any] = {}
    *path, name = key.split(".")
    inner = values
    for part in path:
        inner = inner.setdefault(part, {})
    inner[name] = value
    with pytest.raises(ConfigError) as caught:
        distill_config(values)
    assert str(caught.value).startswith("distill.") and expected in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("save_every", 0), ("val_every", -2), ("seed", -1), ("platform", "tpu")])
def test_a_wrong_value_of_the_run_block_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"run.{key} is {value!r}; allowed"):
        settings.RunConfig(**{key: value}).validate()


def test_a_live_teacher_without_a_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="equals the student"):
        distill_config({"teacher": {"kind": "live"}, "context": {"kind": "none"}})


def test_what_distillation_forbids_is_allowed_without_it() -> None:
    compose_config(["method=grpo", "actor_rollout_ref.rollout.n=1", "actor_rollout_ref.actor.use_kl_loss=true"])
    compose_config(["method=grpo", "actor_rollout_ref.actor.ppo_epochs=2"])


def test_single_rollouts_are_allowed_where_feedback_is_the_context() -> None:
    compose_config(["method=sdpo_rich_feedback", "actor_rollout_ref.rollout.n=1"])


def test_a_live_teacher_may_stand_beside_a_kl_term() -> None:
    compose_config(["method=sdpo_grpo", "teacher=live", "actor_rollout_ref.actor.use_kl_loss=true"])


# -------------------------------------------------------------------------------------------------------- command line


def test_help_lists_every_preset_of_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == help_text().strip()
    for group in GROUPS:
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"{group} "))
        assert [name for name in choices(group) if name not in line] == []


def test_a_wrong_setting_ends_the_command_with_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["method=nope"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: method=nope") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_cfg_prints_the_composed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "method=sdpo"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["distill"]["method"] == "sdpo"


# ------------------------------------------------------------------------------------------- verl and its dataclasses


def test_verl_builds_its_dataclasses_from_the_blocks_we_touch() -> None:
    """In a process of its own: the model block looks for its files, and verl reads the platform when it is imported."""
    code = """
from recipe.cluster import prepare_environment
prepare_environment("cpu")
from recipe.compose import compose_config
from verl.utils.config import omega_conf_to_dataclass as build
for overrides in (["method=dr_grpo"], ["method=sdpo_rich_feedback", "hardware=gpu"], ["method=sc_sdpo"]):
    block = compose_config(overrides).actor_rollout_ref
    actor, rollout = build(block.actor), build(block.rollout)
    assert actor.loss_agg_mode == block.actor.loss_agg_mode
    assert actor.loss_scale_factor == block.actor.loss_scale_factor
    assert (rollout.n, rollout.max_model_len) == (block.rollout.n, block.rollout.max_model_len)
assert build(block.model).path == block.model.path
print("built")
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-1:] == ["built"], done.stderr[-3000:]
