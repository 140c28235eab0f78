"""Advantages on the pass-rate axis, as verl advantage estimators.

Two estimators are registered with verl under ``algorithm.adv_estimator``:

* ``pass_rate_kernel``: A = (r - p) k(p) per question, with k(p) = scale * p^alpha (1-p)^beta. Since the un-normalised
  group baseline A = r - p already has a gradient proportional to p(1-p), the kernel moves the implicit question weight
  to p^(1+alpha) (1-p)^(1+beta): alpha = beta = -1/2 is GRPO (weight sqrt(p(1-p))), 0 is Dr.GRPO (weight p(1-p)).
* ``self_teacher``: A_t = w_q (log pi_T(y_t) - log pi_S(y_t)), the sampled-token reverse KL of self-distillation
  (SDPO, arXiv 2601.20802, token-level mode) carried by verl's clipped policy loss.

verl hands a registered estimator the rewards, the response mask, the ``uid`` of every row and the ``algorithm`` block.
Settings therefore come from blocks inside it, ``algorithm.pass_rate_kernel`` and ``algorithm.self_teacher``.
Anything else (teacher log-probabilities, question weights, verifier errors) does not come with verl's call: a trainer
that has them calls the same function with the extra keyword arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

from verl_ext.pass_rates import GroupPassRates, group_pass_rates, success_mask
from verl_ext.weighting import beta_kernel, normalize

KERNEL_DEFAULTS: dict[str, Any] = {
    "alpha": -0.5,
    "beta": -0.5,
    "scale": 1.0,
    "ddof": 0,
    "normalizer": "none",
    "constant": None,
    "cap": None,
    "threshold": 0.5,
}
SELF_TEACHER_DEFAULTS: dict[str, Any] = {"clip": None}


def pass_rate_kernel(
    groups: GroupPassRates,
    *,
    alpha: float = -0.5,
    beta: float = -0.5,
    scale: float = 1.0,
    ddof: int = 0,
    normalizer: str = "none",
    constant: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """Factor k(p) on the group-centred outcome: scale * p^alpha (1-p)^beta, normalised over the questions.

    With the variance v = p(1-p) and alpha = beta = e this is scale * v^e. ``ddof`` replaces v by v G / (G - ddof), for
    unequal exponents with e their mean. verl's GRPO uses the sample standard deviation, so ``ddof=1`` at e = -1/2 is
    its advantage (up to the 1e-6 in its denominator), smaller than that of ``ddof=0`` by sqrt((G-1)/G).

    Args:
        groups: pass rates and counts of P questions.
        alpha, beta: exponents of p and 1 - p; may be negative.
        scale: constant factor, at least 0; applied after the normaliser, before the cap.
        ddof: 0 for the population variance, 1 for the sample variance.
        normalizer, constant: as in :func:`verl_ext.weighting.question_weights`; the mean runs over measured questions.
        cap: upper bound of the factor, applied last.

    Returns:
        [P] float64 factors. A question without both outcomes has advantage 0 under any kernel; where a negative
        exponent would make its factor infinite, the factor is 0. So is that of a question never verified.

    Raises:
        ValueError: for non-finite settings, a negative ``scale``, ``ddof`` other than 0 or 1, or a bad normaliser.
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("scale", scale)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, found {value}")
    if scale < 0:
        raise ValueError(f"scale must not be negative, found {scale}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (population) or 1 (sample), found {ddof!r}")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be greater than 0, found {cap}")
    measured_P = groups.counts_P > 0
    rates_P = groups.rates_P.masked_fill(~measured_P, 0.0)
    raw_P = beta_kernel(rates_P, alpha=alpha, beta=beta)
    if ddof:
        counts_P = groups.counts_P.to(raw_P.dtype)
        raw_P = raw_P * (counts_P / (counts_P - ddof)).pow((alpha + beta) / 2)
    raw_P = torch.where(measured_P & raw_P.isfinite(), raw_P, 0.0)
    kernel_P = normalize(raw_P, measured_P, normalizer=normalizer, constant=constant) * scale
    return kernel_P if cap is None else kernel_P.clamp(max=cap)


def pass_rate_kernel_advantage(
    scores_N: Tensor,
    question_keys: Sequence[Hashable],
    errors_N: Tensor | None = None,
    *,
    threshold: float = 0.5,
    **kernel: Any,
) -> Tensor:
    """Outcome advantage A = (r - p) k(p) of every row, r = 1 if its score reaches the threshold, else 0.

    Scores are reduced to outcomes on purpose: p(1-p) is the variance of r, and for scores other than 0 and 1 it is not.

    Args:
        scores_N: [N] sequence-level scores.
        question_keys: N question identifiers; the rows of one group share one.
        errors_N: [N] bool, rows whose verifier failed: advantage 0, left out of p.
        threshold: as in :func:`verl_ext.pass_rates.group_pass_rates`.
        kernel: settings of :func:`pass_rate_kernel`.

    Returns:
        [N] advantages without gradient, float32 or float64. A group of one row has no baseline and gets 0 (verl's own
        GRPO returns its score).

    Raises:
        ValueError: as the two functions above.
    """
    scores_N = scores_N.detach()
    groups = group_pass_rates(question_keys, scores_N, errors_N, threshold=threshold)
    outcomes_N = success_mask(scores_N, threshold=threshold).to(torch.float64)
    factors_N = groups.to_rows(pass_rate_kernel(groups, **kernel))
    # Rows of a group without a verified row have a NaN rate; errors have no outcome. Both are selected away.
    centred_N = outcomes_N - groups.to_rows(groups.rates_P)
    skipped_N = groups.to_rows(groups.counts_P == 0)
    if errors_N is not None:
        skipped_N = skipped_N | errors_N.to(skipped_N.device)
    advantages_N = torch.where(skipped_N, 0.0, centred_N * factors_N)
    return advantages_N.to(torch.promote_types(scores_N.dtype, torch.float32))


def self_teacher_token_advantage(
    teacher_log_probs_NL: Tensor,
    student_log_probs_NL: Tensor,
    response_mask_NL: Tensor,
    weights_N: Tensor | None = None,
    *,
    clip: float | None = None,
) -> Tensor:
    """Token advantage of the self-teacher, w_q (log pi_T(y_t) - log pi_S(y_t)), 0 outside the response.

    On-policy, the gradient of a policy-gradient loss with this advantage is that of the sampled-token reverse KL,
    stopgrad(log s - log t) log s (SDPO, arXiv 2601.20802, token-level mode).

    Args:
        teacher_log_probs_NL: [N, L] log-probabilities of the sampled tokens under the teacher and its context.
        student_log_probs_NL: [N, L] the same under the student when the batch was collected (``old_log_probs``).
        response_mask_NL: [N, L] non-zero on response tokens. Values elsewhere are never read.
        weights_N: [N] question weight of every row; 0 for a row without a teacher context. None means 1.
        clip: bound on the absolute log ratio, before weighting; None for no bound.

    Returns:
        [N, L] advantages without gradient, float32 or float64.

    Raises:
        ValueError: for differing shapes, a clip that is not positive, weights that are negative or not finite, or a log
            ratio that is not finite on a response token of a row whose weight is not 0.
    """
    shape = teacher_log_probs_NL.shape
    if len(shape) != 2 or student_log_probs_NL.shape != shape or response_mask_NL.shape != shape:
        raise ValueError(
            f"teacher {list(shape)}, student {list(student_log_probs_NL.shape)} and mask "
            f"{list(response_mask_NL.shape)} must share one shape [N, L]"
        )
    if clip is not None and not (clip > 0 and math.isfinite(clip)):
        raise ValueError(f"clip must be positive and finite, found {clip}")
    teacher_NL, student_NL = (
        values.detach().to(torch.promote_types(values.dtype, torch.float32))
        for values in (teacher_log_probs_NL, student_log_probs_NL)
    )
    if weights_N is None:
        weights_N = torch.ones(shape[0], dtype=teacher_NL.dtype, device=teacher_NL.device)
    weights_N = weights_N.detach().to(device=teacher_NL.device, dtype=teacher_NL.dtype)
    if weights_N.shape != shape[:1] or not bool((weights_N.isfinite() & (weights_N >= 0)).all()):
        raise ValueError(f"weights_N must be {shape[0]} finite numbers, not negative; found {list(weights_N.shape)}")

    used_NL = (response_mask_NL != 0) & (weights_N != 0).unsqueeze(-1)
    ratio_NL = torch.where(used_NL, teacher_NL - student_NL, 0.0)
    if clip is not None:
        ratio_NL = ratio_NL.clamp(-clip, clip)
    broken_NL = ~ratio_NL.isfinite()
    if bool(broken_NL.any()):
        row, token = (int(position) for position in broken_NL.nonzero()[0])
        raise ValueError(
            f"log ratio of teacher to student is {float(ratio_NL[row, token])} at row {row}, token {token} "
            f"({int(broken_NL.sum())} tokens); set `clip` to bound infinite ones"
        )
    return ratio_NL * weights_N.unsqueeze(-1)


def compute_pass_rate_kernel_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable] | None = None,
    config: Mapping[str, Any] | None = None,
    errors: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """verl estimator ``pass_rate_kernel``; settings from ``config.pass_rate_kernel`` (keys of ``KERNEL_DEFAULTS``).

    Args:
        token_level_rewards: [N, L]; their sum over tokens is the score of a row.
        response_mask: [N, L].
        index: [N] group of every row, verl's ``uid``.
        config: verl's ``algorithm`` block, or None for the defaults (GRPO with population standard deviation).
        errors: [N] bool, rows whose verifier failed. Not part of verl's own call.

    Returns:
        advantages and returns, both [N, L] and equal.
    """
    if index is None:
        raise ValueError("estimator 'pass_rate_kernel' needs `index`, the group (uid) of every row")
    settings = _settings(config, "pass_rate_kernel", KERNEL_DEFAULTS)
    scores_N = token_level_rewards.sum(dim=-1)
    advantages_N = pass_rate_kernel_advantage(scores_N, index, errors, **settings)
    advantages_NL = advantages_N.unsqueeze(-1) * response_mask
    return advantages_NL, advantages_NL


def compute_self_teacher_advantage(
    token_level_rewards: Tensor | None = None,
    response_mask: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
    teacher_log_probs: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    question_weights: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """verl estimator ``self_teacher``; settings from ``config.self_teacher`` (keys of ``SELF_TEACHER_DEFAULTS``).

    Args:
        token_level_rewards: not used; part of verl's call.
        response_mask: [N, L].
        config: verl's ``algorithm`` block, or None.
        teacher_log_probs, old_log_probs: [N, L], see :func:`self_teacher_token_advantage`. verl's own call has neither;
            the trainer passes them.
        question_weights: [N] weight of every row, or None for 1.

    Returns:
        advantages and returns, both [N, L] and equal.
    """
    inputs = {"response_mask": response_mask, "teacher_log_probs": teacher_log_probs, "old_log_probs": old_log_probs}
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise ValueError(
            f"estimator 'self_teacher' needs {', '.join(missing)}; verl's compute_advantage does not pass teacher "
            "log-probabilities, so a trainer with a teacher pass has to call it"
        )
    settings = _settings(config, "self_teacher", SELF_TEACHER_DEFAULTS)
    advantages_NL = self_teacher_token_advantage(
        teacher_log_probs, old_log_probs, response_mask, question_weights, **settings
    )
    return advantages_NL, advantages_NL


def _settings(config: Mapping[str, Any] | None, block: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    chosen = (config.get(block) if config is not None else None) or {}
    unknown = sorted(set(chosen.keys()) - set(defaults))
    if unknown:
        raise ValueError(
            f"algorithm.{block} has unknown keys: {', '.join(unknown)}; allowed: {', '.join(sorted(defaults))}"
        )
    return {key: chosen.get(key, default) for key, default in defaults.items()}


def _register(name: str, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Register with verl; a second import of this file replaces its own entry, a foreign entry is verl's error."""
    present = ADV_ESTIMATOR_REGISTRY.get(name)
    same_file = getattr(getattr(present, "__code__", None), "co_filename", None) == function.__code__.co_filename
    if same_file:
        del ADV_ESTIMATOR_REGISTRY[name]
    register_adv_est(name)(function)


_register("pass_rate_kernel", compute_pass_rate_kernel_advantage)
_register("self_teacher", compute_self_teacher_advantage)
