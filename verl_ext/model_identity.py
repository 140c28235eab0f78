"""Which model is this? A fingerprint of its weights, and the folder that a checkpoint's weights are in.

The headers of two checkpoints of one run are equal, so contents are read: small files whole, of large ones many blocks
spread evenly. Names, sizes and contents count, modification times do not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from verl_ext.config import ConfigError

WHOLE_FILE_BYTES = 256 << 20
BLOCK_BYTES = 64 << 10
BLOCKS = 512

_WEIGHTS = ("*.safetensors", "*.bin")


def weights_fingerprint(folder: Path) -> str:
    """32 hex digits from ``config.json`` and the weights of a model folder.

    Raises:
        ConfigError: the folder holds no config.json or no weights.
    """
    config = folder / "config.json"
    files = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    if not config.is_file() or not files:
        missing = "config.json" if not config.is_file() else "weights (*.safetensors or *.bin)"
        raise ConfigError(f"{folder} is no model folder: it holds no {missing}")
    sha = hashlib.sha256(json.dumps(json.loads(config.read_text()), sort_keys=True).encode())
    for path in files:
        _add_file(sha, path)
    return sha.hexdigest()[:32]


def _add_file(sha: Any, path: Path) -> None:
    size = path.stat().st_size
    sha.update(f"{path.name}:{size}".encode())
    with open(path, "rb") as file:
        if size <= WHOLE_FILE_BYTES:
            while block := file.read(1 << 20):
                sha.update(block)
            return
        for i in range(BLOCKS):
            file.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
            sha.update(file.read(BLOCK_BYTES))


def local_folder(path: str) -> Path:
    """The folder of a model given by folder or by name on the hub (fetched as vLLM would, if it is not there yet)."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"the model {path} is no folder and no name on the hub (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors*", "*.json", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:
        raise ConfigError(f"the model {path} cannot be fetched: {type(error).__name__}: {error}") from error


def model_identity(path: str) -> dict[str, str]:
    """Path and fingerprint, as a store's settings hold them."""
    return {"path": str(path), "fingerprint": weights_fingerprint(local_folder(path))}


def checkpoint_weights(folder: str) -> Path:
    """The model folder of a checkpoint: the folder itself, or ``actor/huggingface`` and the like inside it.

    Raises:
        ConfigError: only the trainer's shards are there; the message says how to turn them into a model folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"the checkpoint {folder} is no folder")
    candidates = [root, root / "huggingface", root / "actor" / "huggingface", root / "actor"]
    for candidate in candidates:
        if (candidate / "config.json").is_file() and any(list(candidate.glob(pattern)) for pattern in _WEIGHTS):
            return candidate
    shards = next((c for c in (root, root / "actor") if list(c.glob("model_world_size_*_rank_0.pt"))), None)
    if shards is not None:
        raise ConfigError(
            f"the checkpoint {shards} holds the trainer's shards only; make a model folder of it with `python -m "
            "recipe.export RUN_DIR --output DIR` (RUN_DIR: run.output_dir of the run), or train with "
            "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
        )
    raise ConfigError(f"the checkpoint {folder} holds no model: config.json and *.safetensors were expected in it")
