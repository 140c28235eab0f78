"""What a run on preference pairs (PBSD) needs of the rollout, the lengths and the batch, before Ray starts."""

from __future__ import annotations

from omegaconf import DictConfig

from verl_ext.adapter import check_adapter_off_sampling
from verl_ext.config import ConfigError, DistillConfig


def check_pairs(config: DictConfig, method: DistillConfig) -> None:
    """Raises ConfigError with the key, the value and what is allowed."""
    if not method.pairs:
        return
    rollout = config.actor_rollout_ref.rollout
    if rollout.n % 2:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n is {rollout.n}; allowed: an even number with carrier=preference, one sample "
            "of the teacher and one of the student for every pair"
        )
    if not rollout.calculate_log_probs:
        raise ConfigError(
            "actor_rollout_ref.rollout.calculate_log_probs is false; allowed: true with carrier=preference, whose "
            "check compares the samplers with what is scored"
        )
    correction = config.algorithm.get("rollout_correction") or {}
    asked = [key for key in ("rollout_is", "rollout_rs", "bypass_mode") if correction.get(key)]
    if asked:
        raise ConfigError(
            f"algorithm.rollout_correction.{asked[0]} is {correction[asked[0]]!r}; allowed: null with carrier="
            "preference, because half the rows were not sampled by the student"
        )
    if config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward:
        raise ConfigError(
            "a KL term is on (actor.use_kl_loss or algorithm.use_kl_in_reward); allowed: off with carrier=preference, "
            "whose loss holds the policy near the teacher already"
        )
    if config.actor_rollout_ref.actor.entropy_coeff:
        raise ConfigError(
            f"actor_rollout_ref.actor.entropy_coeff is {config.actor_rollout_ref.actor.entropy_coeff}; allowed: 0 with "
            "carrier=preference"
        )
    if method.sequences.positive == "reference":
        return
    if method.teacher.kind == "frozen":
        check_adapter_off_sampling(config)
    needed = method.context.max_length + config.data.max_response_length
    if rollout.max_model_len is None or rollout.max_model_len < needed:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_model_len is {rollout.max_model_len}; allowed: at least "
            f"distill.context.max_length + data.max_response_length = {needed}, because the teacher samples on the "
            "rollout servers too"
        )
