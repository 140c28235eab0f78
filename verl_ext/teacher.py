"""Teacher weights: an fp32 copy that follows the student, by name and on local shards.

bf16 loses most of a slow moving average (an update of 1e-5 per step at tau 0.05 is absorbed to 68%, one of 1e-6 to
19%), so another dtype is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

PIECE = 1 << 24
"""Elements of a shard worked on at once, where a copy is needed."""


def local_shards(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter, by its original name (a view, no copy)."""
    shards = {}
    for name, parameter in module.named_parameters():
        tensor = parameter.data
        shards[name.replace("_fsdp_wrapped_module.", "")] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shards


def check_same_parameters(
    teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], *, moves: bool = True
) -> None:
    """Raises ValueError where names, shapes or, for a teacher that moves, its dtype do not fit."""
    missing = sorted(set(student) ^ set(teacher))
    if missing:
        raise ValueError(f"teacher and student differ in {len(missing)} parameters, the first is {missing[0]}")
    for name, tensor in teacher.items():
        if tensor.shape != student[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the teacher and {tuple(student[name].shape)} in the student"
            )
        if moves and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} of the teacher is {tensor.dtype}; a moving average needs float32: "
                "set actor_rollout_ref.ref.fsdp_config.model_dtype=fp32"
            )


@torch.no_grad()
def move_towards(teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student, in place (SDPO, EMA teacher)."""
    check_same_parameters(teacher, student)
    for name, tensor in teacher.items():
        tensor.lerp_(student[name].to(device=tensor.device, dtype=torch.float32), rate)


@torch.no_grad()
def squared_distance(teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor]) -> float:
    """Squared norm of teacher minus student over this rank's shards."""
    total = 0.0
    for name, tensor in teacher.items():
        # In pieces: the difference of a whole embedding would need its memory again.
        pieces = zip(tensor.flatten().split(PIECE), student[name].flatten().split(PIECE), strict=True)
        for piece, other in pieces:
            total += float((piece.float() - other.to(device=piece.device, dtype=torch.float32)).square().sum())
    return total


def shard_file(folder: Path, rank: int, world_size: int) -> Path:
    """File of one rank's shards."""
    return folder / f"teacher_world_size_{world_size}_rank_{rank}.safetensors"


def save(teacher: dict[str, torch.Tensor], folder: Path, rank: int, world_size: int) -> None:
    """Writes this rank's shards in fp32, under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    target = shard_file(folder, rank, world_size)
    temporary = target.with_suffix(".tmp")
    save_file({name: t.detach().cpu().contiguous() for name, t in teacher.items()}, temporary)
    temporary.replace(target)
    if rank == 0:
        (folder / "teacher.json").write_text(json.dumps({"world_size": world_size, "parameters": len(teacher)}))


@torch.no_grad()
def load(teacher: dict[str, torch.Tensor], folder: Path, rank: int, world_size: int) -> None:
    """Reads what :func:`save` wrote into the teacher's shards.

    Raises:
        FileNotFoundError: no teacher for this rank, or one of another world size; both sizes are named.
        ValueError: other parameters.
    """
    source = shard_file(folder, rank, world_size)
    if not source.exists():
        found = sorted(p.name for p in folder.glob("teacher_world_size_*")) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{source} of this run's {world_size} ranks is missing; found: {', '.join(found) or 'nothing'}"
        )
    stored = load_file(source)
    check_same_parameters(stored, teacher)
    for name, tensor in teacher.items():
        tensor.copy_(stored[name])
