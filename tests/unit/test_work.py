"""The layout of a step: which response tokens its denominators count and which rows are forwarded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from verl_ext import work
from verl_ext.config import distill_config
from verl_ext.packing import to_jagged

LENGTHS = [5, 3, 1, 4]
WEIGHTS = [1.0, 1.0, 2.0, 0.0]


def laid_out(monkeypatch: pytest.MonkeyPatch, lengths: list[int], **block: Any) -> tuple[Any, list[bool]]:
    """The mini-batches of rows with these response lengths in one batch, and which rows carry the loss."""
    rows = SimpleNamespace(
        meta=None,
        data={"response_mask": to_jagged([torch.ones(length, dtype=torch.int64) for length in lengths])},
        batch=SimpleNamespace(response_lengths=lengths, prompt_lengths=[2] * len(lengths)),
    )
    plan = SimpleNamespace(
        weights_N=torch.tensor(WEIGHTS),
        distill_N=torch.ones(len(lengths), dtype=torch.bool),
        teacher_prompt_ids_N=[[1, 2, 3]] * len(lengths),
    )
    actor = {"use_kl_loss": False, "kl_loss_coef": 0.0, "entropy_coeff": 0.0, "use_dynamic_bsz": True}
    actor["ppo_mini_batch_size"] = len(lengths)
    config = OmegaConf.create({"actor_rollout_ref": {"actor": actor, "rollout": {"n": 1}}})
    written: dict[str, Any] = {}

    def write(_rows: Any, _plan: Any, mini_batches: Any, taught: torch.Tensor, *_: Any) -> tuple[None, list]:
        written.update(mini_batches=mini_batches.mini_batches, taught=taught.tolist())
        return None, []

    monkeypatch.setattr(work, "_write", write)
    monkeypatch.setattr(work, "read_advantages", lambda _: [torch.ones(length) for length in lengths])
    work.lay_out(rows, plan, distill_config(block), config, ranks=1, eos_token_id=0)
    return written.get("mini_batches", ()), written.get("taught", [])


def test_every_response_token_counts_where_none_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    (mini_batch,), taught = laid_out(monkeypatch, LENGTHS)
    assert (mini_batch.row_count, mini_batch.token_count) == (4, 13)
    assert mini_batch.rows == [0, 1, 2] and taught == [True, True, True, False]


def test_skipped_tokens_are_in_no_denominator_and_a_row_of_nothing_else_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (mini_batch,), taught = laid_out(monkeypatch, LENGTHS, divergence={"skip_tokens": 3})
    # Rows are not fewer: their mean is over all of them, as it is over rows without a context.
    assert (mini_batch.row_count, mini_batch.token_count) == (4, 2 + 0 + 0 + 1)
    assert mini_batch.rows == [0] and taught == [True, False, False, False]


def test_no_optimiser_step_is_made_where_all_tokens_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert laid_out(monkeypatch, [3, 2, 1, 3], divergence={"skip_tokens": 3}) == ((), [])


def test_nothing_is_skipped_where_the_divergence_is_not_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    (mini_batch,), taught = laid_out(monkeypatch, LENGTHS, coefficient=0.0, divergence={"skip_tokens": 3})
    assert mini_batch.token_count == 13 and taught == [True, True, True, False]
