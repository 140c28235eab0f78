"""Where the response tokens lie in a packed micro-batch."""

from __future__ import annotations

import torch


def response_positions(input_lengths_B: torch.Tensor, response_lengths_B: torch.Tensor) -> torch.Tensor:
    """Packed positions whose logits predict the response tokens, in row order.

    A model's output at packed position j predicts token j + 1, so a row that ends before position ``end`` has its
    response predicted at ``end - |y| - 1 .. end - 2``.

    Args:
        input_lengths_B: prompt + response tokens of each row.
        response_lengths_B: response tokens of each row.

    Returns:
        int64 positions [M], M = sum of the response lengths.

    Raises:
        ValueError: a row has no prompt token, so nothing predicts its first response token.
    """
    if bool((response_lengths_B >= input_lengths_B).any()):
        raise ValueError("every row needs at least one prompt token before its response")
    starts_B = input_lengths_B.cumsum(0) - response_lengths_B - 1
    before_B = response_lengths_B.cumsum(0) - response_lengths_B
    total = int(response_lengths_B.sum())
    offsets_M = torch.repeat_interleave(starts_B - before_B, response_lengths_B)
    return offsets_M + torch.arange(total, device=offsets_M.device)


def lengths(jagged: torch.Tensor) -> torch.Tensor:
    """Row lengths of a jagged nested tensor, int64 [B]."""
    return jagged.offsets().diff()


def to_jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    """Jagged nested tensor of one-dimensional rows."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
