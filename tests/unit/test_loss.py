"""Aggregation over fixed denominators: what weighs nothing contributes nothing, and splitting changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.loss import aggregate

MODES = ("seq-mean-token-mean", "token-mean")


def batch(seed: int = 0, rows: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    divergence = torch.rand(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths.unsqueeze(1)).to(torch.int64)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    return divergence, mask, weights


def test_the_sequence_mean_is_the_mean_over_all_rows_of_weighted_token_means() -> None:
    divergence = torch.tensor([[1.0, 3.0, 100.0], [5.0, 100.0, 100.0], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    value = aggregate(
        divergence, mask, torch.tensor([2.0, 1.0, 0.0]), mode="seq-mean-token-mean", rows=10, tokens=99
    )
    assert float(value) == pytest.approx((2 * 2.0 + 5.0) / 10)


def test_the_token_mean_divides_weighted_sums_by_the_tokens_of_the_whole_mini_batch() -> None:
    divergence = torch.tensor([[1.0, 3.0], [5.0, 100.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    value = aggregate(divergence, mask, torch.tensor([2.0, 1.0]), mode="token-mean", rows=99, tokens=20)
    assert float(value) == pytest.approx((2 * 4.0 + 5.0) / 20)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_of_weight_zero_contributes_nothing_whatever_it_holds(mode: str, poison: float) -> None:
    divergence, mask, weights = batch()
    weights[2] = 0.0
    clean = aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=20)
    divergence[2] = poison
    divergence.requires_grad_()
    value = aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=20)
    value.backward()
    assert value == clean
    assert torch.isfinite(divergence.grad).all() and (divergence.grad[2] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_values_outside_the_mask_are_never_read(mode: str) -> None:
    divergence, mask, weights = batch()
    clean = aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=20)
    assert aggregate(divergence.masked_fill(mask == 0, math.nan), mask, weights, mode=mode, rows=6, tokens=20) == clean


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None)
@given(cut=st.integers(1, 5), seed=st.integers(0, 50))
def test_the_sum_over_micro_batches_is_the_loss_of_the_whole(mode: str, cut: int, seed: int) -> None:
    divergence, mask, weights = batch(seed)
    tokens = int(mask.sum())
    whole = aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=tokens)
    parts = [
        aggregate(divergence[part], mask[part], weights[part], mode=mode, rows=6, tokens=tokens)
        for part in (slice(None, cut), slice(cut, None))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_row_is_proportional_to_its_weight(mode: str) -> None:
    divergence, mask, _ = batch(3)
    divergence.requires_grad_()
    aggregate(divergence, mask, torch.ones(6), mode=mode, rows=6, tokens=20).backward()
    plain = divergence.grad.clone()
    divergence.grad = None
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 4.0, 1.0], dtype=torch.float64)
    aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=20).backward()
    torch.testing.assert_close(divergence.grad, plain * weights.unsqueeze(1))


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_without_any_weight_is_zero_and_keeps_its_graph(mode: str) -> None:
    divergence, mask, _ = batch()
    divergence.requires_grad_()
    value = aggregate(divergence, mask, torch.zeros(6), mode=mode, rows=6, tokens=0)
    value.backward()
    assert float(value.detach()) == 0.0 and (divergence.grad == 0).all()


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'sum'.*seq-mean-token-mean, token-mean"):
        aggregate(*batch(), mode="sum", rows=1, tokens=1)
