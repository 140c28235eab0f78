"""What makes a checkpoint complete: the marker that is written into it last, and what it is held against.

``complete.json`` names the step, the number of ranks and every file with its size and checksum (XXH3, 128 bits, over
the whole file). It finds accidents: a save that was cut off, a truncated, lost or changed file. It is no signature: who
can write the folder can write the marker too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from verl_ext.atomic import sync_folder, write_atomically

MARKER = "complete.json"
STATE_FILE = "trainer.json"
"""Of :mod:`verl_ext.trainer_state`."""
MODEL_FOLDER = "actor/huggingface/"
"""Where verl puts config and tokenizer; a model folder that a user makes there does no harm."""
FORMAT = 1
THREADS = 8
BLOCK_BYTES = 8 << 20


class CheckpointError(ValueError):
    """A checkpoint that must not be loaded; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What the marker of a checkpoint says.

    Attributes:
        step: trainer steps done.
        world_size: ranks that wrote it.
        files: size in bytes and checksum (32 hex digits) by path inside the folder, with ``/``.
    """

    step: int
    world_size: int
    files: Mapping[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(size for size, _ in self.files.values())


def file_names(folder: Path) -> list[str]:
    """Paths of all files inside a checkpoint but its marker, with ``/``; hidden files do not count."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MARKER and not any(p.startswith(".") for p in name.split("/")))


def checksum(path: Path) -> str:
    """XXH3 of a whole file, 32 hex digits."""
    digest, buffer = xxhash.xxh3_128(), bytearray(BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def seal_files(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Size and checksum of files that this process has written; they are on the disk when it returns."""

    def seal(name: str) -> tuple[str, tuple[int, str]]:
        path = folder / name
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return name, (path.stat().st_size, checksum(path))

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(seal, names))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes the checkpoint complete. Everything else must be on the disk by then."""
    for part in sorted({(folder / name).parent for name in manifest.files} | {folder}):
        sync_folder(part)
    write_atomically(folder / MARKER, _text(manifest))
    sync_folder(folder)


def _text(manifest: Manifest) -> str:
    files = {name: list(manifest.files[name]) for name in sorted(manifest.files)}
    body = {"format": FORMAT, "step": manifest.step, "world_size": manifest.world_size, "files": files}
    return json.dumps(body | {"checksum": xxhash.xxh3_128_hexdigest(json.dumps(body).encode())}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or it belongs to another step.
    """
    try:
        data = (folder / MARKER).read_bytes()
        raw = json.loads(data)
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in raw["files"].items()}
        manifest = Manifest(int(raw["step"]), int(raw["world_size"]), files)
    except FileNotFoundError:
        raise CheckpointError(f"{MARKER} is missing: the save was cut off, or is older than this marker") from None
    except OSError as error:
        raise CheckpointError(f"{MARKER} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MARKER} is damaged ({type(error).__name__})") from None
    # Byte for byte: the file holds nothing but what was read from it, and its own checksum.
    if data != _text(manifest).encode():
        raise CheckpointError(f"{MARKER} is damaged, or of another format than {FORMAT}: its own checksum does not fit")
    if folder.name != f"global_step_{manifest.step}":
        raise CheckpointError(f"{MARKER} is that of step {manifest.step}")
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise CheckpointError(f"{MARKER} names {name!r}, a file outside of the checkpoint")
    return manifest


def check_files(folder: Path, manifest: Manifest, *, full: bool = True) -> None:
    """Holds the files against the marker: their presence, their sizes and, with ``full``, their contents.

    Raises:
        CheckpointError: names the first file that does not fit.
    """
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{name} has {found:,} bytes instead of {size:,}")
    # verl unpickles by name: a file that was put there later must not be among what it finds.
    extra = [name for name in file_names(folder) if name not in manifest.files and not name.startswith(MODEL_FOLDER)]
    if extra:
        raise CheckpointError(f"{extra[0]} was not written with it; move it elsewhere")
    if full:
        _check_contents(folder, manifest)


def _check_contents(folder: Path, manifest: Manifest) -> None:
    # Largest first: no thread is left with a large file at the end.
    names = sorted(manifest.files, key=lambda name: -manifest.files[name][0])
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            digests = list(pool.map(lambda name: checksum(folder / name), names))
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    for name, digest in zip(names, digests, strict=True):
        if digest != manifest.files[name][1]:
            raise CheckpointError(f"{name} has changed since it was written: its checksum does not fit")
