"""Ulysses sequence parallelism: a rank holds a contiguous part of the packed micro-batch, padded to equal parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """This rank's part of the packed tokens."""

    rank: int = 0
    size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    def own(self, positions_M: Tensor, held: int) -> Tensor | None:
        """bool [M]: positions among the ``held`` ones of this rank; None: all of them.

        Args:
            positions_M: positions in the whole packed micro-batch.
            held: rows that this rank holds, padding included; the same on every rank.
        """
        if self.size == 1:
            return None
        first = self.rank * held
        return (positions_M >= first) & (positions_M < first + held)

    def first(self, held: int) -> int:
        """The whole micro-batch's position of this rank's first row."""
        return self.rank * held

    def completed(self, values: Tensor, own_M: Tensor | None) -> Tensor:
        """Values [M, ...] of all positions, from each rank's own: every rank must call this."""
        if own_M is None:
            return values
        whole = values.new_zeros(len(own_M), *values.shape[1:])
        whole[own_M] = values
        torch.distributed.all_reduce(whole, group=self.group)
        return whole


def current_part() -> Part:
    """This rank's part, as verl's engine set it for the model that is running."""
    from verl.utils import ulysses

    group = ulysses.get_ulysses_sequence_parallel_group()
    if group is None:
        return Part()
    return Part(ulysses.get_ulysses_sequence_parallel_rank(), ulysses.get_ulysses_sequence_parallel_world_size(), group)
