"""Advantages: gradient laws, finite-group identities, and equality with verl's own estimators and policy loss."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage

from verl_ext import advantage
from verl_ext.advantage import (
    compute_pass_rate_kernel_advantage,
    compute_self_teacher_advantage,
    pass_rate_kernel_advantage,
    self_teacher_token_advantage,
)
from verl_ext.divergence import sampled_token_loss
from verl_ext.weighting import question_weights

torch.set_num_threads(1)

GRPO = {"alpha": -0.5, "beta": -0.5}
DR_GRPO = {"alpha": 0.0, "beta": 0.0}


def group(successes, size):
    return torch.tensor([1.0] * successes + [0.0] * (size - successes), dtype=torch.float64)


def one_group(successes, size, **kernel):
    return pass_rate_kernel_advantage(group(successes, size), ["q"] * size, **kernel)


def batch_of_groups(seed, sizes=(8, 8, 4, 16, 8)):
    rng = np.random.default_rng(seed)
    uids, scores = [], []
    for question, size in enumerate(sizes):
        successes = rng.integers(0, size + 1)
        uids += [f"u{question}"] * size
        scores += [1.0] * int(successes) + [0.0] * int(size - successes)
    order = rng.permutation(len(uids))
    rewards = torch.zeros(len(uids), 6)
    rewards[:, 5] = torch.tensor(scores)[order]
    mask = torch.tensor(rng.integers(0, 2, size=(len(uids), 6)))
    mask[:, 5] = 1
    return rewards, mask, np.array(uids, dtype=object)[order]


# --- Laws in a softmax bandit -----------------------------------------------------------------------------------------


def bandit(p):
    """Arm probabilities with pass rate p, conditional distributions that do not depend on p, and the correct arms."""
    right = np.array([0.5, 0.3, 0.2, 0, 0, 0, 0])
    wrong = np.array([0, 0, 0, 0.4, 0.3, 0.2, 0.1])
    return p * right + (1 - p) * wrong, right > 0


@pytest.mark.parametrize(
    ("kernel", "law"),
    [
        (DR_GRPO, lambda p: p * (1 - p)),
        (GRPO, lambda p: math.sqrt(p * (1 - p))),
        ({"alpha": 0.0, "beta": 1.0}, lambda p: p * (1 - p) ** 2),
        ({"alpha": 1.0, "beta": 1.0}, lambda p: (p * (1 - p)) ** 2),
    ],
)
def test_gradient_of_the_expected_objective_follows_the_kernel_law(kernel, law):
    ratios = []
    for p in (0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.99):
        probabilities, correct = bandit(p)
        # A large group with exactly this pass rate supplies the advantage of a right and of a wrong answer.
        advantages = one_group(round(100 * p), 100, **kernel)
        value = np.where(correct, advantages[0].item(), advantages[-1].item())
        logits = torch.tensor(np.log(probabilities), requires_grad=True)
        objective = (logits.softmax(0) * torch.tensor(value)).sum()
        (gradient,) = torch.autograd.grad(objective, logits)
        ratios.append(gradient.norm().item() / law(p))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)


# --- Finite groups ----------------------------------------------------------------------------------------------------


def test_two_successes_of_eight_have_the_tabulated_advantages():
    population = one_group(2, 8)
    sample = one_group(2, 8, ddof=1)
    np.testing.assert_allclose(population[[0, -1]], [1.732047, -0.577349], atol=5e-6)
    np.testing.assert_allclose(sample[[0, -1]], [1.620182, -0.540061], atol=5e-6)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_mean_absolute_grpo_advantage_is_twice_the_sc_sdpo_weight(size):
    for successes in range(size + 1):
        advantages = one_group(successes, size)
        rate = torch.tensor([successes / size], dtype=torch.float64)
        weight = question_weights(rate, alpha=0.5, beta=0.5, normalizer="half")
        assert advantages.abs().mean().item() == pytest.approx(weight.item(), abs=1e-12)
        sample = one_group(successes, size, ddof=1)
        assert sample.abs().mean().item() == pytest.approx(math.sqrt((size - 1) / size) * weight.item(), abs=1e-12)


@pytest.mark.parametrize("size", [2, 5, 8])
@pytest.mark.parametrize("kernel", [GRPO, {**GRPO, "ddof": 1}, DR_GRPO, {**DR_GRPO, "ddof": 1}])
def test_finite_group_identity_holds_for_arbitrary_scores(size, kernel):
    scores = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    for successes in range(1, size):
        rate = successes / size
        found = (one_group(successes, size, **kernel).unsqueeze(-1) * scores).mean(0)
        difference = scores[:successes].mean(0) - scores[successes:].mean(0)
        factor = rate * (1 - rate)
        if kernel["alpha"]:
            factor = math.sqrt(factor) * (math.sqrt((size - 1) / size) if kernel.get("ddof") else 1)
        torch.testing.assert_close(found, factor * difference, rtol=1e-12, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 16), st.data(), st.floats(-1, 2), st.floats(-1, 2))
def test_advantages_of_a_group_sum_to_zero_and_equal_the_formula(size, data, alpha, beta):
    successes = data.draw(st.integers(0, size))
    advantages = one_group(successes, size, alpha=alpha, beta=beta)
    assert abs(advantages.sum().item()) < 1e-9 * max(1.0, advantages.abs().max().item())
    rate = successes / size
    if 0 < rate < 1:
        expected = (1 - rate) * rate**alpha * (1 - rate) ** beta
        assert advantages[0].item() == pytest.approx(expected, rel=1e-12)
    else:
        assert torch.equal(advantages, torch.zeros_like(advantages))


def test_a_group_of_one_has_no_baseline_and_gets_zero():
    for ddof in (0, 1):
        assert one_group(1, 1, ddof=ddof).tolist() == [0.0]


def test_verifier_errors_get_zero_and_leave_the_pass_rate_alone():
    scores = torch.tensor([1.0, 0.0, 0.0, math.nan, 0.0, 0.0], dtype=torch.float64)
    errors = torch.tensor([False, False, True, True, True, True])
    advantages = pass_rate_kernel_advantage(scores, ["a"] * 4 + ["b"] * 2, errors, **DR_GRPO)
    assert advantages.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]


def test_scores_are_reduced_to_outcomes_at_the_threshold():
    shaped = torch.tensor([0.9, 0.2, -1.0, 0.5], dtype=torch.float64)
    assert pass_rate_kernel_advantage(shaped, ["q"] * 4, **DR_GRPO).tolist() == [0.5, -0.5, -0.5, 0.5]
    found = pass_rate_kernel_advantage(shaped, ["q"] * 4, threshold=0.9, **DR_GRPO)
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_normaliser_scale_and_cap_act_on_the_factor():
    scores = torch.tensor([1.0, 0, 1.0, 0, 0, 0], dtype=torch.float64)
    keys = ["a", "a", "b", "b", "b", "b"]
    rates, centred = np.array([0.5, 0.25]), np.array([0.5, -0.5, 0.75, -0.25, -0.25, -0.25])
    kernel = rates * (1 - rates)
    normalised = kernel / kernel.mean()
    rows = np.array([0, 0, 1, 1, 1, 1])
    options = {"alpha": 1.0, "beta": 1.0, "normalizer": "mean"}
    for scale, cap in ((3.0, None), (3.0, 3.1), (0.5, 1.0)):
        found = pass_rate_kernel_advantage(scores, keys, scale=scale, cap=cap, **options)
        expected = np.minimum(scale * normalised, cap or np.inf)
        np.testing.assert_allclose(found, centred * expected[rows], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": math.nan}, "alpha"),
        ({"scale": -1.0}, "scale"),
        ({"ddof": 2}, "ddof"),
        ({"normalizer": "median"}, "allowed"),
        ({"cap": 0.0}, "cap"),
        ({"constant": 1.0}, "constant"),
    ],
)
def test_kernel_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        one_group(1, 2, **options)


# --- Against verl -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_sample_std_kernel_equals_verls_grpo(seed):
    rewards, mask, uids = batch_of_groups(seed)
    config = OmegaConf.create({"pass_rate_kernel": {**GRPO, "ddof": 1}})
    found, returns = compute_pass_rate_kernel_advantage(rewards, mask, index=uids, config=config)
    expected, _ = core_algos.compute_grpo_outcome_advantage(rewards.clone(), mask, uids)
    assert expected.abs().max() > 0.1
    # verl adds 1e-6 to a standard deviation of at least 0.25 and works in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, returns)


@pytest.mark.parametrize("seed", range(3))
def test_population_std_kernel_is_verls_grpo_times_the_known_factor(seed):
    rewards, mask, uids = batch_of_groups(seed, sizes=(8, 8, 8))
    found, _ = compute_pass_rate_kernel_advantage(rewards, mask, index=uids)
    expected, _ = core_algos.compute_grpo_outcome_advantage(rewards.clone(), mask, uids)
    torch.testing.assert_close(found * math.sqrt(7 / 8), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_flat_kernel_equals_verls_grpo_without_std(seed):
    rewards, mask, uids = batch_of_groups(seed)
    config = OmegaConf.create({"pass_rate_kernel": DR_GRPO})
    found, _ = compute_pass_rate_kernel_advantage(rewards, mask, index=uids, config=config)
    expected, _ = core_algos.compute_grpo_outcome_advantage(rewards.clone(), mask, uids, norm_adv_by_std_in_grpo=False)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_verl_calls_the_estimator_by_name_with_its_algorithm_block():
    rewards, mask, uids = batch_of_groups(7)
    tensors = TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=len(uids))
    data = DataProto(batch=tensors, non_tensor_batch={"uid": uids})
    config = OmegaConf.create({"gamma": 1.0, "pass_rate_kernel": {**GRPO, "ddof": 1, "scale": 2.0}})
    OmegaConf.set_struct(config, True)
    data = compute_advantage(data, adv_estimator="pass_rate_kernel", config=config)
    expected, _ = core_algos.compute_grpo_outcome_advantage(rewards.clone(), mask, uids)
    torch.testing.assert_close(data.batch["advantages"], 2 * expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(data.batch["returns"], data.batch["advantages"])


def test_a_config_without_our_block_means_the_defaults():
    rewards, mask, uids = batch_of_groups(1)
    bare = OmegaConf.create({"gamma": 1.0})
    OmegaConf.set_struct(bare, True)
    found, _ = compute_pass_rate_kernel_advantage(rewards, mask, index=uids, config=bare)
    assert torch.equal(found, compute_pass_rate_kernel_advantage(rewards, mask, index=uids)[0])


def test_an_unknown_key_is_named_together_with_the_allowed_ones():
    rewards, mask, uids = batch_of_groups(1)
    with pytest.raises(ValueError, match="exponent.*allowed: alpha, beta"):
        config = {"pass_rate_kernel": {"exponent": 1}}
        compute_pass_rate_kernel_advantage(rewards, mask, index=uids, config=config)
    with pytest.raises(ValueError, match="index"):
        compute_pass_rate_kernel_advantage(rewards, mask)


def test_importing_again_replaces_our_own_entry_and_nothing_else():
    names = ("pass_rate_kernel", "self_teacher")
    before = {name: core_algos.get_adv_estimator_fn(name) for name in names}
    spec = importlib.util.spec_from_file_location("a_second_name_of_the_module", advantage.__file__)
    twin = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(twin)
        assert core_algos.get_adv_estimator_fn("self_teacher") is twin.compute_self_teacher_advantage
        with pytest.raises(ValueError, match="already been registered"):
            twin._register("grpo", lambda **_: None)
    finally:
        core_algos.ADV_ESTIMATOR_REGISTRY.update(before)
    assert core_algos.get_adv_estimator_fn("grpo") is core_algos.compute_grpo_outcome_advantage


# --- Self-teacher -----------------------------------------------------------------------------------------------------


def token_batch(seed, rows=5, length=7, vocabulary=9):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocabulary, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(rows, length, vocabulary, dtype=torch.float64, generator=generator).log_softmax(-1)
    tokens = torch.randint(vocabulary, (rows, length, 1), generator=generator)
    mask = (torch.rand(rows, length, generator=generator) < 0.7).to(torch.int64)
    mask[:, 0] = 1
    log_s = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
    return logits, log_s, teacher.gather(-1, tokens).squeeze(-1), mask


@pytest.mark.parametrize("seed", range(3))
def test_clipped_policy_loss_with_the_self_teacher_has_the_gradient_of_sampled_token_reverse_kl(seed):
    logits, log_s, log_t, mask = token_batch(seed)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 1.3], dtype=torch.float64)
    advantages, _ = compute_self_teacher_advantage(
        response_mask=mask, teacher_log_probs=log_t, old_log_probs=log_s.detach(), question_weights=weights
    )
    assert (advantages < 0).any() and (advantages > 0).any()  # both branches of the clipped loss take part
    actor = OmegaConf.create(
        {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": 3.0}
        | {"global_batch_info": {}}
    )
    loss, _ = core_algos.compute_policy_loss_vanilla(log_s.detach(), log_s, advantages, mask, config=actor)
    (carried,) = torch.autograd.grad(loss, logits, retain_graph=True)
    direct = (weights.unsqueeze(-1) * sampled_token_loss(log_s, log_t) * mask).sum() / mask.sum()
    (expected,) = torch.autograd.grad(direct, logits)
    torch.testing.assert_close(carried, expected, rtol=1e-10, atol=1e-14)


def test_self_teacher_equal_to_the_student_has_no_advantage():
    _, log_s, _, mask = token_batch(0)
    found = self_teacher_token_advantage(log_s, log_s, mask)
    assert torch.equal(found, torch.zeros_like(found)) and not found.requires_grad


def test_values_outside_the_response_are_never_read():
    teacher = torch.tensor([[-1.0, math.nan], [-math.inf, math.nan]])
    student = torch.tensor([[-2.0, -math.inf], [-1.0, -1.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    found = self_teacher_token_advantage(teacher, student, mask, torch.tensor([3.0, 0.0]))
    assert found.tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_clip_bounds_the_log_ratio_before_weighting():
    teacher = torch.tensor([[-1.0, -9.0, -math.inf]])
    student = torch.tensor([[-4.0, -1.0, -1.0]])
    found = self_teacher_token_advantage(teacher, student, torch.ones(1, 3), torch.tensor([2.0]), clip=2.5)
    assert found.tolist() == [[5.0, -5.0, -5.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": torch.tensor([[0.0, -math.inf]])}, "row 0, token 1.*clip"),
        ({"teacher": torch.tensor([[math.nan, 0.0]]), "clip": 1.0}, "row 0, token 0"),
        ({"teacher": torch.zeros(1, 3)}, "share one shape"),
        ({"weights": torch.tensor([-1.0])}, "weights_N"),
        ({"weights": torch.ones(2)}, "weights_N"),
        ({"clip": 0.0}, "clip"),
    ],
)
def test_self_teacher_refuses_bad_input(changes, message):
    teacher = changes.get("teacher", torch.zeros(1, 2))
    with pytest.raises(ValueError, match=message):
        self_teacher_token_advantage(
            teacher, torch.zeros(1, 2), torch.ones(1, 2), changes.get("weights"), clip=changes.get("clip")
        )


def test_half_precision_log_probabilities_are_raised():
    found = self_teacher_token_advantage(torch.zeros(1, 2).bfloat16(), torch.ones(1, 2).bfloat16(), torch.ones(1, 2))
    assert found.dtype == torch.float32


def test_verls_own_call_cannot_serve_the_self_teacher_and_says_so():
    rewards, mask, uids = batch_of_groups(0)
    tensors = TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=len(uids))
    data = DataProto(batch=tensors, non_tensor_batch={"uid": uids})
    with pytest.raises(ValueError, match="teacher_log_probs, old_log_probs.*trainer"):
        compute_advantage(data, adv_estimator="self_teacher", config=OmegaConf.create({}))
    with pytest.raises(ValueError, match="self_teacher has unknown keys: clamp"):
        compute_self_teacher_advantage(
            response_mask=mask,
            teacher_log_probs=rewards,
            old_log_probs=rewards,
            config={"self_teacher": {"clamp": 1}},
        )
