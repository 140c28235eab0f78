"""Ray for one run or many: started here, or joined where one is running, and refused where it is too small.

verl waits for ever when an actor's resources do not exist, so the arithmetic is done first.
"""

from __future__ import annotations

import importlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from verl_ext.compat import CLUSTER_ID
from verl_ext.config import ConfigError
from verl_ext.preemption import PREEMPTION

PLUGIN = "verl_ext.plugin"

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    # GiB of host memory for vLLM's key-value cache; its default takes most of the machine.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Binding vLLM's threads to cores would leave the trainer none of its own.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "GLOO_SOCKET_IFNAME": "lo",
    # Several processes share few cores: more threads each are slower (measured on 2 cores) and, since libraries choose
    # their number by load, not repeatable bit for bit.
    "OMP_NUM_THREADS": "1",
    "MKL_DYNAMIC": "FALSE",
}


def prepare_environment(platform: str | None) -> dict[str, str]:
    """Sets what must be known before verl is imported; returns it for the workers. Call before importing verl."""
    environment = {"VERL_USE_EXTERNAL_MODULES": PLUGIN, "TRANSFER_QUEUE_ENABLE": "1", "HYDRA_FULL_ERROR": "1"}
    environment[CLUSTER_ID] = _cluster_id()
    if platform == "cpu":
        environment |= {key: os.environ.get(key, value) for key, value in CPU_ENVIRONMENT.items()}
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            # Empty, Ray refuses logical GPUs; unset, it does not.
            del os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ.update(environment)
    return environment


def _cluster_id() -> str:
    """One a process: asked again it is the same, and a process started from this one does not inherit it."""
    prefix = f"{os.getpid():x}"
    known = os.environ.get(CLUSTER_ID, "")
    return known if known.startswith(f"{prefix}.") else f"{prefix}.{uuid.uuid4().hex[:8]}"


def needed(config: DictConfig) -> dict[str, float]:
    """Logical resources of all actors of a run."""
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    block = config.distill.teacher
    teacher = (block.workers or 0) * block.nodes if config.distill.coefficient > 0 else 0
    storage = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    parts = {
        "placement group, 3 CPUs a rank": 3 * ranks,
        "agent loop workers": config.actor_rollout_ref.rollout.agent.num_workers,
        "reward workers": config.reward.num_workers,
        "TransferQueue controller and storage": 1 + storage,
        "rollout servers": ranks,
        "teacher, 3 CPUs a worker": 3 * teacher,
    }
    return {"CPU": float(sum(parts.values())), "GPU": float(ranks + teacher)}


def check_resources(config: DictConfig, available: dict[str, float]) -> None:
    """Raises ConfigError with the arithmetic where the cluster cannot hold the run."""
    for name, amount in needed(config).items():
        if available.get(name, 0.0) < amount:
            raise ConfigError(
                f"Ray has {available.get(name, 0.0):g} free {name}, this run needs {amount:g} "
                f"(trainer.nnodes={config.trainer.nnodes} x trainer.n_gpus_per_node={config.trainer.n_gpus_per_node}, "
                f"agent.num_workers={config.actor_rollout_ref.rollout.agent.num_workers}, "
                f"reward.num_workers={config.reward.num_workers}, storage units="
                f"{config.transfer_queue.backend.SimpleStorage.num_data_storage_units}); "
                "verl would wait for ever: start Ray with more, or ask for less"
            )


@contextmanager
def ray_cluster(config: DictConfig) -> Iterator[None]:
    """Inside, Ray is there. A cluster that was there before stays; one started here is ended."""
    environment = prepare_environment(config.run.platform)
    import ray

    if ray.is_initialized():
        check_resources(config, ray.available_resources())
        yield
        return
    settings = _ray_init_settings(config, environment)
    with PREEMPTION.beside_other_handlers(), _nothing_left_of_a_start():
        ray.init(**settings)
    try:
        check_resources(config, ray.available_resources())
        yield
    finally:
        ray.shutdown()


@contextmanager
def _nothing_left_of_a_start() -> Iterator[None]:
    """Where a start is interrupted, Ray ends its raylet; the raylet's own agents would notice half a minute later."""
    here = psutil.Process()
    before = set(here.children(recursive=True))
    try:
        yield
    except BaseException:
        started = set(here.children(recursive=True)) - before
        for process in sorted(started, key=lambda one: one.name() != "raylet"):  # first, so that it starts no more
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=5)
        raise


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Imports a slow module in a thread while Ray starts. An error of the import shows where the module is used."""
    thread = threading.Thread(target=lambda: suppressed_import(module), name=f"import {module}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def suppressed_import(module: str) -> None:
    """The real import statement comes later in the main thread and raises the same error there."""
    with suppress(Exception):
        importlib.import_module(module)


def _ray_init_settings(config: DictConfig, environment: dict[str, str]) -> dict[str, Any]:
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    runtime = OmegaConf.to_container(OmegaConf.create(get_ppo_ray_runtime_env(config)))
    runtime.setdefault("env_vars", {}).update(environment)
    given = OmegaConf.to_container(config.get("ray_kwargs", {}).get("ray_init", {}) or {}, resolve=True)
    extra = given.pop("runtime_env", None) or {}
    runtime["env_vars"].update({key: str(value) for key, value in (extra.pop("env_vars", None) or {}).items()})
    runtime.update(extra)
    settings: dict[str, Any] = {"log_to_driver": False, "runtime_env": runtime, "configure_logging": False}
    if not os.environ.get("RAY_ADDRESS"):
        wanted = needed(config)
        # Never join a cluster that somebody else started on this machine.
        settings["address"] = "local"
        settings["include_dashboard"] = False
        settings["num_cpus"] = config.run.ray_num_cpus or int(wanted["CPU"]) + 2
        if config.run.platform == "cpu":
            settings["num_gpus"] = int(wanted["GPU"])
            settings["object_store_memory"] = 1_000_000_000
    settings.update({key: value for key, value in given.items() if value is not None})
    return settings
