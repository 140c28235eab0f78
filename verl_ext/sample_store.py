"""Append-only store of samples in a folder: what was finished is never made again.

A store belongs to one set of settings (model, sampling, chat template, verifier). Their hash is its key:
``samples-<key>.jsonl`` holds one object per sample, ``manifest.json`` the settings in clear. Every sample is one write,
so a killed process leaves at most one torn line, at the end, which the next opening cuts off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


class StoreError(ValueError):
    """A store that cannot be used; the message names the file and what is wrong with it."""


def store_key(settings: Mapping[str, Any]) -> str:
    """16 hex digits that name these settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], holder: str = "the store") -> list[str]:
    """One line per setting in which the two differ, by dotted name; ``holder`` has the stored ones."""
    ours, theirs = _flat(stored), _flat(asked)
    return [
        f"{name}: {holder} has {ours.get(name, 'none')!r}, asked for {theirs.get(name, 'none')!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or ours[name] != theirs[name]
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class SampleStore:
    """Open store; rows are mappings with at least ``question_id``, ``sample`` (the index) and ``prompt`` (a digest)."""

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], *, info: Mapping[str, Any] | None = None
    ) -> None:
        """Opens the store, or makes it.

        Args:
            folder: of the store; made where it does not exist.
            settings: everything that changes what a sample would be; plain JSON values.
            info: written into a new manifest for people; does not count as a setting.

        Raises:
            StoreError: the folder holds a store of other settings (each difference is named), a damaged one, or one
                that another process writes to.
        """
        # Through JSON once, so that a tuple or an int key compares as what the manifest gives back.
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        self.key = store_key(self.settings)
        self.folder = Path(folder)
        self.path = self.folder / f"samples-{self.key}.jsonl"
        self._finished: dict[tuple[str, int], str] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_manifest(info or {})
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._cut_torn_end()
            for row in self.rows():
                self._finished[row["question_id"], row["sample"]] = row["prompt"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file back; may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __len__(self) -> int:
        return len(self._finished)

    def __contains__(self, sample: tuple[str, int]) -> bool:
        return sample in self._finished

    def check_prompt(self, question_id: str, sample: int, prompt: str) -> None:
        """Raises StoreError where the finished sample was drawn from another prompt than this one."""
        stored = self._finished.get((question_id, sample), prompt)
        if stored != prompt:
            raise StoreError(
                f"{self.path}: question {question_id} was sampled from another prompt (digest {stored}, now {prompt}); "
                "give the changed question an id of its own or choose another folder"
            )

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one finished sample. A sample that is there already is refused."""
        sample = (str(row["question_id"]), int(row["sample"]))
        if sample in self._finished:
            raise StoreError(f"{self.path}: sample {sample[1]} of question {sample[0]} is there already")
        self._write(_encode(row))
        self._finished[sample] = str(row["prompt"])

    def rows(self) -> Iterator[dict[str, Any]]:
        """All samples in the order in which they finished."""
        return read_rows(self.path)

    # ----------------------------------------------------------------------------------------------------- the folder

    def _check_manifest(self, info: Mapping[str, Any]) -> None:
        path = self.folder / MANIFEST
        holding = [file for file in sorted(self.folder.glob("samples-*.jsonl")) if file.stat().st_size]
        if path.exists():
            changed = differences(read_manifest(self.folder)["settings"], self.settings)
            if not changed:
                return
            if holding:
                what = "; ".join(changed)
                raise StoreError(f"{self.folder} holds samples of other settings: {what}. Choose another folder")
        elif holding:
            raise StoreError(f"{holding[0]} has no {MANIFEST} beside it; move it away or choose another folder")
        # New, or without a single sample: nothing is lost by writing it for these settings.
        manifest = {"format": FORMAT, "key": self.key, "settings": self.settings, "info": dict(info)}
        temporary = path.with_name(f"{MANIFEST}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{self.path}: another process is writing to this store") from None
        except OSError:
            # A network file system without locks: going on is better than not working there at all.
            return

    def _cut_torn_end(self) -> None:
        size = os.fstat(self._file).st_size
        with open(self.path, "rb") as file:
            # Only the end is read: a long store is not read twice.
            step, start = 1 << 16, size
            tail = b""
            while start > 0 and b"\n" not in tail:
                start = max(0, start - step)
                file.seek(start)
                tail = file.read(size - start)
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        try:
            json.loads(torn)
        except ValueError:
            os.ftruncate(self._file, size - len(torn))
        else:
            self._write(b"\n")  # whole, only its end of line is missing

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a store. Raises StoreError where there is none or it cannot be read."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file; is this the folder of a sample store?") from None
    except ValueError as error:
        raise StoreError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict) or "key" not in manifest:
        raise StoreError(f"{path}: expected an object with 'key' and 'settings'")
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{path}: format is {manifest.get('format')!r}, this version reads {FORMAT}")
    return manifest


def read_store(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and samples of a store, for those who only read (a torn last line is left out)."""
    manifest = read_manifest(folder)
    return manifest["settings"], list(read_rows(Path(folder) / f"samples-{manifest['key']}.jsonl"))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a samples file. Raises StoreError for a damaged line that is not the torn last one."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                _ = row["question_id"], row["sample"], row["prompt"]
            except (ValueError, TypeError, KeyError) as error:
                if not line.endswith(b"\n"):
                    return
                raise StoreError(f"{path}, line {number}: not a sample ({type(error).__name__}: {error})") from None
            yield row


def _encode(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair has no UTF-8 form; escaped, it comes back as it was.
        return json.dumps(dict(row), allow_nan=False).encode("ascii") + b"\n"
