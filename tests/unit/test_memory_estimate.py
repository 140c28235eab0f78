"""The terms of one rank: states against tensors that are really held, phases, and what each key changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from verl_ext.architecture import Architecture, architecture, elements
from verl_ext.memory_activations import Forward
from verl_ext.memory_estimate import (
    GIB,
    OPTIMISER,
    PHASES,
    ROLLOUT,
    TEACHER,
    UPDATE,
    Copy,
    Estimate,
    LossSettings,
    Plan,
    Rollout,
    estimate,
    optimiser_bytes,
    shard_bytes,
)  # fmt: skip

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 24, "intermediate_size": 41, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "qwen3": {"head_dim": 10, "tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False},
    "olmo3": {"tie_word_embeddings": False},
}


def numbers(family: str) -> dict[str, Any]:
    return {**SHAPE, **FAMILIES[family], "model_type": family}


def built(family: str) -> torch.nn.Module:
    found = numbers(family)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(found.pop("model_type"), **found))


def held(tensors: Any) -> int:
    """Bytes of different storages."""
    tensors = list(tensors)  # all at once: a freed one would leave its address to the next
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def plan(model: Architecture, **changes: Any) -> Plan:
    loss = LossSettings(True, topk=20, teacher_states="hidden_states")
    given = Plan(
        student=Copy(model),
        teacher=Copy(model),
        teacher_model=model,
        forward=Forward(2, True),
        loss=loss,
        ranks=1,
        student_tokens=100,
        teacher_tokens=100,
        taught_tokens=80,
        rollout=Rollout(share=0.5, itemsize=2, length=64),
        device_bytes=80 * GIB,
    )
    return replace(given, **changes)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest) -> tuple[str, torch.nn.Module, torch.optim.AdamW]:
    """A tiny model after one step of AdamW, gradients still there."""
    model = built(request.param)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(64, (1, 8))).logits.square().mean().backward()
    optimizer.step()
    return request.param, model, optimizer


def test_states_are_the_bytes_of_the_tensors(trained) -> None:
    family, model, optimizer = trained
    found = estimate(plan(architecture(numbers(family))))
    assert found.of("weights") == held(model.parameters())
    assert found.of("gradients") == held(p.grad for p in model.parameters())
    assert found.of("optimiser") == held(t for state in optimizer.state.values() for t in state.values())
    assert found.of("teacher") == held(p.float() for p in model.parameters())
    half = estimate(plan(architecture(numbers(family)), teacher=Copy(architecture(numbers(family)), 2)))
    assert half.of("teacher") == held(p.bfloat16() for p in model.parameters())


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
def test_shards_are_those_of_fsdp2(family: str, ranks: int) -> None:
    dist.init_process_group("fake", rank=0, world_size=ranks)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
        model = built(family)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # The storage is that of the padded shard.
        found = held(parameter.to_local() for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    assert shard_bytes(architecture(numbers(family)).parameters(), ranks, 4) == found


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 9), st.sampled_from([2, 4]))
def test_all_ranks_together_hold_at_least_everything_and_little_more(rows: list[int], ranks: int, size: int) -> None:
    shapes = {str(i): (n, 3) for i, n in enumerate(rows)}
    whole = size * elements(shapes)
    together = ranks * shard_bytes(shapes, ranks, size)
    assert whole <= together <= whole + size * 3 * len(rows) * (ranks - 1)
    assert optimiser_bytes(shapes, 1, size) == 2 * whole + 4 * len(rows)


def llama() -> Architecture:
    return architecture(numbers("llama"))


def test_with_an_adapter_only_its_matrices_have_gradients_and_moments() -> None:
    model = llama()
    adapter = model.adapter(4, ["q_proj", "up_proj"])
    found = estimate(plan(model, adapter=adapter))
    assert found.of("weights") == 4 * (elements(model.parameters()) + elements(adapter))
    assert found.of("gradients") == 4 * elements(adapter)
    assert found.of("optimiser") == 8 * elements(adapter) + 4 * len(adapter)
    assert found.of("float32 gradient of the head") == 0


def phases(found: Estimate, name: str) -> set[str]:
    return {phase for term in found.terms if term.name == name for phase in term.phases}


def test_what_is_offloaded_is_on_the_host_and_away_from_the_rollout() -> None:
    model = llama()
    here = estimate(plan(model))
    away = estimate(plan(model, student=Copy(model, offloaded=True), optimizer_offload=True))
    assert phases(here, "weights") == phases(here, "optimiser") == set(PHASES) and here.host == 0
    assert phases(away, "weights") == phases(away, "optimiser") == {UPDATE, OPTIMISER}
    assert away.host == away.of("weights") + away.of("optimiser")
    assert away.phase(ROLLOUT) < here.phase(ROLLOUT) and away.phase(UPDATE) == here.phase(UPDATE)
    streamed = estimate(plan(model, student=Copy(model, streamed=True)))
    assert streamed.of("weights") == 0 and streamed.host == here.of("weights") * 2 + here.of("optimiser")


def test_an_offloaded_teacher_and_its_states_leave_the_update() -> None:
    model = llama()
    found = estimate(plan(model, teacher=Copy(model, offloaded=True), states_offloaded=True))
    assert phases(found, "teacher") == {TEACHER} and phases(found, "teacher states") == set()
    assert found.host == found.of("teacher") + 80 * 2 * model.hidden


def test_a_live_teacher_needs_no_copy_but_the_student_s_weights() -> None:
    model = llama()
    found = estimate(plan(model, teacher=None, student=Copy(model, offloaded=True)))
    assert found.of("teacher") == 0 and TEACHER in phases(found, "weights")


def test_hidden_states_in_place_of_logits() -> None:
    model = llama()
    loss = LossSettings(True, topk=20, teacher_states="hidden_states")
    logits = estimate(plan(model, loss=loss))
    hidden = estimate(plan(model, loss=replace(loss, inputs="hidden_states")))
    assert logits.of("logits") == logits.of("gradient by the logits") == 100 * 2 * model.vocabulary
    assert hidden.of("logits") == hidden.of("gradient by the logits") == 0
    assert hidden.of("float32 gradient of the head") == 4 * model.vocabulary * model.hidden
    blended = estimate(plan(model, loss=replace(loss, policy_gradient=True, scaled=True)))
    assert blended.of("logits") == 2 * logits.of("logits")
    assert blended.of("gradient by the logits") == 2 * logits.of("gradient by the logits")


def test_whole_gradients_between_micro_batches_are_counted_where_verl_keeps_them() -> None:
    name, model = "whole gradients between micro-batches", llama()
    assert estimate(plan(model, ranks=4, accumulate=True, micro_batches=2)).of(name) == 4 * elements(model.parameters())
    assert estimate(plan(model, ranks=4, accumulate=True)).of(name) == 0
    assert estimate(plan(model, ranks=4, micro_batches=2)).of(name) == 0


def test_the_peak_is_the_largest_phase_and_more_ranks_never_need_more() -> None:
    model = llama()
    found = [estimate(plan(model, ranks=ranks)) for ranks in (1, 2, 4, 8)]
    for one in found:
        assert one.peak[1] == max(one.phase(name) for name in PHASES) == one.phase(one.peak[0])
    for fewer, more in zip(found, found[1:], strict=False):
        assert all(more.phase(name) <= fewer.phase(name) for name in PHASES)


def test_vllm_s_share_and_the_sequences_it_holds() -> None:
    model = llama()
    found = estimate(plan(model))
    assert found.of("vLLM's share") == 40 * GIB and phases(found, "vLLM's share") == {ROLLOUT}
    awake = estimate(plan(model, rollout=Rollout(share=0.5, itemsize=2, sleeps=False)))
    assert phases(awake, "vLLM's share") == set(PHASES) and awake.sequences is None
    # keys and values of 2 layers and 2 groups of 6 numbers, 2 bytes each, 64 tokens a sequence
    expected = (40 * GIB - 2 * elements(model.parameters()) - 2 * GIB) / (2 * 2 * 2 * 6 * 2 * 64)
    assert found.sequences == pytest.approx(expected)
    host = estimate(plan(model, cuda=False))
    assert host.sequences is None and host.of("vLLM's share") == 0
