"""What must be known before anything imports verl or torch starts its threads."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import recipe.compose

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "verl_ext.plugin")


def _remember_parsed_yaml() -> None:
    """Each text is parsed once in a process.

    Hydra reads fifty YAML files for every configuration that a test composes, and parsing takes half of that time. What
    comes out depends on the text alone; a changed file is another text, and every caller gets objects of its own.
    """
    load, parsed = OmegaConf.load, dict[str, Any]()

    def remembered(file: Any) -> Any:
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in parsed:
            parsed[text] = OmegaConf.to_container(load(io.StringIO(text)))
        return OmegaConf.create(parsed[text])

    OmegaConf.load = staticmethod(remembered)


def _remember_compositions() -> None:
    """Each list of overrides is composed once in a process; a command and its test ask for the same one in turn.

    Hydra's result depends on the overrides and on the files of ``conf`` and of verl, which no test changes. Everything
    after it (checks, routing, resolving) runs again, on a copy.
    """
    compose, composed = recipe.compose.compose, dict[tuple[str, ...], DictConfig]()

    def remembered(config_name: str, overrides: list[str]) -> DictConfig:
        key = (str(recipe.compose.CONF), config_name, *overrides)
        if key not in composed:
            composed[key] = compose(config_name=config_name, overrides=overrides)
        return copy.deepcopy(composed[key])

    recipe.compose.compose = remembered


_remember_parsed_yaml()
_remember_compositions()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real rows of public data sets: $PASSRATE_TEST_DATA, or `../shared/data` beside the repository."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("PASSRATE_TEST_DATA") or root.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"not run on whole data sets: {folder} does not exist (PASSRATE_TEST_DATA names another)")
    return folder
