"""A verl platform for machines without an accelerator: the GPU's code path over gloo and vLLM's CPU build.

Ray sees logical GPUs, because verl's resource check counts only "GPU" and "NPU".
"""

from __future__ import annotations

import types
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import torch


class _NullStream:
    """Stands where CUDA code expects a stream or an event: work on a CPU is finished when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event

    def query(self) -> bool:
        return True


def _resident_bytes(*_: Any, **__: Any) -> int:
    return psutil.Process().memory_info().rss


def _memory_info(*_: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _nothing(*_: Any, **__: Any) -> None: ...


def _build_device_module() -> types.ModuleType:
    """The members of ``torch.cuda`` that verl 0.9.1 uses, for a CPU."""
    module = types.ModuleType("verl_ext.cpu_device_module")
    no_ops = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device", "set_per_process_memory_fraction")
    for name in no_ops + ("synchronize",):
        setattr(module, name, _nothing)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, _resident_bytes)
    module.mem_get_info = _memory_info
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: "cpu"
    module.get_device_name = lambda *_: "CPU"
    module.Stream = module.Event = _NullStream
    module.current_stream = lambda *_: _NullStream()
    module.stream = lambda *_: nullcontext()
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    module.manual_seed = torch.manual_seed
    module.manual_seed_all = torch.manual_seed
    return module


DEVICE_MODULE = _build_device_module()


def register() -> None:
    """Registers the platform ``cpu``; ``VERL_PLATFORM=cpu`` selects it. May be called again."""
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    if PlatformRegistry.get("cpu") is not None:
        return

    @PlatformRegistry.register(platform="cpu")
    class PlatformCPU(PlatformBase):
        """CPU over gloo."""

        device_name = "cpu"
        vendor_name = "cpu"
        device_module = DEVICE_MODULE

        def is_available(self) -> bool:
            return True

        def is_platform_available(self, use_smi_check: bool = False) -> bool:
            # Chosen by name only, so that a GPU machine with our package installed never falls back to it.
            return False

        def current_device(self) -> str:  # type: ignore[override]
            # verl passes this to `.to(...)`; the index 0 would mean an accelerator.
            return "cpu"

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None: ...

        def synchronize(self, device_index: int | None = None) -> None: ...

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            torch.manual_seed(seed)

        def set_allocator_settings(self, settings: str) -> None: ...

        def empty_cache(self) -> None: ...

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return (None, None)

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg: str):
            yield

        def profiler_start(self) -> None: ...

        def profiler_stop(self) -> None: ...

        def ray_resource_name(self) -> str:
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self) -> bool:
            # Weights then travel to vLLM through shared memory.
            return False

        def cudart(self) -> None:
            return None
