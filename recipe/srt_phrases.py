"""The control phrases of a run: those of the model's family, unless the configuration says others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_ext.config import ConfigError
from verl_ext.revision import Phrases, choose_phrases


def phrases_of(config: DictConfig) -> Phrases:
    """From the keys of ``distill.context`` and ``actor_rollout_ref.model.path``; errors as :func:`phrases_for`."""
    return phrases_for(config, config.distill.context)


def phrases_for(config: DictConfig, context: Any) -> Phrases:
    """From ``phrases``, ``phrase_right`` and ``phrase_wrong`` of a context block, and the model's family.

    Raises:
        ConfigError: an unknown name, a blank phrase, or a model family without phrases of its own; says what to set.
    """
    name, right, wrong = context.phrases, context.phrase_right, context.phrase_wrong
    # Looked at only where the family decides: a model need not be there for phrases that are given.
    asked = name == "auto" and (right is None or wrong is None)
    path = str(config.actor_rollout_ref.model.path)
    family = model_type(path, bool(config.actor_rollout_ref.model.get("trust_remote_code"))) if asked else None
    try:
        return choose_phrases(name, family, right=right, wrong=wrong)
    except ValueError as error:
        about_a_key = str(error).startswith("context.")
        raise ConfigError(
            f"distill.{error}" if about_a_key else f"actor_rollout_ref.model.path is {path}: {error}"
        ) from error


def model_type(path: str, trust_remote_code: bool = False) -> str | None:
    """``model_type`` of a model folder's ``config.json``, or of a model on the hub. Raises ConfigError."""
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).model_type
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"actor_rollout_ref.model.path is {path}, whose config.json cannot be read ({reason}); "
            "distill.context.phrases=auto needs it: give a model folder, or set distill.context.phrases"
        ) from error
