"""Files that are replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a run killed half way, sees the old text or the new one, never a mix."""
    temporary = path.with_name(path.name + ".tmp")
    # A model may emit half of a surrogate pair, which has no UTF-8 form: a question mark is better than a lost file.
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Of a write to an open file Python's message does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """What was created, renamed or removed in the folder outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
