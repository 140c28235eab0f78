"""Where logits come from, and how positions are cut into chunks that fit the cache or fill an accelerator.

The student enters as logits, or as hidden states and head; the teacher as logits, as hidden states and head, or as
log-probabilities on ids it was asked for.

Shape suffixes: N rows of the input, M positions read, V vocabulary, D width, K support.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_ext.chunk_sizes import HEAD_ROWS, WORK_BYTES


@dataclass(frozen=True)
class Head:
    """Hidden states [M, D] and the head [V, D] that turns them into logits, a block of rows at a time."""

    hidden: Tensor
    weight: Tensor

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def block(self, rows: slice) -> Tensor:
        """Logits [rows, V]."""
        return product(self.hidden[rows], self.weight)


@dataclass(frozen=True)
class Logits:
    """Logits [M, V] that exist already."""

    values: Tensor

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.values.shape[-1]

    def __len__(self) -> int:
        return self.values.shape[0]

    def block(self, rows: slice) -> Tensor:
        """Logits [rows, V], a view."""
        return self.values[rows]


@dataclass(frozen=True)
class OnSupport:
    """A teacher known on ids alone: log-probabilities [M, K], normalised over the vocabulary, at the temperature."""

    ids: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]


Teacher = Head | Logits | OnSupport


@dataclass(frozen=True)
class Rows:
    """Which rows of a source are read, and in which pieces.

    Attributes:
        source: logits [N, V], or hidden states [N, D] where ``head`` [V, D] is given.
        positions: int64 [M], distinct rows; None: all.
        chunk: rows worked on at once; None: by device.
    """

    source: Tensor
    head: Tensor | None
    positions: Tensor | None
    chunk: int | None = None

    def __len__(self) -> int:
        return len(self.source if self.positions is None else self.positions)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.source.shape[-1] if self.head is None else self.head.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.source.device

    def chunk_rows(self, buffers: int, dtype: torch.dtype) -> int:
        """Rows worked on at once, with so many working tensors."""
        if self.chunk is not None:
            return max(1, min(self.chunk, len(self)))
        budget = WORK_BYTES.get(self.device.type, WORK_BYTES["other"])
        rows = budget // (self.vocabulary * dtype.itemsize * buffers)
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        # An uneven number of rows leaves a thread idle.
        return max(1, min(max(rows // threads, 1) * threads, len(self)))

    def index(self, rows: slice) -> slice | Tensor:
        """Rows of the source at these positions."""
        return rows if self.positions is None else self.positions[rows]

    def blocks(self, first: int, last: int) -> Iterator[tuple[slice, Tensor | None]]:
        """Ranges for which logits are made at once, with those logits where they come from hidden states."""
        by_device = HEAD_ROWS.get(self.device.type, HEAD_ROWS["other"])
        size = max(1, last - first) if self.head is None else by_device
        for start in range(first, last, size):
            block = slice(start, min(start + size, last))
            made = None if self.head is None else product(self.source[self.index(block)], self.head)
            yield block, made

    def logits(self, made: Tensor | None, block: slice, rows: slice) -> Tensor:
        """Logits [rows, V], from the block made for them or from the source."""
        if made is None:
            return self.source[self.index(rows)]
        return made[rows.start - block.start : rows.stop - block.start]


class Work:
    """Working tensors [rows, V] that the chunks share: fresh ones would cost page faults."""

    def __init__(self, rows: Rows, dtype: torch.dtype, count: int) -> None:
        self.rows = rows.chunk_rows(count, dtype)
        shape = (self.rows, rows.vocabulary)
        self.buffers = [torch.empty(shape, dtype=dtype, device=rows.device) for _ in range(count)]

    def chunks(self, block: slice) -> Iterator[slice]:
        """Ranges of a block worked on at once."""
        for start in range(block.start, block.stop, self.rows):
            yield slice(start, min(start + self.rows, block.stop))

    def load(self, index: int, logits: Tensor, temperature: float) -> Tensor:
        """Logits in the working precision, divided by the temperature."""
        buffer = self.buffers[index][: len(logits)].copy_(logits)
        return buffer if temperature == 1.0 else buffer.div_(temperature)

    def log_softmax(self, index: int, logits: Tensor) -> Tensor:
        """Into a buffer."""
        return torch.log_softmax(logits, -1, out=self.buffers[index][: len(logits)])

    def softmax(self, index: int, logits: Tensor) -> Tensor:
        """Into a buffer."""
        return torch.softmax(logits, -1, out=self.buffers[index][: len(logits)])

    def spare(self, *indices: int, rows: int) -> list[Tensor]:
        """Buffers to overwrite."""
        return [self.buffers[index][:rows] for index in indices]


def entropy_of(log_probs: Tensor, buffer: Tensor) -> Tensor:
    """-sum p log p: [M, V] -> [M], in a buffer. An impossible token has no share: 0 * log 0 = 0."""
    return -torch.exp(log_probs, out=buffer).mul_(log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Precision of hidden states times head: autocast's where it is on, as for any linear layer."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [rows, V] in the wider of the two precisions."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype) @ weight.to(dtype).t()


def plain(device: torch.device) -> AbstractContextManager:
    """Autocast would undo the precisions chosen here."""
    return torch.autocast(device_type=device.type, enabled=False)
