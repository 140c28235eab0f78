"""What the context "revision" needs before a run starts: control phrases, and a chat template that can go on."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, open_dict

from recipe.srt_phrases import phrases_for
from verl_ext.config import ConfigError, DistillConfig, distill_config
from verl_ext.revision import Phrases, RevisionPrompts, check_continuation
from verl_ext.stages import stages


def resolve_phrases(config: DictConfig) -> None:
    """Writes the phrases of every stage with context "revision" into the configuration; a second call changes nothing.

    A second stage with context keys of its own gets its phrases there, else it reads those of the first. The texts then
    stand in the run's records.

    Raises:
        ConfigError: the model's family has no phrases, or is not known; says what to set.
    """
    distill = distill_config(config.distill)
    # Chosen before anything is written: the second stage would take phrases written for the first for given ones.
    chosen = [_phrases(config, stage) for stage in stages(distill)]
    blocks = [config.distill.context, config.distill.schedule.second.get("context")]
    for phrases, block in zip(chosen, blocks, strict=False):
        if phrases is not None and block is not None:
            with open_dict(block):
                block.phrase_right, block.phrase_wrong = phrases.right, phrases.wrong


def check_revision(config: DictConfig) -> None:
    """Whether the model's assistant turn can hold an attempt, a phrase and a revision. After ``resolve_phrases``.

    Raises:
        ConfigError: it cannot, or the tokenizer cannot be loaded; names the key and says what to set.
    """
    asked = [stage.context for stage in stages(distill_config(config.distill)) if _asks(stage)]
    asked = [context for context in asked if context.placement == "assistant"]
    if not asked:
        return
    tokenizer, kwargs = model_tokenizer(config), dict(config.data.get("apply_chat_template_kwargs") or {})
    try:
        check_continuation(tokenizer, kwargs)
        for context in asked:
            phrases = Phrases(context.phrase_right, context.phrase_wrong)
            prompts = RevisionPrompts(tokenizer, phrases, context.placement, kwargs)
            for right in (True, False):  # a small vocabulary may lack a phrase's letters
                prompts([{"role": "user", "content": "1+1"}], "2", right, row="of the check")
    except ValueError as error:  # PromptError, or template arguments that may not be set
        raise ConfigError(
            f"actor_rollout_ref.model.path is {config.actor_rollout_ref.model.path}; allowed with distill.context.kind="
            "revision and placement=assistant: a model whose assistant turn a text can begin. Set another model, "
            "actor_rollout_ref.model.custom_chat_template, data.apply_chat_template_kwargs, or "
            f"distill.context.phrase_right and phrase_wrong. Found: {error}"
        ) from error


def _asks(stage: DistillConfig) -> bool:
    return stage.enabled and stage.context.kind == "revision"


def _phrases(config: DictConfig, stage: DistillConfig) -> Phrases | None:
    """The phrases of a stage; None where it has no use for them."""
    if not _asks(stage):
        return None
    return phrases_for(config, stage.context)


def model_tokenizer(config: DictConfig) -> Any:
    """The model's tokenizer with the configured chat template. Raises ConfigError where it cannot be loaded."""
    from transformers import AutoTokenizer

    model = config.actor_rollout_ref.model
    path = model.get("tokenizer_path") or model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=bool(model.get("trust_remote_code", False)))
    except Exception as error:  # whatever a broken file makes a tokenizer raise
        raise ConfigError(f"the tokenizer of {path} cannot be loaded: {_first_line(error)}") from error
    if model.get("custom_chat_template"):
        tokenizer.chat_template = model.custom_chat_template
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
