"""Projected gradients of questions, in files of a folder that only grow in number. Cheap to import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

PREFIX = "gradients_"


def write_gradients(folder: Path, found: Mapping[str, tuple[float, np.ndarray]]) -> None:
    """Adds a file with pass rate and projected gradient float32 [D] of some questions; nothing for none."""
    if not found:
        return
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{PREFIX}{len(list(folder.glob(PREFIX + '*.npz'))):04d}.npz"
    temporary = target.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(
            file,
            question_ids=np.array(list(found)),
            rates=np.array([rate for rate, _ in found.values()]),
            gradients=np.stack([vector for _, vector in found.values()]),
        )
    temporary.replace(target)


def finished(folder: Path) -> list[str]:
    """Ids of the questions whose gradients are there."""
    return read_gradients(folder)[0]


def read_gradients(folder: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Question ids, pass rates [P] and projected gradients [P, D] of all files in a folder.

    Raises:
        ValueError: a file is damaged; it is named.
    """
    names: list[str] = []
    rates, gradients = [np.zeros(0)], []
    for path in sorted(folder.glob(f"{PREFIX}*.npz")):
        try:
            with np.load(path, allow_pickle=False) as data:
                names += data["question_ids"].tolist()
                rates.append(data["rates"])
                gradients.append(data["gradients"])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} cannot be read: {error}; remove it, its questions are asked again") from error
    return names, np.concatenate(rates), np.concatenate(gradients) if gradients else np.zeros((0, 0))
