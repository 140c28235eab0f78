"""What must be known before anything imports verl or torch starts its threads."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import os
import pickle
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import omegaconf._utils
import omegaconf.base
import omegaconf.grammar_parser
import pytest
import torch
from hydra._internal import config_loader_impl as loader
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
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
    load, parsed = OmegaConf.load, dict[str, bytes]()

    @functools.wraps(load)
    def remembered(file: Any) -> Any:
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in parsed:
            parsed[text] = pickle.dumps(load(io.StringIO(text)))
        return pickle.loads(parsed[text])

    OmegaConf.load = staticmethod(remembered)


def _remember_merged_files() -> None:
    """The files of each choice of presets are merged once in a process.

    Which files Hydra merges depends on the overrides that choose presets and on the search path, and merging them takes
    nine tenths of a composition. All values of the command line are put in afterwards, by Hydra, each time.
    ``tests/unit/test_compositions.py`` compares with Hydra alone.
    """
    create, merge = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list
    lists, merged = dict[tuple[str, ...], DefaultsList](), dict[str, bytes]()
    seen: set[str] = set()

    def sources(repo: Any) -> list[str]:
        return [f"{source.provider} {source.path}" for source in repo.get_sources()]

    @functools.wraps(create)
    def defaults_list(
        repo: Any, config_name: str | None, overrides_list: list[Override], prepend_hydra: bool, skip_missing: bool
    ) -> DefaultsList:
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        presets = [one for one in overrides_list if not any(one is value for value in values)]
        key = (*sources(repo), str((config_name, prepend_hydra, skip_missing)), *map(str, presets))
        if key not in lists:
            lists[key] = create(repo, config_name, presets, prepend_hydra, skip_missing)
        return dataclasses.replace(lists[key], config_overrides=values)

    def merge_onto(self: Any, start: DictConfig, rest: list[ResultDefault], repo: Any) -> DictConfig:
        """Hydra's own merging; the first "file" is what the files before it gave."""
        first = object()

        def load(default: Any, repo: Any) -> Any:
            return SimpleNamespace(config=start) if default is first else self._load_single_config(default, repo)

        return merge(SimpleNamespace(_load_single_config=load), [first, *rest], repo)

    @functools.wraps(merge)
    def remembered(self: Any, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        keys = list(accumulate(map(repr, defaults), lambda *parts: "\n".join(parts), initial=str(sources(repo))))
        whole = len(defaults)
        # As far as some earlier list had the same files, and as far as these are merged already.
        shared = max((end for end in range(whole + 1) if keys[end] in seen), default=0)
        done = max((end for end in range(whole + 1) if keys[end] in merged), default=0)
        for end in (shared, whole):
            if end > done:
                start = pickle.loads(merged[keys[done]]) if done else OmegaConf.create()
                merged[keys[end]] = pickle.dumps(merge_onto(self, start, defaults[done:end], repo))
                done = end
        seen.update(keys)
        return pickle.loads(merged[keys[whole]])

    loader.create_defaults_list = defaults_list
    loader.ConfigLoaderImpl._compose_config_from_defaults_list = remembered


def _remember_compositions() -> None:
    """Each list of overrides is composed once in a process; a command and its test ask for the same one in turn.

    Hydra's result depends on the overrides and on the files of ``conf`` and of verl, which no test changes. Everything
    after it (checks, routing, resolving) runs again, on a copy.
    """
    compose, composed = recipe.compose.compose, dict[tuple[str, ...], bytes]()

    @functools.wraps(compose)
    def remembered(config_name: str, overrides: list[str]) -> DictConfig:
        key = (str(recipe.compose.CONF), config_name, *overrides)
        if key not in composed:
            composed[key] = pickle.dumps(compose(config_name=config_name, overrides=overrides))
        return pickle.loads(composed[key])

    recipe.compose.compose = remembered


def _remember_parsed_interpolations() -> None:
    """The same ``${...}`` stand in every configuration, and parsing one takes longer than looking its value up."""
    parse = functools.cache(omegaconf.grammar_parser.parse)
    omegaconf.base.parse = omegaconf._utils.parse = parse


_remember_parsed_yaml()
_remember_parsed_interpolations()
_remember_merged_files()
_remember_compositions()


# Files that take longest, longest first (with `--dist loadfile` a file is one process's).
LONG_FILES = {
    "contract": (
        "ranks", "config", "compat", "launch", "adapter_ranks", "layouts", "sft_contract", "reproduction",
        "data_presets", "adapter_sampling",
    ),
    "unit": (
        "sandbox", "tiny_world_formats", "hostile_corpus", "token_losses", "sample_command", "pass_rates_command",
        "chain", "study", "old_log_probs", "evaluate_command", "sft_settings", "doctor", "verifier_code",
        "tiny_world_revision", "verifier_math_hostile", "data_prep_validate_verifiers", "preflight", "srt_command",
        "checkpoint_damage", "preference",
    ),
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A long file that comes last leaves the other processes without work; the short ones fill the gaps."""
    long = {(tier, f"test_{name}.py"): place for tier, names in LONG_FILES.items() for place, name in enumerate(names)}
    items.sort(key=lambda item: long.get((item.path.parent.name, item.path.name), len(long)))


def pytest_collection_finish() -> None:
    """The imported modules are half a million objects; the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real rows of public data sets: $PASSRATE_TEST_DATA, or `../shared/data` beside the repository."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("PASSRATE_TEST_DATA") or root.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"not run on whole data sets: {folder} does not exist (PASSRATE_TEST_DATA names another)")
    return folder
