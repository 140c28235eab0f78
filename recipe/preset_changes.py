"""What a run changed against its presets: the presets composed alone, and compared with the run key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.compose import GROUPS, compose_presets
from recipe.run_files import to_plain

ABSENT = "(absent)"
LEFT_OUT = ("run.overrides",)  # the changes themselves


def preset_changes(config: DictConfig, name: str = "train") -> dict[str, Any]:
    """What ``config`` says otherwise than its presets.

    Args:
        config: a composed configuration, with the command line's words in ``run.overrides``.
        name: primary configuration.

    Returns:
        ``presets``: the words that chose presets; ``changes``: a list of ``key``, ``preset`` and ``run`` (the two
        values), and ``set``: whether the user set this key, or it follows from one that was set.

    Raises:
        ConfigError: the presets cannot be composed.
    """
    overrides = list(config.run.overrides)
    presets = [word for word in overrides if chooses_preset(word)]
    before, after = leaves(compose_presets(presets, name)), leaves(config)
    keys = [key_of(word) for word in overrides if not chooses_preset(word)]
    return {
        "presets": presets,
        "changes": [
            {
                "key": key,
                "preset": before.get(key, ABSENT),
                "run": after.get(key, ABSENT),
                "set": any(key == one or key.startswith(f"{one}.") for one in keys),
            }
            for key in dict.fromkeys([*before, *after])
            if key not in LEFT_OUT and before.get(key, ABSENT) != after.get(key, ABSENT)
        ],
    }


def key_of(override: str) -> str:
    """The key of a word such as ``+trainer.logger=[console]``."""
    return override.partition("=")[0].lstrip("+~")


def chooses_preset(override: str) -> bool:
    """Whether the word chooses a preset of a group, and does not set a value."""
    return key_of(override).partition("@")[0] in GROUPS


def leaves(config: DictConfig) -> dict[str, Any]:
    """Every value by its dotted key, references resolved; a reference to what has no value stays as it is written."""
    return dict(_leaves(config, OmegaConf.to_container(config, resolve=False), ""))


def _leaves(node: DictConfig, raw: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, written in raw.items():
        where = f"{path}{key}"
        if isinstance(written, Mapping) and written:
            yield from _leaves(node[key], written, f"{where}.")
            continue
        try:
            value = written if OmegaConf.is_missing(node, key) else node[key]
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            plain = written  # it refers to what only the user can give
        yield from _flat(to_plain(plain, where), where)


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}")
    else:
        yield path, value
