"""Random projection of a model's whole gradient, shard by shard, to a few thousand numbers.

A count sketch (Charikar, Chen, Farach-Colton 2002; feature hashing): every entry of the gradient is added, with a
random sign, to one random number of the projection. Inner products, hence squared norms, are unbiased, with a relative
error of a norm of about sqrt(2 / dimensions); no projection matrix exists. Place and sign of an entry are a hash of
its parameter's name, its place in the whole parameter and the seed, so ranks with different shards agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

PIECE = 1 << 22
"""Entries hashed at a time."""


class GradientSketch:
    """Collects one projection per call of :meth:`take`.

    Args:
        dimensions: numbers in a projection.
        seed: of places and signs.
    """

    def __init__(self, dimensions: int, seed: int = 0) -> None:
        if isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1:
            raise ValueError(f"dimensions is {dimensions!r}; allowed: a whole number from 1")
        self.dimensions, self.seed = dimensions, seed
        self.vectors: list[Tensor] = []

    def take(self, module: torch.nn.Module, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
        """Adds the projection of the module's gradients, float64 [dimensions], summed over the ranks of ``group``.

        Entries that several ranks hold (replicated parameters) count once. A parameter without a gradient counts as 0.
        """
        total: Tensor | None = None
        for name, gradient, starts in _shards(module):
            if total is None:
                total = torch.zeros(self.dimensions, dtype=torch.float64, device=gradient.device)
            self._add(total, name, gradient, starts)
        if total is None:
            device = next(module.parameters()).device
            total = torch.zeros(self.dimensions, dtype=torch.float64, device=device)
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
        self.vectors.append(total.cpu())
        return total

    def _add(self, total: Tensor, name: str, gradient: Tensor, start: int) -> None:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        salt = int.from_bytes(digest[:8], "big", signed=True)
        flat = gradient.reshape(-1)
        for begin in range(0, len(flat), PIECE):
            piece = flat[begin : begin + PIECE]
            places = torch.arange(start + begin, start + begin + len(piece), device=piece.device)
            mixed = _mix(places + salt)
            signs = 1.0 - 2.0 * ((mixed >> 62) & 1).to(torch.float64)
            total.index_add_(0, (mixed & 0x3FFFFFFFFFFFFFF) % self.dimensions, signs * piece.to(torch.float64))


def _mix(values: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele et al. 2014) on int64, whose multiplication wraps; unsigned shifts by masks."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def _shards(module: torch.nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Name, this rank's part of every gradient, and where that part begins in the whole parameter, flattened.

    Raises:
        ValueError: a parameter is cut along another than its first dimension.
    """
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if not isinstance(gradient, DTensor):
            yield name, gradient, 0
            continue
        local = gradient.to_local()
        row = 0
        for dimension, placement in enumerate(gradient.placements):
            coordinate = gradient.device_mesh.get_local_rank(dimension)
            if isinstance(placement, Replicate):
                if coordinate > 0:
                    local = local[:0]
            elif isinstance(placement, Shard) and placement.dim == 0 and row == 0:
                ranks = gradient.device_mesh.size(dimension)
                # torch.chunk's rule: every rank but the last ones has ceil(rows / ranks).
                row = min(coordinate * -(-gradient.shape[0] // ranks), gradient.shape[0])
            else:
                raise ValueError(f"{name} has the placement {gradient.placements}; only its first dimension may be cut")
        width = 1
        for size in gradient.shape[1:]:
            width *= size
        if local.numel():
            yield name, local, row * width
