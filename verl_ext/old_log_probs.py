"""Does a step need the log-probabilities of the policy that sampled, in a pass of their own?

Where a batch is one optimiser step, the policy that sampled is the policy of the update's own forward: the importance
ratio is 1, and SDPO's truncated rollout-to-train ratio can be made from the update's own log-probabilities. verl's
separate pass is left out only where that changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from verl_ext.config import DistillConfig


@dataclass(frozen=True)
class OldLogProbs:
    """What a step does about them.

    Attributes:
        own_pass: verl's separate pass runs.
        rollout_threshold: limit of pi_old / pi_rollout where the update makes that ratio itself, else None.
    """

    own_pass: bool
    rollout_threshold: float | None = None


def old_log_probs(config: DictConfig, distill: DistillConfig) -> OldLogProbs:
    """Reads ``distill.reuse_log_probs``, ``algorithm.rollout_correction`` and the number of optimiser steps."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    correction = algorithm.get("rollout_correction", None) or {}
    ratio_kind, threshold = correction.get("rollout_is"), correction.get("rollout_is_threshold")
    if distill.reuse_log_probs != "auto" or algorithm.use_kl_in_reward or correction.get("rollout_rs"):
        return OldLogProbs(own_pass=True)
    steps = max(1, config.data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs
    if steps > 1:
        ratio = distill.policy_gradient or distill.divergence.ratio_clip is not None
        return OldLogProbs(own_pass=bool(ratio or ratio_kind))
    if not ratio_kind:
        return OldLogProbs(own_pass=False)
    plain = (
        ratio_kind == "token"
        and isinstance(threshold, int | float)
        and not correction.get("rollout_is_batch_normalize")
        and not distill.policy_gradient
        and distill.divergence_loss
    )
    return OldLogProbs(own_pass=not plain, rollout_threshold=float(threshold) if plain else None)
