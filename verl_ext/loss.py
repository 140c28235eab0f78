"""The loss of one micro-batch: (1 - lambda) policy gradient + lambda sum_q W_q sum_i sum_t D, over fixed denominators.

Weights, masks and denominators are data of the batch (one value per row, made once on the driver), so that neither the
loss nor its gradient depends on micro-batches, packing, dynamic batching or the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from verl_ext.chunks import Head, Logits
from verl_ext.config import DistillConfig
from verl_ext.pair_pass import COEFFICIENT
from verl_ext.passes import ROW_ID
from verl_ext.student_values import DETAILS, student_values

WEIGHT = "distill_weight"
"""Field: float32 [B], question weight of the row; 0 where the row is not distilled."""
ROWS = "mini_batch_rows"
"""Field: int64 [B], rows of the row's whole mini-batch, left-out ones included."""
TOKENS = "mini_batch_tokens"
"""Field: int64 [B], loss tokens of the row's whole mini-batch, left-out ones included."""
RECORDED = "recorded"
"""Field: int64 [B], 1 for rows whose divergence is wanted token by token (sampled completions)."""
TOP_TOKENS = 0.05
"""Share of a response's tokens that counts as its top (SD-Zero, arXiv 2604.12002: the top 5%)."""


def aggregate(
    divergence_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    weights_B: torch.Tensor,
    *,
    mode: str,
    rows: int,
    tokens: int,
) -> torch.Tensor:
    """Weighted sum of token divergences over a fixed, global denominator; a scalar.

    ``seq-mean-token-mean``: (1/rows) sum_i w_i (1/|y_i|) sum_t D_it, the objective SDPO's shipped settings amount to
    (public code, micro-batch 1). ``token-mean``: (1/tokens) sum_i w_i sum_t D_it.

    Rows of weight zero contribute exactly nothing, whatever their divergence is.

    Raises:
        ValueError: unknown mode.
    """
    kept_BT = mask_BT.bool() & (weights_B != 0).unsqueeze(1)
    divergence_BT = torch.where(kept_BT, divergence_BT, torch.zeros_like(divergence_BT))
    weights_B = weights_B.to(divergence_BT.dtype)
    if mode == "seq-mean-token-mean":
        lengths_B = mask_BT.sum(1).clamp(min=1)
        return (weights_B * divergence_BT.sum(1) / lengths_B).sum() / rows
    if mode == "token-mean":
        return (weights_B * divergence_BT.sum(1)).sum() / max(tokens, 1)
    raise ValueError(f"unknown aggregation {mode!r}; known: seq-mean-token-mean, token-mean")


ROW_STATISTICS = "rows/"
"""Prefix of metrics that are lists with one entry per distilled row, in the order of ``rows/id``."""
TOKEN_DIVERGENCE = "token_divergence"
"""Row statistic: the divergence at every response token, of rows that are recorded; () of the others."""


def without_first(mask_BT: torch.Tensor, tokens: int) -> torch.Tensor:
    """The response mask [..., T] without the first ``tokens`` positions (``distill.divergence.skip_tokens``)."""
    mask_BT = mask_BT.clone()
    mask_BT[..., :tokens] = 0
    return mask_BT


class Loss:
    """verl's loss function of the actor; a picklable object, sent to the workers by ``set_loss_fn``."""

    def __init__(self, config: DistillConfig, actor_config: Any) -> None:
        self.config = config
        self.actor_config = actor_config

    @property
    def reads_hidden_states(self) -> bool:
        """Whether the engine calls it in the head's place."""
        return self.config.divergence_loss and self.config.student_inputs == "hidden_states"

    def __call__(
        self,
        *,
        data: TensorDict,
        student_logits: torch.Tensor | None = None,
        hidden_states: Head | None = None,
        model_output: dict[str, Any] | None = None,
        dp_group: Any = None,
    ) -> Any:
        if student_logits is not None:
            values = student_values(Logits(student_logits.squeeze(0)), data, data[WEIGHT] != 0, self.config)
            return {name: value[None] for name, value in values.items()}
        if hidden_states is not None:
            policy = not tu.get_non_tensor_data(data=data, key="distillation_only", default=False)
            entropy = policy and tu.get_non_tensor_data(data=data, key="calculate_entropy", default=False)
            return student_values(
                hidden_states, data, data[WEIGHT] != 0, self.config, log_probs_of_all=policy, entropy=entropy
            )
        metrics: dict[str, Any] = {}
        loss = 0.0
        if self.config.divergence_loss:
            distill_loss = self.distillation(model_output, data, metrics)
            loss = loss + self.config.coefficient * distill_loss
        if self.config.pairs:
            loss = loss + self.preference(model_output, data)
        if self.config.policy_gradient:
            policy_loss = self.policy_gradient(model_output, data, metrics)
            # Not multiplied where there is nothing to blend: GRPO alone stays verl's own loss, bit for bit. Where the
            # advantage carries the distillation, the two are blended there.
            blend = self.config.divergence_loss
            loss = loss + (1 - self.config.coefficient) * policy_loss if blend else policy_loss
        return loss, metrics

    def distillation(self, model_output: dict[str, Any], data: TensorDict, metrics: dict[str, Any]) -> torch.Tensor:
        """The distillation term; times the number of ranks, because FSDP averages gradients."""
        values = {name: no_padding_2_padding(model_output[name], data) for name in ("divergence", *DETAILS)}
        mask_BT = data["response_mask"].to_padded_tensor(0)
        divergence_BT = values["divergence"]
        factors_BT = self.multipliers(values["student_log_probs"], data)
        if factors_BT is not None:
            divergence_BT = divergence_BT * factors_BT
        loss = data["dp_size"] * aggregate(
            divergence_BT,
            without_first(mask_BT, self.config.divergence.skip_tokens),
            data[WEIGHT],
            mode=self.config.divergence.aggregation,
            rows=int(data[ROWS][0]),
            tokens=int(data[TOKENS][0]),
        )
        metrics["distill/loss"] = Metric(value=loss.detach(), aggregation=AggregationType.SUM)
        metrics.update(row_statistics(values, mask_BT, data))
        return loss

    def preference(self, model_output: dict[str, Any], data: TensorDict) -> torch.Tensor:
        """PBSD: what has the gradient of the mean preference loss over the pairs of the mini-batch, left-out ones too.

        -(1/pairs) sum_i c_i log pi(y_i), where the coefficients c of both sides of a pair were made from the four
        log-probabilities before the first mini-batch; its value means nothing.
        """
        log_probs_BT = no_padding_2_padding(model_output["log_probs"], data)
        mask_BT = data["response_mask"].to_padded_tensor(0).bool()
        coefficients_B = data[COEFFICIENT].to(log_probs_BT.dtype)
        # Selected, not multiplied: a NaN in a row of no pair stays there.
        kept_BT = mask_BT & (coefficients_B != 0).unsqueeze(1)
        log_probs_B = torch.where(kept_BT, log_probs_BT, torch.zeros_like(log_probs_BT)).sum(1)
        return -data["dp_size"] * (coefficients_B * log_probs_B).sum() / max(1, int(data[ROWS][0]) // 2)

    def multipliers(self, log_probs_BT: torch.Tensor, data: TensorDict) -> torch.Tensor | None:
        """SDPO's detached factors of a token: min(pi / pi_old, ratio_clip) and min(pi_old / pi_rollout, threshold).

        Where a batch is one optimiser step, pi_old is the policy of this forward: the first factor is 1, and the second
        needs no pass of its own (``rollout_threshold`` is then among the settings of the batch).
        """
        block = self.config.divergence
        factors = None
        if block.ratio_clip is not None and "old_log_probs" in data:
            factors = truncated_ratio(log_probs_BT, data["old_log_probs"].to_padded_tensor(0.0), block.ratio_clip)
        threshold = tu.get_non_tensor_data(data=data, key="rollout_threshold", default=None)
        correction = None
        if block.rollout_correction and threshold is not None:
            correction = truncated_ratio(log_probs_BT, data["rollout_log_probs"].to_padded_tensor(0.0), threshold)
        elif block.rollout_correction and "rollout_is_weights" in data:
            correction = data["rollout_is_weights"].to_padded_tensor(0.0).detach()
        if correction is None or factors is None:
            return correction if factors is None else factors
        return factors * correction

    def policy_gradient(self, model_output: dict[str, Any], data: TensorDict, metrics: dict[str, Any]) -> torch.Tensor:
        """verl's own policy loss, with denominators that count the rows left out."""
        if "old_log_probs" not in data:
            # One optimiser step per batch: the policy that sampled is the one being updated.
            log_prob = no_padding_2_padding(model_output["log_probs"], data).detach()
            sizes = data["response_mask"].offsets().diff().tolist()
            data["old_log_probs"] = torch.nested.as_nested_tensor(
                [row[:size] for row, size in zip(log_prob, sizes, strict=True)], layout=torch.jagged
            )
        if TOKENS in data:
            tu.assign_non_tensor(data, batch_num_tokens=int(data[TOKENS][0]), global_batch_size=int(data[ROWS][0]))
        loss, policy_metrics = ppo_loss(self.actor_config, model_output, data)
        metrics.update(policy_metrics)
        return loss


def truncated_ratio(log_probs: torch.Tensor, other_log_probs: torch.Tensor, limit: float) -> torch.Tensor:
    """min(exp(log p - log q), limit), detached; the logarithm is held within +-20 as in SDPO's code."""
    return (log_probs - other_log_probs).detach().clamp(-20.0, 20.0).exp().clamp(max=limit)


def row_statistics(values: dict[str, torch.Tensor], mask_BT: torch.Tensor, data: TensorDict) -> dict[str, list]:
    """Means over the response of every distilled row; ``gap`` is log pi_T(y_t) - log pi_S(y_t).

    ``student_nll`` is -log pi_S(y_t). On the student's own rollouts its mean is an unbiased estimate of the policy's
    entropy, H = E_y[-log pi_S(y)], for nothing: the log-probabilities are there.
    ``top_share`` is the share of the row's divergence that falls on the ``TOP_TOKENS`` of its tokens with the largest
    (at least one token; 0 where the divergence is 0).

    Lists, because every rank and micro-batch must have the same keys, whatever rows it has.
    """
    chosen_B = (data[WEIGHT] != 0) & (data[ROW_ID] >= 0)
    mask_BT = mask_BT.bool()
    lengths_B = mask_BT.sum(1).clamp(min=1)
    tokens = {
        "divergence": values["divergence"].detach(),
        "gap": values["teacher_log_probs"] - values["student_log_probs"],
        "teacher_entropy": values["teacher_entropy"],
        "student_nll": -values["student_log_probs"],
        "student_mass": values["student_mass"],
        "teacher_mass": values["teacher_mass"],
    }
    out: dict[str, list] = {f"{ROW_STATISTICS}id": data[ROW_ID][chosen_B].tolist()}
    for name, value_BT in tokens.items():
        means_B = value_BT.masked_fill(~mask_BT, 0.0).sum(1) / lengths_B
        out[ROW_STATISTICS + name] = means_B[chosen_B].tolist()
    divergence_BT = tokens["divergence"].masked_fill(~mask_BT, 0.0)
    out[ROW_STATISTICS + "top_share"] = _top_share(divergence_BT, lengths_B)[chosen_B].tolist()
    out[ROW_STATISTICS + TOKEN_DIVERGENCE] = _recorded(divergence_BT[chosen_B], chosen_B, data)
    return out


def _top_share(divergence_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """Of each row's divergence, what falls on its top tokens; [B]. By size: a sampled token's value has either sign."""
    ranked_BT = divergence_BT.abs().sort(dim=1, descending=True).values
    counted_B = (TOP_TOKENS * lengths_B).ceil().clamp(min=1)
    top_BT = torch.arange(ranked_BT.shape[1], device=ranked_BT.device) < counted_B.unsqueeze(1)
    total_B = ranked_BT.sum(1)
    return torch.where(total_B > 0, (ranked_BT * top_BT).sum(1) / total_B.clamp(min=1e-30), torch.zeros_like(total_B))


def _recorded(divergence_CT: torch.Tensor, chosen_B: torch.Tensor, data: TensorDict) -> list[tuple[float, ...]]:
    """Tuples, because lists of lists are flattened on their way over ranks and mini-batches."""
    if RECORDED not in data:
        return [()] * len(divergence_CT)
    sizes = data["response_mask"].offsets().diff()[chosen_B].tolist()
    wanted = data[RECORDED][chosen_B].tolist()
    return [
        tuple(row[:size].tolist()) if record else ()
        for row, size, record in zip(divergence_CT, sizes, wanted, strict=True)
    ]
