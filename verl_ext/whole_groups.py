"""Which groups of a training batch are whole.

A group is trained on whole, all rollouts finished without an error, or not at all: a short one would have a pass rate
and a baseline from fewer samples than all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sorted:
    """The groups of a batch by what came of them; uids.

    Attributes:
        whole: all rollouts are there.
        short: some are.
        lost: none is.
    """

    whole: tuple[str, ...]
    short: tuple[str, ...]
    lost: tuple[str, ...]


def sort_groups(uids: Sequence[str], failed: Iterable[str], keys: Iterable[str], rollouts: int) -> Sorted:
    """Which of ``uids`` are whole.

    Args:
        failed: uids of which verl says that a rollout raised.
        keys: of all rows there are. Several outputs of one rollout count once.
        rollouts: of a whole group.
    """
    failed = set(failed)
    present = Counter(uid for uid, _ in {tuple(key.rsplit("_", 2)[:2]) for key in keys})
    whole = [uid for uid in uids if uid not in failed and present[uid] == rollouts]
    rest = [uid for uid in uids if uid not in set(whole)]
    return Sorted(tuple(whole), tuple(u for u in rest if present[u]), tuple(u for u in rest if not present[u]))


def check_whole(uids_N: Sequence[str], rollouts: int) -> None:
    """The last look before a batch is used. Raises ValueError with the first group that is not whole."""
    for uid, count in Counter(uids_N).items():
        if count != rollouts:
            raise ValueError(f"group {uid} has {count} rollouts in the batch, a whole one has {rollouts}")
