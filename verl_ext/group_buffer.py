"""Groups that lost rollouts are left out of a training batch.

In verl's synchronous mode a group whose requests failed stays sampleable with the rollouts it has (0.9.1,
``ReplayBuffer``), so that a partial failure would train on short groups. They are left out and not refilled: what
failed them (a dead rollout server) would fail their substitutes too, and the order of the questions would depend on
the failure. Too many lost groups end the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl_ext.whole_groups import sort_groups


class LostGroups(RuntimeError):
    """Too many groups of a batch lost rollouts; says how many and what was found to be dead."""


class WholeGroupBuffer(ReplayBuffer):
    """verl's buffer, which hands on whole groups only and lets a wait for validation be cut."""

    rollouts = 0
    """Of a whole group; 0: not checked."""
    share_allowed = 0.0
    """Largest share of a batch that may be lost."""
    diagnose: Callable[[], str] = staticmethod(lambda: "")
    """What is known to be dead, for the message."""
    cut: Callable[[], None] = staticmethod(lambda: None)
    """Called between two looks while validation is waited for; may raise."""
    counts: Mapping[str, int] = {"short": 0, "lost": 0}
    """Groups left out of the last training batch."""

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, int]]:
        uids, rows, steps = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        if partition_id != "train" or not self.rollouts:
            return uids, rows, steps
        found = sort_groups(uids, self.failure_keys[partition_id], rows, self.rollouts)
        out = {*found.short, *found.lost}
        self.counts = {"short": len(found.short), "lost": len(found.lost)}
        if not found.whole or len(out) > self.share_allowed * len(uids):
            raise LostGroups(
                f"{len(out)} of {len(uids)} groups lost rollouts, allowed is a share of {self.share_allowed:g} "
                f"(distill.lost_groups); {self.diagnose() or 'Ray worker logs say why'}"
            )
        self._clear_groups(partition_id, out)
        return list(found.whole), rows, steps

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        if partition_id == "val":
            self.cut()
        return super()._wait_for_next_poll(partition_id, last_debug_time)
