"""Fingerprints of tensors, to compare two runs bit for bit."""

from __future__ import annotations

import hashlib

import torch


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
