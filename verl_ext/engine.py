"""verl's FSDP engine on a CPU too, and a teacher that is not streamed from host memory.

verl 0.9.1 forces CPU offload on every forward-only engine (and pins that memory, which a torch build without an
accelerator cannot). Here a forward-only engine stays on its device unless it is asked to be offloaded, and then it is
loaded once per pass, not once per layer.

A loss function that reads hidden states (``reads_hidden_states``) is called inside the forward of the head, in the
head's place: there FSDP has gathered the weight and will reduce its gradient, also where the head is a unit of its own
(untied models), and no logits of the whole micro-batch are made.

A step whose loss or gradient is not finite is skipped and counted; verl looks at the gradient only, and counts nothing.

Registered under the platform's vendor key, which verl looks up first; verl's own registration is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name, get_vendor
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_ext.chunks import Head
from verl_ext.gradient_sketch import GradientSketch
from verl_ext.packing import lengths


class DistillEngine(FSDPEngineWithLMHead):
    """FSDP engine with a language-model head whose forward-only copies may live on the device."""

    forward_only_placement: str | None = None
    """``device``: kept there; ``host``: loaded once per pass; None: as verl does (streamed, pinned)."""
    sketch: GradientSketch | None = None
    """Where gradients are measured instead of used: no optimiser step changes a weight."""
    finite_steps = 0
    """Optimiser steps taken so far; the same on every rank."""

    def _build_fsdp_module(self, module):
        placement = "device" if get_device_name() == "cpu" else self.forward_only_placement
        self._kept_by_us = bool(self.engine_config.forward_only) and placement is not None
        if not self._kept_by_us:
            return super()._build_fsdp_module(module)
        with _trainable(self.engine_config):
            module = super()._build_fsdp_module(module)
        self._is_offload_param = placement == "host"
        self._is_offload_optimizer = False
        return module

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        if not getattr(self, "_kept_by_us", False):
            super().to(device, model, optimizer, grad)
            return
        with _trainable(self.engine_config):
            super().to(device, model, optimizer, grad)

    # --------------------------------------------------------------------------------------------- hidden states

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool) -> Any:
        if not getattr(loss_function, "reads_hidden_states", False):
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        with self._in_place_of_head(micro_batch, loss_function):
            return super().forward_step(micro_batch, loss_function, forward_only)

    @contextmanager
    def _in_place_of_head(self, micro_batch: TensorDict, loss_function: Callable) -> Iterator[None]:
        """The head's forward returns the loss function's values [F, N] of this micro-batch instead of logits."""
        head = _unwrapped(self.module).get_output_embeddings()

        def read(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            weight = head.weight
            if getattr(head, "bias", None) is not None or isinstance(weight, DTensor) or hasattr(head, "base_layer"):
                raise RuntimeError(
                    f"the head is {type(head).__name__} with weight {type(weight).__name__}; reading hidden states "
                    "needs a gathered weight, no bias and no adapter. Set distill.divergence.inputs=logits and "
                    "distill.teacher.states=log_probs"
                )
            values = loss_function(hidden_states=Head(_packed(hidden, micro_batch), weight), data=micro_batch)
            self._head_names = list(values)
            # A pass without gradient has no values; the one shows whether the model changes what its head returns.
            self._head_values = (
                torch.stack([values[name] for name in values]) if values else torch.ones(1, 1, device=hidden.device)
            )
            return self._head_values

        head.forward = read
        try:
            yield
        finally:
            del head.forward
            self._head_names, self._head_values = None, None

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        if getattr(self, "_head_values", None) is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        unchanged = output.logits.shape == self._head_values.shape and torch.equal(
            torch.nan_to_num(output.logits), torch.nan_to_num(self._head_values)
        )
        if not unchanged:
            raise RuntimeError(
                f"{type(_unwrapped(self.module)).__name__} changes its logits after the head (soft-capping), so "
                "hidden states and head do not give them. Set distill.divergence.inputs=logits and "
                "distill.teacher.states=log_probs"
            )
        offsets = micro_batch["input_ids"].offsets()
        pad_size = output_args.get("pad_size", 0)
        return {
            name: torch.nested.nested_tensor_from_jagged(self._gather_and_unpad_packed(values, pad_size), offsets)
            for name, values in zip(self._head_names, output.logits.unbind(), strict=False)
        }

    # ------------------------------------------------------------------------------------------ non-finite steps

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if not forward_only:
            finite = torch.tensor(float(all(math.isfinite(loss) for loss in output["loss"])), device=get_device_id())
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
            self._loss_is_finite = bool(finite)
        return output

    def optimizer_step(self) -> float:
        if self.sketch is not None:
            norm = float(self.sketch.take(self.module, torch.distributed.group.WORLD).norm())
            self.optimizer.zero_grad()
            return norm
        if not self._loss_is_finite:
            self.optimizer.zero_grad()
            return math.nan
        norm = super().optimizer_step()
        self.finite_steps += math.isfinite(norm)
        return norm


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside FSDP1's wrapper; FSDP2 has none."""
    return getattr(module, "_fsdp_wrapped_module", module)


def _packed(hidden: torch.Tensor, micro_batch: TensorDict) -> torch.Tensor:
    """Hidden states [N, D] of the packed tokens, from packed ones [1, N, D] or padded ones [B, T, D]."""
    if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
        return hidden.squeeze(0)
    lengths_B = lengths(micro_batch["input_ids"]).to(hidden.device)
    return hidden[torch.arange(hidden.shape[1], device=hidden.device) < lengths_B.unsqueeze(1)]


@contextmanager
def _trainable(engine_config) -> Iterator[None]:
    """verl ties the offload to ``forward_only``; the flag is lowered only while the module is wrapped or moved."""
    object.__setattr__(engine_config, "forward_only", False)
    try:
        yield
    finally:
        object.__setattr__(engine_config, "forward_only", True)


@contextmanager
def forward_only_placement(placement: str | None) -> Iterator[None]:
    """Engines built inside stay on ``device``, go to ``host``, or (None) are treated as verl does."""
    before = DistillEngine.forward_only_placement
    DistillEngine.forward_only_placement = placement
    try:
        yield
    finally:
        DistillEngine.forward_only_placement = before


def register() -> None:
    """Makes verl build this engine for FSDP and FSDP2 on this process's platform. May be called again."""
    device, vendor = get_device_name(), get_vendor()
    for backend in ("fsdp", "fsdp2"):
        if (device, vendor) not in EngineRegistry._engines["language_model"][backend]:
            EngineRegistry.register(model_type="language_model", backend=backend, device=device, vendor=vendor)(
                DistillEngine
            )


register()
