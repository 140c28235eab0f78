"""The loss of one micro-batch: (1 - lambda) policy gradient + lambda sum_q W_q sum_i sum_t D, over fixed denominators.

Weights, masks and denominators are data of the batch (one value per row, made once on the driver), so that neither the
loss nor its gradient depends on micro-batches, packing, dynamic batching or the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from verl_ext.config import DistillConfig
from verl_ext.passes import packed_divergence

WEIGHT = "distill_weight"
"""Field: float32 [B], question weight of the row; 0 where the row is not distilled."""
ROWS = "mini_batch_rows"
"""Field: int64 [B], rows of the row's whole mini-batch, left-out ones included."""
TOKENS = "mini_batch_tokens"
"""Field: int64 [B], loss tokens of the row's whole mini-batch, left-out ones included."""


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


class Loss:
    """verl's loss function of the actor; a picklable object, sent to the workers by ``set_loss_fn``."""

    def __init__(self, config: DistillConfig, actor_config: Any) -> None:
        self.config = config
        self.actor_config = actor_config

    def __call__(
        self,
        *,
        data: TensorDict,
        student_logits: torch.Tensor | None = None,
        model_output: dict[str, Any] | None = None,
        dp_group: Any = None,
    ) -> Any:
        if student_logits is not None:
            logits_NV, rows_B = student_logits.squeeze(0), data[WEIGHT] != 0
            return {"divergence": packed_divergence(logits_NV, data, rows_B, self.config.divergence)[None]}
        metrics: dict[str, Any] = {}
        loss = 0.0
        if self.config.divergence_loss:
            distill_loss = self.distillation(model_output, data, metrics)
            loss = loss + self.config.coefficient * distill_loss
        if self.config.policy_gradient:
            policy_loss = self.policy_gradient(model_output, data, metrics)
            # Not multiplied where there is nothing to blend: GRPO alone stays verl's own loss, bit for bit. Where the
            # advantage carries the distillation, the two are blended there.
            blend = self.config.divergence_loss
            loss = loss + (1 - self.config.coefficient) * policy_loss if blend else policy_loss
        return loss, metrics

    def distillation(self, model_output: dict[str, Any], data: TensorDict, metrics: dict[str, Any]) -> torch.Tensor:
        """The distillation term; times the number of ranks, because FSDP averages gradients."""
        from verl.utils.metric import AggregationType, Metric
        from verl.workers.utils.padding import no_padding_2_padding

        divergence_BT = no_padding_2_padding(model_output["divergence"], data)
        mask_BT = data["response_mask"].to_padded_tensor(0)
        if self.config.divergence.rollout_correction and "rollout_is_weights" in data:
            divergence_BT = divergence_BT * data["rollout_is_weights"].to_padded_tensor(0.0).detach()
        loss = data["dp_size"] * aggregate(
            divergence_BT,
            mask_BT,
            data[WEIGHT],
            mode=self.config.divergence.aggregation,
            rows=int(data[ROWS][0]),
            tokens=int(data[TOKENS][0]),
        )
        metrics["distill/loss"] = Metric(value=loss.detach(), aggregation=AggregationType.SUM)
        return loss

    def policy_gradient(self, model_output: dict[str, Any], data: TensorDict, metrics: dict[str, Any]) -> torch.Tensor:
        """verl's own policy loss, with denominators that count the rows left out."""
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.losses import ppo_loss
        from verl.workers.utils.padding import no_padding_2_padding

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
