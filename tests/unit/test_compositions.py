"""What conftest.py remembers of compositions is what Hydra and OmegaConf say when they are asked anew."""

from __future__ import annotations

import omegaconf._utils
import omegaconf.base
import pytest
from hydra._internal import config_loader_impl as loader
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import recipe.compose
from recipe.compose import compose_presets
from verl_ext.config import ConfigError

# Single values after the same presets, set, added and deleted; other presets; a group without any.
ASKED: list[list[str]] = [
    ["run.steps=3"],
    ["run.steps=5", "+data.more=[1,{a: 2}]", "~data.seed", "trainer.logger=[console]"],
    ["~method"],
    ["method=opsd", "model=qwen3_4b", "data=openthoughts_math", "hardware=gpu", "distill.weighting.alpha=0.25"],
]
REFUSED = (["run.stepz=3"], ["~nothing"])


def ask_hydra_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra and OmegaConf as they are installed, until the test ends."""
    for owner, name in (
        (recipe.compose, "compose"), (loader, "create_defaults_list"), (OmegaConf, "load"), (omegaconf.base, "parse"),
        (loader.ConfigLoaderImpl, "_compose_config_from_defaults_list"), (omegaconf._utils, "parse"),
    ):  # fmt: skip
        original = getattr(owner, name).__wrapped__
        monkeypatch.setattr(owner, name, staticmethod(original) if name == "load" else original)


def flags(config: DictConfig) -> dict[str, object]:
    """Every block's flags (may keys be added? may it be changed?) and types."""
    found: dict[str, object] = {}

    def gather(block: DictConfig, path: str) -> None:
        about = block._metadata
        found[path] = (dict(about.flags or {}), about.ref_type, about.object_type, about.optional)
        for key, value in block.items_ex(resolve=False):
            if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
                gather(value, f"{path}.{key}")

    gather(config, "")
    return found


def said() -> list[DictConfig]:
    return [compose_presets(overrides) for overrides in ASKED]


def refusals() -> list[str]:
    messages = []
    for overrides in REFUSED:
        with pytest.raises((ConfigError, OmegaConfBaseException)) as caught:
            OmegaConf.to_container(compose_presets(overrides), resolve=True)
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    return messages


def test_what_is_remembered_is_what_hydra_says(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, refused = said(), said(), refusals()
    ask_hydra_alone(monkeypatch)
    for config, remembered, expected in zip(first, again, said(), strict=True):
        assert config == remembered == expected
        assert flags(config) == flags(remembered) == flags(expected)
        texts = [OmegaConf.to_yaml(one, resolve=False) for one in (config, remembered, expected)]
        assert len(set(texts)) == 1, "the order of keys too"
    assert refused == refusals()


def test_no_caller_changes_what_the_next_one_gets() -> None:
    config = compose_presets(ASKED[0])
    config.run.steps, config.data.train_files = 99, ["elsewhere"]
    for overrides in (ASKED[0], ["run.steps=4"]):
        found = compose_presets(overrides)
        assert found.run.steps in (3, 4) and found.data.train_files != ["elsewhere"]
