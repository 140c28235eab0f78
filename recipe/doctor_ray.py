"""The doctor's checks of the cluster: enough resources, and one Ray worker a node that tells what it runs.

verl only logs errors of its plugin group at DEBUG, and a node with another environment shows as a crash minutes later;
here every node is asked before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from recipe.cluster import PLUGIN, needed, ray_cluster
from recipe.findings import FAIL, OK, WARN, Finding
from verl_ext.question_data import file_list

SECONDS = 240
"""For one node's answer; importing verl from a network disk can take minutes."""


def ask_node(paths: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """Runs in a Ray worker: what a model worker on this node would find."""
    import os
    import socket
    import sys
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from verl.utils.device import get_device_name
    from verl.workers.engine.base import EngineRegistry

    import verl_ext.worker  # noqa: F401  (registers the engine, and shows whether everything can be imported)

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {
        "host": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": found,
        "plugin": PLUGIN in sys.modules,
        "engine": EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__,
        "device": get_device_name(),
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
        "missing": [path for path in paths if not os.path.exists(path)],
    }


def check_cluster(config: DictConfig, packages: Sequence[str]) -> tuple[list[Finding], int | None]:
    """Joins or starts Ray as a run would, counts its resources and asks every node.

    Returns:
        the findings, and the memory of the smallest GPU that a worker saw.

    Raises:
        ConfigError: Ray has too little, with the arithmetic.
    """
    import ray

    with ray_cluster(config):
        wanted, free = needed(config), ray.available_resources()
        line = ", ".join(f"{amount:g} of {free.get(name, 0.0):g} free {name}" for name, amount in wanted.items())
        nodes = [node for node in ray.nodes() if node["Alive"]]
        answers = _ask(config, nodes, packages)
    findings = [Finding("Ray resources", OK, f"the run takes {line} on {len(nodes)} nodes")]
    findings += judge_nodes(answers, cpu=config.run.platform == "cpu")
    sizes = [answer["gpu_bytes"] for answer in answers.values() if answer.get("gpu_bytes")]
    return findings, min(sizes, default=None)


def _ask(config: DictConfig, nodes: Sequence[Mapping[str, Any]], packages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The answers by node; what a worker raised stands under ``error``."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    paths = [str(file) for key in ("train_files", "val_files") for file in file_list(config.data[key])]
    model = str(config.actor_rollout_ref.model.path)
    paths += [model] if model.startswith("/") else []
    waiting = {}
    for node in nodes:
        # Without a GPU of its own a worker sees none, and verl would take the node for a CPU machine.
        gpus = 1 if node["Resources"].get("GPU") and config.run.platform != "cpu" else 0
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(ask_node).options(num_cpus=1, num_gpus=gpus, scheduling_strategy=place, max_retries=0)
        waiting[node["NodeManagerAddress"]] = task.remote(paths, list(packages))
    answers: dict[str, dict[str, Any]] = {}
    for address, answer in waiting.items():
        try:
            answers[address] = ray.get(answer, timeout=SECONDS)
        except ray.exceptions.GetTimeoutError:
            answers[address] = {"error": f"no answer in {SECONDS} s"}
        except ray.exceptions.RayError as error:
            answers[address] = {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1]}
    return answers


def judge_nodes(answers: Mapping[str, Mapping[str, Any]], *, cpu: bool) -> list[Finding]:
    """One finding on plugin and engine, one on versions and files that differ between the nodes."""
    bad, lacking = [], []
    for address, answer in answers.items():
        if "error" in answer:
            bad.append(f"{address}: {answer['error']}")
            continue
        name = f"{answer['host']} ({address})"
        if not answer["plugin"]:
            bad.append(f"{name}: {PLUGIN} is not loaded")
        if answer["engine"] != "DistillEngine":
            bad.append(f"{name}: verl would build {answer['engine']}")
        if not cpu and answer["device"] == "cpu":
            bad.append(f"{name}: verl sees no accelerator")
        if answer["missing"]:
            lacking.append(f"{name} lacks {', '.join(answer['missing'])}")
    whole = {address: answer for address, answer in answers.items() if "error" not in answer}
    if bad:
        todo = "install the project on every node, in the environment that Ray's workers use"
        findings = [Finding("workers", FAIL, "; ".join(bad), todo)]
    else:
        findings = [Finding("workers", OK, f"plugin and DistillEngine on {len(whole)} of {len(whole)} nodes")]
    if lacking:
        todo = "put model and data where every node sees them"
        return [*findings, Finding("nodes alike", FAIL, "; ".join(lacking), todo)]
    different = _differences(whole)
    if different:
        return [
            *findings,
            Finding("nodes alike", WARN, "; ".join(different), "use one image on every node"),
        ]
    return [*findings, Finding("nodes alike", OK, "the same versions, model and data on every node")]


def _differences(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Packages, and Python itself, of which not all nodes have the same version."""
    found: dict[str, set[str]] = {}
    for answer in answers.values():
        for package, version in {"python": answer["python"], **answer["versions"]}.items():
            found.setdefault(package, set()).add(str(version))
    return [f"{package}: {', '.join(sorted(kinds))}" for package, kinds in found.items() if len(kinds) > 1]
