"""What a pass without gradient reads of a distribution, in chunks: nothing as wide as the vocabulary survives one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from verl_ext.chunks import Head, Logits, Rows, Work, entropy_of, plain, product_dtype


class Reading(NamedTuple):
    """Per position read, [M] or [M, K]; None where it was not asked for."""

    ids: Tensor | None
    log_probs: Tensor | None
    token_log_probs: Tensor | None
    entropy: Tensor | None


@torch.no_grad()
def read(
    source: Head | Logits,
    *,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    ids: Tensor | None = None,
    topk: int | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    row_chunk: int | None = None,
) -> Reading:
    """Log-probabilities [M, K] of given or of the most likely ids, of the tokens [M], and the entropy [M].

    Args:
        source: rows [N]; ``positions`` int64 [M] says which are read (None: all).
        tokens: int64 [M].
        ids: int64 or int32 [M, K]; ``topk``: the K most likely ids instead (all of a smaller vocabulary). Neither: no
            support is read.
        temperature: divides the logits.
        row_chunk: positions worked on at once; None: by device.

    Returns:
        float64 for float64 input, else float32; chosen ids int32, given ones as they are.
    """
    if isinstance(source, Head):
        dtype = product_dtype(source.hidden, source.weight)
        rows = Rows(source.hidden.to(dtype), source.weight.to(dtype), positions, row_chunk)
    else:
        rows = Rows(source.values, None, positions, row_chunk)
    dtype = torch.float64 if rows.source.dtype == torch.float64 else torch.float32
    width = ids.shape[-1] if ids is not None else min(topk or 0, rows.vocabulary)

    def empty(*shape: int, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=as_dtype, device=rows.device)

    out = Reading(
        empty(len(rows), width, as_dtype=torch.int32) if ids is None and width else ids,
        empty(len(rows), width) if width else None,
        empty(len(rows)) if tokens is not None else None,
        empty(len(rows)) if entropy else None,
    )
    with plain(rows.device):
        work = Work(rows, dtype, 3)
        for block, made in rows.blocks(0, len(rows)):
            for part in work.chunks(block):
                logits = work.load(0, rows.logits(made, block, part), temperature)
                log_probs = work.log_softmax(1, logits)
                if width:
                    chosen = logits.topk(width, dim=-1).indices if ids is None else ids[part].long()
                    out.log_probs[part] = log_probs.gather(-1, chosen)
                    if ids is None:
                        out.ids[part] = chosen.to(torch.int32)
                if tokens is not None:
                    out.token_log_probs[part] = log_probs.gather(-1, tokens[part].unsqueeze(-1)).squeeze(-1)
                if entropy:
                    out.entropy[part] = entropy_of(log_probs, work.spare(2, rows=len(log_probs))[0])
    return out
