"""How much of the vocabulary is worked on at once. Without torch: the memory estimate asks before that is imported."""

from __future__ import annotations

# Bytes of all working tensors [rows, V] of a pass. On a CPU they stay in the cache, which is several times as fast as
# going through memory (benchmarks/divergence.py --sweep); an accelerator needs large ones to be busy.
WORK_BYTES = {"cpu": 20 << 20, "other": 3 << 29}
# Rows of one matrix product with the head, for the hidden-state form.
HEAD_ROWS = {"cpu": 256, "other": 1024}
