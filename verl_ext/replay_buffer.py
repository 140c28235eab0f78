"""verl's replay buffer with a short poll: at 2 s a tiny run would mostly wait."""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class FastReplayBuffer(ReplayBuffer):
    """Plugged in by ``trainer.v1.sampler.custom_sampler``; the interval comes through ``sampler_kwargs``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.poll_interval = float(self.sampler_kwargs.get("poll_interval", self.poll_interval))
