"""Whole tensors from the shards of a checkpoint, by their names in the Hugging Face model, without process groups.

Shards of the student are verl's files of ``torch.save``; they are read with ``weights_only``, which knows tensors and
runs nothing. Shards of the teacher are safetensors. Files are mapped, so one tensor at a time is in memory.
"""

from __future__ import annotations

import json
import logging
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor  # noqa: F401  (weights_only reads its tensors only where it is imported)
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from verl_ext.checkpoint_manifest import CheckpointError

PEFT_PREFIX = "base_model.model."
BASE = ".base_layer."
A, B = ".lora_A.default.weight", ".lora_B.default.weight"


class Weights(ABC):
    """Named whole tensors."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names, as the model has them."""

    @abstractmethod
    def __getitem__(self, name: str) -> torch.Tensor: ...


class StudentWeights(Weights):
    """What verl's FSDP engine saved.

    Args:
        folder: ``actor`` of a checkpoint.
        unpickle: load files that hold more than tensors. That runs code which the file names.

    Raises:
        CheckpointError: a file holds more than tensors, or shards of a kind that is not known here.
    """

    def __init__(self, folder: Path, world_size: int, *, unpickle: bool = False) -> None:
        self._folder, self._world_size, self._unpickle = folder, world_size, unpickle
        first = self._load(0)
        ranks = max((_shards(name, tensor) for name, tensor in first.items()), default=1)
        self._ranks = [first, *(self._load(rank) for rank in range(1, ranks))]

    def _load(self, rank: int) -> dict[str, Any]:
        path = self._folder / f"model_world_size_{self._world_size}_rank_{rank}.pt"
        # It says of each file that its process groups do not exist here.
        logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=not self._unpickle)
        except pickle.UnpicklingError as error:
            reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
            raise CheckpointError(
                f"{path} holds more than tensors ({reason.strip()}); --unpickle loads it all the same, which runs what "
                "the file names: only for a checkpoint of your own"
            ) from error

    def names(self) -> list[str]:
        return list(self._ranks[0])

    def __getitem__(self, name: str) -> torch.Tensor:
        first = self._ranks[0][name]
        if not isinstance(first, DTensor):
            return first
        placement = first.placements[-1]
        if placement.is_replicate():
            return first.to_local()
        whole = torch.cat([rank[name].to_local() for rank in self._ranks], dim=placement.dim)
        if whole.shape != first.shape:
            raise CheckpointError(f"the shards of {name} make {tuple(whole.shape)}, expected {tuple(first.shape)}")
        return whole


def _shards(name: str, tensor: Any) -> int:
    """How many ranks, from 0, hold a different part each. The last dimension of the mesh shards, others repeat."""
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{name} is a {type(tensor).__name__}; allowed: tensors and DTensors")
    if not isinstance(tensor, DTensor):
        return 1
    *outer, last = tensor.placements
    if not all(placement.is_replicate() for placement in outer) or not (
        last.is_replicate() or type(last).__name__ == "Shard"
    ):
        raise CheckpointError(f"{name} is sharded as {tensor.placements}; allowed: along one dimension")
    return 1 if last.is_replicate() else tensor.device_mesh.shape[-1]


class MergedAdapter(Weights):
    """A student with LoRA: W + (alpha / r) B A, computed in the precision of the weights.

    Args:
        meta: ``r`` and ``lora_alpha``, from verl's ``lora_train_meta.json``.
    """

    def __init__(self, weights: Weights, meta: Mapping[str, Any]) -> None:
        self._weights, self.scale = weights, meta["lora_alpha"] / meta["r"]
        self._base, self.adapter = {}, {}
        for name in weights.names():
            plain = name.removeprefix(PEFT_PREFIX)
            if plain.endswith((A, B)):
                self.adapter[plain] = name
            elif "lora_" in plain or "modules_to_save" in plain:
                raise CheckpointError(f"{name} is no part of a plain LoRA; allowed: lora_A and lora_B")
            else:
                self._base[plain.replace(BASE, ".")] = name

    def names(self) -> list[str]:
        return list(self._base)

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[self._base[name]]
        module = name.removesuffix(".weight")
        if module + A not in self.adapter:
            return weight
        a, b = (self._weights[self.adapter[module + part]] for part in (A, B))
        return weight + (b @ a) * self.scale


def lora_meta(folder: Path) -> dict[str, Any] | None:
    """Rank and alpha of the adapter in ``actor`` of a checkpoint; None where there is no adapter."""
    path = folder / "lora_train_meta.json"
    return json.loads(path.read_text()) if path.is_file() else None


class TeacherWeights(Weights):
    """What :func:`verl_ext.teacher.save` wrote.

    Args:
        folder: ``teacher`` of a checkpoint.
        shapes: of the whole tensors; the shards do not know them.
    """

    def __init__(self, folder: Path, world_size: int, shapes: Mapping[str, torch.Size]) -> None:
        from verl_ext.teacher import shard_file

        self._files = [shard_file(folder, rank, world_size) for rank in range(world_size)]
        self._shapes = shapes
        with safe_open(self._files[0], "pt") as file:
            self._names = list(file.keys())

    def names(self) -> list[str]:
        return self._names

    def __getitem__(self, name: str) -> torch.Tensor:
        """Shards of the first dimension, rank after rank; ranks behind a whole tensor repeat it."""
        wanted, parts = self._shapes[name], []
        with ExitStack() as files:
            for path in self._files:
                parts.append(files.enter_context(safe_open(path, "pt")).get_tensor(name))
                if sum(len(part) for part in parts) >= wanted[0]:
                    break
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if whole.shape != wanted:
            raise CheckpointError(
                f"the teacher's shards of {name} make {tuple(whole.shape)}, expected {tuple(wanted)}; only shards of "
                "actor.strategy=fsdp2 are known here"
            )
        return whole


def skeleton(folder: Path) -> torch.nn.Module:
    """The model that ``config.json`` in the folder describes, without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def select(weights: Weights, model: torch.nn.Module) -> dict[str, str]:
    """Which tensor of ``weights`` to write under which name of the model; tied ones once.

    Raises:
        CheckpointError: a tensor is missing or left over, or ones that the model ties are different.
    """
    there = set(weights.names())
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    chosen: dict[str, str] = {}
    for group in tied.values():
        found = [name for name in group if name in there]
        if not found:
            raise CheckpointError(f"the checkpoint does not hold {group[0]}")
        for other in found[1:]:
            if not torch.equal(weights[found[0]], weights[other]):
                raise CheckpointError(f"{found[0]} and {other} are one tensor of the model, and differ")
        chosen[group[0]] = found[0]
        there -= set(group)
    if there:
        raise CheckpointError(f"the checkpoint holds {sorted(there)[0]}, which the model does not have")
    return chosen


def whole(weights: Weights, chosen: Mapping[str, str], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The chosen tensors one after the other, in a dtype (None: as they are)."""
    for name, source in chosen.items():
        tensor = weights[source]
        yield name, (tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)).contiguous()
