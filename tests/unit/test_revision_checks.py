"""Before Ray starts: control phrases for the model, and a chat template whose assistant turn can go on."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from omegaconf import DictConfig, OmegaConf

from recipe.compose import ROOT, compose_config
from recipe.preflight import preflight
from recipe.revision_checks import check_revision, resolve_phrases
from verl_ext.config import ConfigError
from verl_ext.revision import PHRASES

MODEL = ROOT / "models" / "tiny_world" / "plain"
TURNS = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
OPEN = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose_config(["method=sdpo", "model=tiny", "context=revision"])


@pytest.fixture
def config(composed: DictConfig) -> DictConfig:
    """Revision with the tiny model, a Qwen3."""
    return copy.deepcopy(composed)


def changed(config: DictConfig, **values: Any) -> DictConfig:
    """Keys of the block, with __ for a dot."""
    for key, value in values.items():
        OmegaConf.update(config, "distill." + key.replace("__", "."), value, force_add=True)
    return config


def model_of(folder: Path, model_type: str) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


def phrases(block: Any) -> tuple[str | None, str | None]:
    return block.get("phrase_right"), block.get("phrase_wrong")


def texts(name: str) -> tuple[str, str]:
    return PHRASES[name].right, PHRASES[name].wrong


# ------------------------------------------------------------------------------------------------------------ phrases


def test_the_model_s_family_gives_the_phrases_and_a_second_call_changes_nothing(config: DictConfig) -> None:
    assert config.distill.context.kind == "revision" and phrases(config.distill.context) == (None, None)
    for _ in range(2):
        resolve_phrases(config)
        assert phrases(config.distill.context) == texts("qwen")
    assert phrases(config.distill.schedule.second.get("context", {})) == (None, None)


def test_an_olmo_gets_its_own_and_given_texts_and_names_win(config: DictConfig, tmp_path: Path) -> None:
    config.actor_rollout_ref.model.path = model_of(tmp_path, "olmo3")
    given = changed(copy.deepcopy(config), context__phrase_wrong="No.")
    named = changed(copy.deepcopy(config), context__phrases="paper")
    for made, expected in (
        (config, texts("olmo")),
        (given, (PHRASES["olmo"].right, "No.")),
        (named, texts("paper")),
    ):
        resolve_phrases(made)
        assert phrases(made.distill.context) == expected


def test_a_family_without_phrases_is_refused_with_what_to_set(config: DictConfig, tmp_path: Path) -> None:
    config.actor_rollout_ref.model.path = model_of(tmp_path, "llama")
    with pytest.raises(ConfigError) as caught:
        resolve_phrases(config)
    message = str(caught.value)
    assert str(tmp_path) in message and "'llama'" in message and "set distill.context.phrases" in message
    resolve_phrases(changed(config, context__phrase_right="Yes.", context__phrase_wrong="No."))
    assert phrases(config.distill.context) == ("Yes.", "No.")


def test_the_hub_is_asked_only_where_the_family_must_be_known(
    config: DictConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def hub(path: str, **_: Any) -> Any:
        asked.append(path)
        if path == "some/model":
            return transformers.Olmo3Config()
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", hub)
    config.actor_rollout_ref.model.path = "some/model"
    resolve_phrases(changed(copy.deepcopy(config), context__phrases="paper"))
    assert asked == []
    resolve_phrases(config)
    assert asked == ["some/model"] and phrases(config.distill.context) == texts("olmo")
    other = changed(config, context__phrase_right=None)
    other.actor_rollout_ref.model.path = str(tmp_path)
    with pytest.raises(ConfigError, match=r"config.json cannot be read \(.*No such file.*\); .*set distill.context"):
        resolve_phrases(other)


def test_nothing_is_written_or_asked_where_no_revision_is_distilled(config: DictConfig) -> None:
    config.actor_rollout_ref.model.path = "nowhere/at-all"
    for made in (changed(copy.deepcopy(config), coefficient=0.0), changed(config, context__kind="sibling")):
        before = copy.deepcopy(made)
        resolve_phrases(made)
        check_revision(made)
        assert made == before


@pytest.mark.parametrize(
    ("first", "second", "expected_first", "expected_second"),
    [
        # The second stage changes something else, and reads the first stage's phrases.
        ({}, {"divergence": {"kind": "reverse_kl"}}, "qwen", None),
        ({}, {"context": {"placement": "user"}}, "qwen", "qwen"),
        # Its own name is not lost to the texts written for the first.
        ({}, {"context": {"phrases": "paper"}}, "qwen", "paper"),
        ({"kind": "sibling"}, {"context": {"kind": "revision"}}, None, "qwen"),
        ({"phrases": "olmo"}, {"context": {"kind": "sibling"}}, "olmo", None),
    ],
)
def test_each_stage_has_its_phrases(
    config: DictConfig, first: dict, second: dict, expected_first: str | None, expected_second: str | None
) -> None:
    changed(config, schedule={"switch": 0.5, "second": second}, **{f"context__{k}": v for k, v in first.items()})
    for _ in range(2):
        resolve_phrases(config)
        none = (None, None)
        assert phrases(config.distill.context) == (texts(expected_first) if expected_first else none)
        found = phrases(config.distill.schedule.second.get("context", {}))
        assert found == (texts(expected_second) if expected_second else none)


# ------------------------------------------------------------------------------------------------------ the open turn


def refused(config: DictConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_revision(config)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("actor_rollout_ref.model.path is ")
    return message


def with_template(config: DictConfig, template: str) -> DictConfig:
    OmegaConf.update(config, "actor_rollout_ref.model.custom_chat_template", template, force_add=True)
    resolve_phrases(config)
    return config


def test_a_turn_that_can_be_continued_passes(config: DictConfig) -> None:
    check_revision(with_template(copy.deepcopy(config), OPEN))
    resolve_phrases(config)
    check_revision(config)


def test_a_template_that_opens_no_turn_or_a_thinking_block_is_refused_with_what_to_set(config: DictConfig) -> None:
    closed = refused(with_template(copy.deepcopy(config), TURNS))
    assert "opens no assistant turn" in closed and "actor_rollout_ref.model.custom_chat_template" in closed
    thinking = with_template(config, THINKING)
    assert "data.apply_chat_template_kwargs={enable_thinking: false}" in refused(thinking)
    check_revision(changed(thinking, context__placement="user"))
    # a stage counts, whichever it is
    second = {"switch": 0.5, "second": {"context": {"placement": "assistant"}}}
    assert "opens a thinking block" in refused(changed(thinking, schedule=second))


def test_template_arguments_are_those_of_the_rollouts(config: DictConfig) -> None:
    template = THINKING.replace("<think>\n", "{% if enable_thinking is not false %}<think>\n{% endif %}")
    config.data.apply_chat_template_kwargs = {"enable_thinking": True}
    assert "opens a thinking block" in refused(with_template(config, template))
    config.data.apply_chat_template_kwargs = {"enable_thinking": False}
    check_revision(config)
    config.data.apply_chat_template_kwargs = {"tokenize": False}
    assert "'tokenize'" in refused(config)


@pytest.mark.parametrize("key", ["phrase_right", "phrase_wrong"])
def test_a_phrase_that_the_tokenizer_cannot_write_is_refused(config: DictConfig, key: str) -> None:
    resolve_phrases(changed(config, **{f"context__{key}": "Ünwahr."}))
    message = refused(config)
    assert "cannot continue the prefix" in message and "distill.context.phrase_right and phrase_wrong" in message


def test_a_tokenizer_that_cannot_be_loaded_is_named(config: DictConfig, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    (tmp_path / "tokenizer.json").write_text("torn")
    config.actor_rollout_ref.model.path = str(tmp_path)
    resolve_phrases(config)
    with pytest.raises(ConfigError, match=f"the tokenizer of {tmp_path} cannot be loaded"):
        check_revision(config)


def test_preflight_chooses_the_phrases_and_asks_the_chat_template(config: DictConfig) -> None:
    OmegaConf.update(config, "actor_rollout_ref.model.custom_chat_template", THINKING, force_add=True)
    with pytest.raises(ConfigError, match="opens a thinking block"):
        preflight(config)
    assert phrases(config.distill.context) == texts("qwen")
