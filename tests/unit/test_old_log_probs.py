"""verl's separate old-log-prob pass runs exactly where something needs it."""

from __future__ import annotations

import pytest

from recipe.compose import compose_config
from verl_ext.config import distill_config
from verl_ext.old_log_probs import OldLogProbs, old_log_probs

SEVERAL = "actor_rollout_ref.actor.ppo_mini_batch_size=4"
NOT_NEEDED, NEEDED = OldLogProbs(own_pass=False), OldLogProbs(own_pass=True)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=sdpo"], NOT_NEEDED),
        (["method=sdpo", "distill.reuse_log_probs=never"], NEEDED),
        (["method=sdpo", SEVERAL], NOT_NEEDED),
        (["method=sdpo", SEVERAL, "distill.divergence.ratio_clip=2"], NEEDED),
        (["method=sdpo_grpo"], NOT_NEEDED),
        (["method=sdpo_grpo", SEVERAL], NEEDED),
        (["method=grpo"], NOT_NEEDED),
        (["method=grpo", "actor_rollout_ref.actor.ppo_epochs=2"], NEEDED),
        (["method=sdpo_faithful"], OldLogProbs(own_pass=False, rollout_threshold=2.0)),
        (["method=sdpo_faithful", SEVERAL], NEEDED),
        (["method=sdpo_faithful", "distill.coefficient=0.5"], NEEDED),
        (["method=sdpo_faithful", "algorithm.rollout_correction.rollout_is=sequence"], NEEDED),
        (["method=sdpo_faithful", "algorithm.rollout_correction.rollout_rs=token_k1"], NEEDED),
        (["method=grpo_without_std"], NEEDED),
    ],
)
def test_the_pass_runs_where_a_ratio_needs_it(overrides, expected):
    config = compose_config(["model=tiny", *overrides])
    assert old_log_probs(config, distill_config(config.distill)) == expected
