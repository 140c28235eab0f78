"""What of a run lives in the driver and in no other file of a checkpoint: counters, the stage, random generators.

JSON, so that nothing is unpickled.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl_ext.atomic import write_atomically
from verl_ext.checkpoint_manifest import STATE_FILE


def random_states() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's (CPU) global generators, in plain JSON types."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Sets what :func:`random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))


def save(folder: Path, state: dict[str, Any]) -> None:
    """Writes the counters in ``state`` and the random generators."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STATE_FILE, json.dumps({**state, "random": random_states()}, allow_nan=False) + "\n")


def load(folder: Path) -> dict[str, Any]:
    """Reads what :func:`save` wrote and sets the random generators; returns the counters.

    Raises:
        ValueError: the file is missing or does not hold them; nothing is set then.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text())
        set_random_states(state.pop("random"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint does not hold the trainer's counters") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {type(error).__name__}: {error}") from error
    return state
