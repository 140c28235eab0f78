"""The GPU layouts of conf/layout for every model preset, as numbers: which fits, and by how much."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import yaml
from omegaconf import DictConfig, OmegaConf

from recipe.compose import CONF, check, choices, compose_config
from recipe.memory import DEVICE_GIB, estimate_run
from verl_ext.architecture import elements
from verl_ext.memory_estimate import GIB, PHASES, Estimate

LENGTHS = (
    "data.max_prompt_length",
    "data.max_response_length",
    "distill.context.max_length",
    "actor_rollout_ref.rollout.max_model_len",
)
METHOD = "method=sc_sdpo"
"""What the table is made for: a moving teacher in fp32 beside the student, which needs most."""


def layouts() -> list[str]:
    """The presets that describe a machine."""
    return [name for name in choices("layout") if name != "none"]


def models() -> list[str]:
    """The presets of models that are not part of the repository."""
    return [name for name in choices("model") if not name.startswith("tiny")]


def model_lengths(model: str) -> list[str]:
    """The lengths of a model preset as overrides: a data preset that comes after it sets its own."""
    content = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    found = []
    for key in LENGTHS:
        value = content
        for part in key.split("."):
            value = (value or {}).get(part)
        if value is not None:
            found.append(f"{key}={value}")
    return found


@cache
def _composed(model: str) -> DictConfig:
    return compose_config([METHOD, f"model={model}", "hardware=gpu", *model_lengths(model)])


def on_layout(model: str, layout: str) -> DictConfig:
    """A model on a layout, with the model preset's own lengths: as composing gives it, but each model is composed once.

    Raises ConfigError as composing does.
    """
    # A layout comes last of all presets and sets plain values only: laying it over is what Hydra would do.
    config = copy.deepcopy(_composed(model))
    config.merge_with(OmegaConf.load(CONF / "layout" / f"{layout}.yaml"))
    check(config)
    return config


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    model: str
    layout: str
    config: DictConfig
    estimate: Estimate

    @property
    def fits(self) -> bool:
        """Whether every phase fits the device, and vLLM at least one sequence of full length."""
        sequences = self.estimate.sequences
        return self.estimate.peak[1] <= self.estimate.plan.device_bytes and (sequences is None or sequences >= 1)


def rows(device_gib: float = DEVICE_GIB) -> Iterator[Row]:
    """Every model on every layout."""
    for model in models():
        for layout in layouts():
            config = on_layout(model, layout)
            yield Row(model, layout, config, estimate_run(config, int(device_gib * GIB)))


def markdown(device_gib: float = DEVICE_GIB) -> str:
    """The table of docs/clusters.md. GiB of one GPU; ``host`` of one node; ``sequences`` of one vLLM replica."""
    head = ["model", "parameters", "layout", "lengths", *PHASES, "host", "sequences", f"fits {device_gib:g} GiB"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows(device_gib):
        estimate, data = row.estimate, row.config.data
        cells = [row.model, f"{elements(estimate.plan.student.model.parameters()) / 1e9:.2f} B", row.layout]
        cells.append(f"{data.max_prompt_length} + {data.max_response_length}, {row.config.distill.context.max_length}")
        cells += [f"{estimate.phase(phase) / GIB:.1f}" for phase in PHASES]
        cells.append(f"{estimate.host * row.config.trainer.n_gpus_per_node / GIB:.0f}")
        cells.append(f"{max(estimate.sequences or 0.0, 0.0):.1f}")
        cells.append("yes" if row.fits else "no")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)
