"""The method block's combinations: what is refused and why, and what the open choices resolve to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from verl_ext import divergence_kinds, token_losses
from verl_ext.config import ConfigError, DivergenceConfig, distill_config
from verl_ext.config_axes import CLIP_LEVELS, DIVERGENCES, INPUTS, SUPPORTS
from verl_ext.student_values import measure_of

FULL = {"support": "full", "tail": False}


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        distill_config(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------- one list of allowed values


def test_the_kinds_of_the_config_are_the_registered_ones_and_the_sampled_token() -> None:
    registered = {name for name in divergence_kinds.DIVERGENCES if ":" not in name}
    assert set(DIVERGENCES) == registered | {"sampled_token"} and len(set(DIVERGENCES)) == len(DIVERGENCES)


def test_supports_and_clip_levels_are_those_of_the_divergence() -> None:
    assert SUPPORTS == token_losses.SUPPORTS
    assert CLIP_LEVELS == divergence_kinds.CLIP_LEVELS


@pytest.mark.parametrize("kind", [name for name in DIVERGENCES if name != "sampled_token"])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("clip_level", CLIP_LEVELS)
def test_whatever_validates_is_a_measure(kind: str, support: str, clip_level: str) -> None:
    block = {"kind": kind, "support": support, "tail": support != "full", "clip": 0.05, "clip_level": clip_level}
    measure = measure_of(distill_config({"divergence": block}))
    assert dataclasses.asdict(measure) == {"alpha": 0.5, "topk": 100, **block}


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("block", "key", "found", "allowed"),
    [
        ({"topk": 0}, "topk", "0", "a number from 1"),
        ({"topk": -3}, "topk", "-3", "a number from 1"),
        ({"support": "teacher_topk", "topk": 0}, "topk", "0", "a number from 1"),
        ({"alpha": -0.1}, "alpha", "-0.1", "from 0.0 to 1.0"),
        ({"alpha": 1.1}, "alpha", "1.1", "from 0.0 to 1.0"),
        ({"support": "full"}, "tail", "True", "false with divergence.support=full"),
        ({"support": "full", "tail": True, "kind": "akl"}, "tail", "True", "false with divergence.support=full"),
        ({"kind": "kl"}, "kind", "'kl'", ", ".join(DIVERGENCES)),
        ({"kind": ":fn"}, "kind", "':fn'", "sampled_token"),
        ({"kind": "pkg.mod:"}, "kind", "'pkg.mod:'", "sampled_token"),
        ({"kind": "pkg mod:fn"}, "kind", "'pkg mod:fn'", "sampled_token"),
        ({"kind": "pkg.mod.fn"}, "kind", "'pkg.mod.fn'", "sampled_token"),
        ({"support": "topk"}, "support", "'topk'", ", ".join(SUPPORTS)),
        ({"clip": 0.0}, "clip", "0.0", "above 0.0"),
        ({"clip": -0.05}, "clip", "-0.05", "above 0.0"),
        ({"clip": float("nan")}, "clip", "nan", "above 0.0"),
        ({"clip": 0.05, "kind": "sampled_token"}, "clip", "0.05", "null with kind=sampled_token"),
        ({"clip_level": "row"}, "clip_level", "'row'", "entry, token"),
        ({"ratio_clip": 0.0}, "ratio_clip", "0.0", "above 0.0"),
        ({"inputs": "hidden"}, "inputs", "'hidden'", ", ".join(INPUTS)),
        (FULL | {"inputs": "logits"}, "inputs", "'logits'", "hidden_states with divergence.support=full"),
        ({"aggregation": "sum"}, "aggregation", "'sum'", "seq-mean-token-mean, token-mean"),
        ({"skip_tokens": -1}, "skip_tokens", "-1", "a number from 0"),
    ],
    ids=str,
)
def test_a_divergence_that_cannot_be_is_refused_with_key_value_and_what_is_allowed(
    block: dict[str, Any], key: str, found: str, allowed: str
) -> None:
    message = refused({"divergence": block})
    assert message.startswith(f"distill.divergence.{key} is {found}; allowed: ") and allowed in message


@pytest.mark.parametrize(
    ("values", "key", "found", "allowed"),
    [
        ({"teacher": {"kind": "external"}}, "path", "None", "a model folder or hub name with kind=external"),
        ({"teacher": {"kind": "frozen", "path": "x"}}, "path", "'x'", "null otherwise"),
        ({"teacher": {"path": "x"}}, "path", "'x'", "null otherwise"),
        ({"teacher": {"kind": "copy"}}, "kind", "'copy'", "ema, frozen, live, synced, trust_region, external"),
        ({"teacher": {"kind": "synced", "sync_every": 0}}, "sync_every", "0", "from 1"),
        ({"teacher": {"kind": "synced", "sync_limit": 0}}, "sync_limit", "0", "from 1"),
        ({"teacher": {"kind": "frozen", "sync_limit": 1}}, "sync_limit", "1", "kind=synced"),
        ({"teacher": {"kind": "trust_region", "update_rate": 1.5}}, "update_rate", "1.5", "from 0.0 to 1.0"),
        ({"teacher": {"states": "logits"}}, "states", "'logits'", "auto, log_probs, hidden_states"),
        (
            {"teacher": {"states": "log_probs"}, "divergence": FULL},
            "states",
            "'log_probs'",
            "hidden_states with divergence.support=full",
        ),
        (
            {"teacher": {"states": "hidden_states"}, "divergence": {"kind": "sampled_token"}},
            "states",
            "'hidden_states'",
            "log_probs where only the sampled token",
        ),
        (
            {"teacher": {"states": "hidden_states"}, "carrier": "advantage"},
            "states",
            "'hidden_states'",
            "log_probs where only the sampled token",
        ),
    ],
    ids=str,
)
def test_a_teacher_that_cannot_be_is_refused_with_key_value_and_what_is_allowed(
    values: dict[str, Any], key: str, found: str, allowed: str
) -> None:
    message = refused(values)
    assert message.startswith(f"distill.teacher.{key} is {found}; allowed: ") and allowed in message


@pytest.mark.parametrize(
    "values",
    [
        {"divergence": {"kind": "pkg.mod:fn"}},
        {"divergence": {"kind": "mod:_fn2"}},
        {"divergence": {"alpha": 0, "topk": 1}},
        {"divergence": {"alpha": 1, "clip": 0.05, "clip_level": "token"}},
        {"divergence": {"kind": "sampled_token", "support": "full"}},
        {"divergence": {"kind": "sampled_token", "inputs": "hidden_states"}},
        {"divergence": {"tail": False}},
        {"divergence": FULL | {"inputs": "hidden_states"}, "teacher": {"states": "hidden_states"}},
        {"teacher": {"kind": "external", "path": "some/model"}},
        {"teacher": {"kind": "external", "path": "some/model"}, "context": {"kind": "none"}},
        {"teacher": {"kind": "trust_region", "states": "log_probs"}},
        {"teacher": {"states": "hidden_states"}, "divergence": {"support": "teacher_topk"}},
        {"carrier": "advantage", "divergence": FULL | {"inputs": "logits"}},
        {"non_finite_limit": 0},
    ],
    ids=str,
)
def test_a_combination_that_can_be_is_accepted(values: dict[str, Any]) -> None:
    distill_config(values)


@pytest.mark.parametrize("other", [{"coefficient": 0.5}, {"carrier": "advantage"}], ids=str)
def test_tokens_are_skipped_only_where_the_distillation_loss_is_alone(other: dict[str, Any]) -> None:
    skip = {"divergence": {"skip_tokens": 3}}
    distill_config(skip)
    distill_config(other)
    distill_config(skip | {"coefficient": 0.0})  # nothing is distilled
    message = refused(skip | other)
    assert message.startswith("distill.divergence.skip_tokens is 3; allowed: 0, or a number with coefficient=1 and ")


@pytest.mark.parametrize("kind", ["sibling", "reference"])
def test_the_teacher_s_prompt_may_have_template_arguments_of_its_own(kind: str) -> None:
    block = {"kind": kind, "template_kwargs": {"enable_thinking": True}}
    assert distill_config({"context": block}).context.template_kwargs == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("block", "allowed"),
    [
        ({"kind": "none", "template_kwargs": {"a": 1}}, "empty with kind=none"),
        ({"kind": "revision", "template_kwargs": {"a": 1}}, "empty with kind=revision"),
        ({"template_kwargs": {"tokenize": False}}, "no tokenize"),
        ({"template_kwargs": {"a": 1, "add_generation_prompt": False}}, "no add_generation_prompt"),
    ],
    ids=str,
)
def test_template_arguments_that_cannot_be_are_refused(block: dict[str, Any], allowed: str) -> None:
    message = refused({"teacher": {"kind": "frozen"}, "context": block})
    assert message.startswith(f"distill.context.template_kwargs is {block['template_kwargs']!r}; allowed: {allowed}")
    distill_config({"teacher": {"kind": "frozen"}, "context": block | {"template_kwargs": {}}})


def test_the_limit_of_skipped_steps_is_not_negative() -> None:
    assert refused({"non_finite_limit": -1}).startswith("distill.non_finite_limit is -1; allowed: a number from 0")


def test_a_block_built_by_hand_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="distill.divergence.topk is True; allowed: a number from 1"):
        DivergenceConfig(topk=True).validate()


# -------------------------------------------------------------------------------------------------- what auto becomes

STUDENT, TEACHER = {"support": "student_topk"}, {"support": "teacher_topk"}
SAMPLED = {"kind": "sampled_token"}
LOG_PROBS, HIDDEN = "log_probs", "hidden_states"


@pytest.mark.parametrize(
    ("values", "teacher_states", "student_inputs", "support_pass", "student_pass"),
    [
        ({"divergence": STUDENT}, HIDDEN, "logits", False, False),
        ({"divergence": STUDENT, "teacher": {"states": LOG_PROBS}}, LOG_PROBS, "logits", True, True),
        ({"divergence": STUDENT | {"inputs": HIDDEN}}, HIDDEN, HIDDEN, False, False),
        (
            {"divergence": STUDENT | {"inputs": HIDDEN}, "teacher": {"states": LOG_PROBS}},
            LOG_PROBS,
            HIDDEN,
            True,
            True,
        ),
        ({"divergence": TEACHER}, LOG_PROBS, "logits", False, False),
        ({"divergence": TEACHER, "teacher": {"states": HIDDEN}}, HIDDEN, "logits", False, False),
        ({"divergence": TEACHER | {"inputs": HIDDEN}}, LOG_PROBS, HIDDEN, False, False),
        ({"divergence": FULL}, HIDDEN, HIDDEN, False, False),
        ({"divergence": FULL, "coefficient": 0.5}, HIDDEN, HIDDEN, False, False),
        ({"divergence": SAMPLED}, LOG_PROBS, "logits", False, False),
        ({"divergence": SAMPLED | FULL}, LOG_PROBS, "logits", False, False),
        ({"divergence": SAMPLED | {"inputs": HIDDEN}}, LOG_PROBS, HIDDEN, False, False),
        ({"carrier": "advantage"}, LOG_PROBS, "logits", False, True),
        ({"carrier": "advantage", "coefficient": 0.5, "divergence": FULL}, LOG_PROBS, "logits", False, True),
        ({"coefficient": 0.0}, LOG_PROBS, "logits", False, False),
        ({"coefficient": 0.0, "teacher": {"states": LOG_PROBS}}, LOG_PROBS, "logits", False, False),
        ({"coefficient": 0.5, "teacher": {"states": LOG_PROBS}}, LOG_PROBS, "logits", True, True),
    ],
    ids=str,
)
def test_the_passes_and_what_they_keep_follow_from_the_block(
    values: dict[str, Any], teacher_states: str, student_inputs: str, support_pass: bool, student_pass: bool
) -> None:
    config = distill_config(values)
    found = (config.teacher_states, config.student_inputs, config.support_pass, config.student_pass)
    assert found == (teacher_states, student_inputs, support_pass, student_pass)


@pytest.mark.parametrize(
    ("values", "one_token", "policy_gradient"),
    [
        ({}, False, False),
        ({"divergence": SAMPLED}, True, False),
        ({"coefficient": 0.5}, False, True),
        ({"carrier": "advantage"}, True, True),
        ({"coefficient": 0.0}, True, True),
    ],
    ids=str,
)
def test_one_token_is_compared_where_the_divergence_is_not_the_loss(
    values: dict[str, Any], one_token: bool, policy_gradient: bool
) -> None:
    config = distill_config(values)
    assert (config.one_token, config.policy_gradient) == (one_token, policy_gradient)


@pytest.mark.parametrize(
    ("kind", "own", "moves"),
    [
        ("ema", True, True),
        ("synced", True, True),
        ("frozen", True, False),
        ("trust_region", True, False),
        ("external", True, False),
        ("live", False, False),
    ],
)
def test_a_teacher_kind_says_whether_it_has_weights_of_its_own_and_whether_they_move(
    kind: str, own: bool, moves: bool
) -> None:
    teacher = distill_config({"teacher": {"kind": kind, "path": "x" if kind == "external" else None}}).teacher
    assert (teacher.has_own_weights, teacher.moves) == (own, moves)


@pytest.mark.parametrize(
    ("teacher", "rates"),
    [
        ({"kind": "ema", "update_rate": 0.25}, [0.25] * 6),
        ({"kind": "frozen"}, [0.0] * 6),
        ({"kind": "synced", "sync_every": 2}, [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
        ({"kind": "synced", "sync_every": 2, "sync_limit": 1}, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"kind": "synced", "sync_every": 1, "sync_limit": 3}, [1.0] * 3 + [0.0] * 3),
    ],
)
def test_how_far_the_teacher_moves_after_a_step(teacher: dict, rates: list[float]) -> None:
    settings = distill_config({"teacher": teacher}).teacher
    assert [settings.rate_after(step) for step in range(1, 7)] == rates


# ------------------------------------------------------------------------------------------------------------ revision


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("kind", "self_revision", "sibling, reference, revision, none"),
        ("phrases", "gemma", "auto, paper, qwen, olmo"),
        ("phrase_right", "", "a phrase, or null for that of context.phrases"),
        ("phrase_wrong", " \t", "a phrase, or null for that of context.phrases"),
        ("placement", "system", "assistant, user"),
    ],
)
def test_a_revision_that_cannot_be_is_refused_with_key_value_and_what_is_allowed(
    key: str, value: str, allowed: str
) -> None:
    message = refused({"context": {"kind": "revision"} | {key: value}})
    assert message == f"distill.context.{key} is {value!r}; allowed: {allowed}"


def test_a_revision_needs_the_student_s_own_attempts() -> None:
    block = {"sequences": {"source": "reference"}, "context": {"kind": "revision"}}
    assert refused(block).startswith("distill.context.kind is 'revision'; allowed: none or reference with sequences.so")
    distill_config(block | {"sequences": {}, "teacher": {"kind": "frozen"}})
    message = refused(
        {"context": {"kind": "revision"}, "schedule": {"switch": 0.5, "second": {"sequences": block["sequences"]}}}
    )
    assert message.startswith("in the second stage (distill.schedule.second): distill.context.kind is 'revision'")
