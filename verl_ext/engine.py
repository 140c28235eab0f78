"""verl's FSDP engine on a CPU too, and a teacher that is not streamed from host memory.

verl 0.9.1 forces CPU offload on every forward-only engine (and pins that memory, which a torch build without an
accelerator cannot). Here a forward-only engine stays on its device unless it is asked to be offloaded, and then it is
loaded once per pass, not once per layer.

Registered under the platform's vendor key, which verl looks up first; verl's own registration is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead


class DistillEngine(FSDPEngineWithLMHead):
    """FSDP engine with a language-model head whose forward-only copies may live on the device."""

    forward_only_placement: str | None = None
    """``device``: kept there; ``host``: loaded once per pass; None: as verl does (streamed, pinned)."""

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
