"""Ray's resources are counted before anything waits for them, and the environment is set before verl is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
from omegaconf import DictConfig, OmegaConf

from recipe.cluster import (
    CPU_ENVIRONMENT,
    PLUGIN,
    _nothing_left_of_a_start,
    check_resources,
    importing,
    needed,
    prepare_environment,
)
from verl_ext.compat import CLUSTER_ID
from verl_ext.config import ConfigError


def config(
    gpus: int = 1, nodes: int = 1, agents: int = 1, rewards: int = 1, storage: int = 1, teacher: int | None = None
) -> DictConfig:
    return OmegaConf.create(
        {
            "distill": {"coefficient": 1.0, "teacher": {"workers": teacher, "nodes": 2}},
            "trainer": {"n_gpus_per_node": gpus, "nnodes": nodes},
            "actor_rollout_ref": {"rollout": {"agent": {"num_workers": agents}}},
            "reward": {"num_workers": rewards},
            "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": storage}}},
        }
    )


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in (*CPU_ENVIRONMENT, "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)


def test_one_rank_needs_its_placement_group_server_agent_reward_controller_and_storage() -> None:
    assert needed(config()) == {"CPU": 3 + 1 + 1 + 1 + 1 + 1, "GPU": 1}


def test_every_rank_adds_four_cpus_and_a_gpu() -> None:
    one, many = needed(config()), needed(config(gpus=8, nodes=2))
    assert many["CPU"] - one["CPU"] == 4 * 15 and many["GPU"] == 16


def test_other_workers_and_storage_units_add_one_cpu_each() -> None:
    base = needed(config())["CPU"]
    assert needed(config(agents=8))["CPU"] == base + 7
    assert needed(config(rewards=8))["CPU"] == base + 7
    assert needed(config(storage=8))["CPU"] == base + 7


def test_a_teacher_on_workers_of_its_own_is_counted() -> None:
    base, apart = needed(config()), needed(config(teacher=4))
    assert apart["GPU"] - base["GPU"] == 8 and apart["CPU"] - base["CPU"] == 24


def test_a_cluster_that_is_just_large_enough_is_taken() -> None:
    check_resources(config(gpus=2), needed(config(gpus=2)))


@pytest.mark.parametrize(("name", "amount"), [("CPU", 7.0), ("GPU", 0.0)])
def test_a_cluster_that_is_too_small_is_refused_with_the_arithmetic(name: str, amount: float) -> None:
    with pytest.raises(ConfigError) as caught:
        check_resources(config(), {"CPU": 8.0, "GPU": 1.0, name: amount})
    message = str(caught.value)
    assert f"Ray has {amount:g} free {name}, this run needs {needed(config())[name]:g}" in message
    for part in ("trainer.n_gpus_per_node=1", "agent.num_workers=1", "reward.num_workers=1", "storage units=1"):
        assert part in message


def test_a_cluster_without_gpus_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 free GPU"):
        check_resources(config(), {"CPU": 100.0})


def test_the_plugin_is_named_to_verl_on_every_platform() -> None:
    for platform in ("cpu", None):
        assert prepare_environment(platform)["VERL_USE_EXTERNAL_MODULES"] == PLUGIN
        assert os.environ["VERL_USE_EXTERNAL_MODULES"] == PLUGIN


def test_the_cpu_settings_reach_this_process_and_the_workers_and_spare_what_a_user_has_set() -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "4"
    environment = prepare_environment("cpu")
    assert environment["VERL_PLATFORM"] == os.environ["VERL_PLATFORM"] == "cpu"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert set(CPU_ENVIRONMENT) <= set(environment)


def test_a_gpu_run_gets_none_of_the_cpu_settings() -> None:
    assert not set(CPU_ENVIRONMENT) & set(prepare_environment(None))


def test_every_process_has_a_cluster_name_of_its_own_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = prepare_environment("cpu")[CLUSTER_ID]
    assert prepare_environment(None)[CLUSTER_ID] == os.environ[CLUSTER_ID] == name
    monkeypatch.setattr(os, "getpid", lambda: 1)  # a child inherits the environment, not the process id
    assert prepare_environment("cpu")[CLUSTER_ID] != name


@pytest.mark.parametrize(("value", "kept"), [("", False), ("0", True)])
def test_an_empty_list_of_visible_devices_is_unset_because_ray_would_refuse_logical_gpus(
    value: str, kept: bool
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = value
    prepare_environment("cpu")
    assert ("CUDA_VISIBLE_DEVICES" in os.environ) is kept


def test_an_import_that_fails_ahead_of_time_is_left_to_the_statement_that_needs_it() -> None:
    with importing("no_such_module_anywhere"):
        pass


def test_a_start_that_is_interrupted_leaves_no_process_and_spares_those_that_were_there() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    family = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen(sleeper)
    try:
        with pytest.raises(KeyboardInterrupt), _nothing_left_of_a_start():
            parent = subprocess.Popen([sys.executable, "-c", family, *sleeper], stdout=subprocess.PIPE)
            assert parent.stdout is not None and parent.stdout.readline()
            (child,) = psutil.Process(parent.pid).children()
            raise KeyboardInterrupt
        assert not psutil.pid_exists(parent.pid) and not child.is_running() and other.poll() is None
        parent.stdout.close()
    finally:
        other.kill()
        other.wait()
