"""Where rows come from: a data set of the Hugging Face hub, or local files.

Local files are JSON lines, a JSON array, CSV or Parquet, the first three also with .gz, a folder of them, or a folder
that ``datasets`` saved. JSON and CSV are read row by row, not by ``datasets``: it makes one table of a file and so
refuses a whole file for one row, without saying which, and turns a CSV's "007" into 7. Code of a data set is never run.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.records import Record, RowError, SourceError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LOCAL_HINT = f"--source PATH takes a local {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or a folder of them"


@dataclass(frozen=True)
class Hub:
    """A data set of the hub.

    Args:
        name: ``owner/name``.
        splits: our split -> the source's split.
        config: the configuration (subset); None for the default one.
        files: our split -> files of the repository that are fetched and read as local files are; for repositories
            that ``datasets`` cannot load without running their code. Replaces ``splits``.
        revision: branch, tag or commit; None for the newest.
    """

    name: str
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    config: str | None = None
    files: Mapping[str, Sequence[str]] | None = None
    revision: str | None = None


@dataclass
class Source:
    """An opened source: ``records(split)`` for the splits in ``splits``; ``description`` is for the manifest."""

    splits: list[str]
    description: dict[str, Any]
    notes: list[str]
    _files: dict[str, list[tuple[Path, str]]] = field(default_factory=dict)
    _tables: dict[str, tuple[Any, str]] = field(default_factory=dict)

    @cached_property
    def total(self) -> int | None:
        """Records of all splits; None where only reading a file would tell."""
        paths = [path for files in self._files.values() for path, _ in files]
        if any(_format(path) != ".parquet" for path in paths):
            return None
        try:
            rows = sum(pq.read_metadata(path).num_rows for path in paths)
        except (OSError, pa.ArrowException):
            return None  # reading it says what is wrong with it
        return rows + sum(len(table) for table, _ in self._tables.values())

    def records(self, split: str) -> Iterator[Record | RowError]:
        """The rows of a split in the source's order; a row that cannot be read comes as the error.

        Raises:
            SourceError: a file cannot be read.
        """
        if split in self._tables:
            table, name = self._tables[split]
            for row, fields in enumerate(table, 1):
                yield Record(fields, name, row, split)
        for path, name in self._files.get(split, ()):
            for row, fields in read_file(path, name):
                yield fields if isinstance(fields, RowError) else Record(fields, name, row, split)


def open_source(
    given: Sequence[str],
    hub: Hub,
    *,
    config: str | None = None,
    revision: str | None = None,
    all_files: bool = False,
    columns: Sequence[str] | None = None,
) -> Source:
    """Open what ``--source`` names.

    Args:
        given: paths, each may be preceded by ``SPLIT=``, or one name of a hub data set; empty for ``hub`` itself.
        hub: the data set's home; its splits are those wanted.
        config: instead of the hub data set's own configuration.
        revision: instead of the hub data set's own revision.
        all_files: with one wanted split, take every local file whatever split its path names. Otherwise files that
            name the wanted split are taken alone, and where there are none, those that name no split.
        columns: where given, only these columns of hub tables are read.

    Raises:
        SourceError: there is no such source, it cannot be reached, or it has none of the splits.
    """
    home = replace(hub, config=config or hub.config, revision=revision or hub.revision)
    if not given:
        return _open_hub(home, columns)
    if len(given) == 1 and not Path(given[0]).exists() and _is_hub_name(given[0]):
        other = Hub(given[0], hub.splits, config, revision=revision)
        try:
            return _open_hub(home if given[0].lower() == hub.name.lower() else other, columns)
        except SourceError as error:
            raise SourceError(f"{error} (here is no file or folder {given[0]!r})") from error
    return _open_local(given, hub, all_files)


def _is_hub_name(text: str) -> bool:
    return bool(_HUB_NAME.fullmatch(text)) and not text.startswith(".") and not text.endswith(SUFFIXES)


# The hub


def _open_hub(hub: Hub, columns: Sequence[str] | None) -> Source:
    description = {"kind": "hub", "name": hub.name, "config": hub.config, "revision": hub.revision}
    if hub.files is not None:
        return _download(hub, description)
    import datasets

    if not sys.stderr.isatty():
        # Its bars show downloads with their time left; in a file they would be many broken lines.
        datasets.disable_progress_bars()
    source = Source(splits=list(hub.splits), description={**description, "splits": dict(hub.splits)}, notes=[])
    for split, theirs in hub.splits.items():
        try:
            table = datasets.load_dataset(hub.name, hub.config, split=theirs, revision=hub.revision)
        except Exception as error:  # the hub's client has no common base for its errors
            raise _unreachable(hub, theirs, error) from error
        if columns is not None:
            table = table.select_columns([name for name in table.column_names if name in columns])
        source._tables[split] = (table, f"{hub.name} [{theirs}]")
        source.description["commit"] = _commit([str(file["filename"]) for file in table.cache_files])
    return source


def _download(hub: Hub, description: dict[str, Any]) -> Source:
    from huggingface_hub import hf_hub_download

    assert hub.files is not None
    files: dict[str, list[tuple[Path, str]]] = {}
    for split, names in hub.files.items():
        for name in names:
            try:
                path = hf_hub_download(hub.name, name, repo_type="dataset", revision=hub.revision)
            except Exception as error:  # as above
                raise _unreachable(hub, name, error) from error
            files.setdefault(split, []).append((Path(path), f"{hub.name}/{name}"))
    description["files"] = [
        {"file": name, "sha256": sha256_of(path), "split": split} for split in files for path, name in files[split]
    ]
    description["commit"] = _commit([str(path) for paths in files.values() for path, _ in paths])
    return Source(splits=list(files), description=description, notes=[], _files=files)


def _commit(paths: Sequence[str]) -> str | None:
    """The commit that was loaded: the hub's caches have it in their paths."""
    commits = [match for path in paths for match in _COMMIT.findall(path)]
    return commits[0] if commits else None


def _unreachable(hub: Hub, part: str, error: Exception) -> SourceError:
    what = ", ".join(
        f"{key} {value}" for key, value in (("config", hub.config), ("revision", hub.revision), ("part", part)) if value
    )
    reason = " ".join(str(error).split())[:300]
    return SourceError(
        f"cannot load {hub.name!r} ({what}) from the Hugging Face hub: {type(error).__name__}: {reason}. "
        f"Without a network, {LOCAL_HINT}"
    )


# Local files


def _open_local(given: Sequence[str], hub: Hub, all_files: bool) -> Source:
    wanted = dict(hub.splits) if hub.files is None else {split: split for split in hub.files}
    only = next(iter(wanted)) if len(wanted) == 1 else None
    found: list[tuple[Path, str | None]] = []
    for item in given:
        name, equals, rest = item.partition("=")
        split = name if equals and re.fullmatch(r"\w+", name) else None
        if split is not None and split not in wanted:
            raise SourceError(f"--source {item}: found the split {split!r}; expected one of {sorted(wanted)}")
        path = Path(rest if split else item)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            if len(given) > 1:
                raise SourceError(f"--source {item}: found a saved data set among other sources; expected it alone")
            return _open_saved(path, wanted, split or only)
        found += _list_files(path, split, wanted)
    taken = [(path, split) for path, split in found if split in wanted]
    if only and (all_files or not taken):
        taken = [(path, only) for path, split in found if all_files or split is None]
    if not taken:
        raise SourceError(
            f"{' '.join(given)}: found {len(found)} data files, none of which names a split in its path; expected "
            f"{' or '.join(wanted)} in the name of a file or folder, or --source SPLIT=PATH for each"
        )
    used = {path for path, _ in taken}
    notes = [f"not read: {path} (its path names no split that is wanted)" for path, _ in found if path not in used]
    files: dict[str, list[tuple[Path, str]]] = {}
    for path, split in taken:
        files.setdefault(str(split), []).append((path, str(path)))
    notes += [f"the source has no {split} split" for split in wanted if split not in files]
    splits = [split for split in wanted if split in files]
    described = [
        {"file": name, "sha256": sha256_of(path), "split": split} for split in splits for path, name in files[split]
    ]
    return Source(splits, {"kind": "local", "given": list(given), "files": described}, notes, _files=files)


def _list_files(path: Path, fixed: str | None, wanted: Mapping[str, str]) -> list[tuple[Path, str | None]]:
    """(path, the split it names) of the data files of a path, sorted by path."""
    if path.is_file():
        if not _format(path):
            raise SourceError(f"{path}: found a file of another kind; expected {', '.join(SUFFIXES)} (or .gz)")
        return [(path, fixed or _mark(Path(path.name), wanted))]
    if not path.is_dir():
        kind = "something that is no file" if path.exists() else "nothing"
        raise SourceError(f"{path}: found {kind} there; {LOCAL_HINT}, or a hub name OWNER/NAME")
    inside = sorted(file for file in path.rglob("*") if file.is_file() and _format(file))
    inside = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not inside:
        raise SourceError(f"{path}: found no data files in this folder; expected {', '.join(SUFFIXES)} (or .gz)")
    return [(file, fixed or _mark(file.relative_to(path), wanted)) for file in inside]


def _mark(path: Path, wanted: Mapping[str, str]) -> str | None:
    """The split that a path names in its file name, or else in its nearest folder; another one as ``!name``."""
    others = {"train", "test", "validation", "valid", "val", "dev", "eval"}
    for part in (path.name, *reversed(path.parent.parts)):
        words = set(re.split(r"[^a-z0-9]+", part.lower()))
        for split, theirs in wanted.items():
            if split.lower() in words or theirs.lower() in words:
                return split
        if words & others:
            return f"!{sorted(words & others)[0]}"
    return None


def _open_saved(path: Path, wanted: Mapping[str, str], only: str | None) -> Source:
    """A folder written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise SourceError(f"{path}: found a saved data set that cannot be read ({error})") from error
    parts = saved if isinstance(saved, datasets.DatasetDict) else {only: saved}
    tables = {split: parts.get(theirs, parts.get(split)) for split, theirs in wanted.items()}
    named = {split: (table, f"{path} [{split}]") for split, table in tables.items() if table is not None}
    if not named:
        raise SourceError(
            f"{path}: found a saved data set with the splits {sorted(map(str, parts))}; expected "
            f"{' or '.join(wanted.values())}, or --source SPLIT=PATH"
        )
    notes = [f"the source has no {split} split" for split in wanted if split not in named]
    return Source(list(named), {"kind": "saved", "given": [str(path)]}, notes, _tables=named)


def _format(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" and name != path.name) else None


def read_file(path: Path, name: str | None = None) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    """(row from 1, its columns or what is wrong with it) of a data file.

    Raises:
        SourceError: the file as a whole cannot be read.
    """
    name = name or str(path)
    readers = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    suffix = _format(path)
    if suffix is None:
        raise SourceError(f"{name}: found a file of another kind; expected {', '.join(SUFFIXES)} (or .gz)")
    try:
        yield from readers[suffix](path, name)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise SourceError(f"{name}: found a file that cannot be read as {suffix[1:]} ({reason})") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read_json(path: Path, name: str) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    """JSON lines, or one array of objects; which of them, the first character says and not the suffix."""
    with _open(path) as handle:
        start = handle.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        handle.seek(0)
        if start == b"[":
            try:
                values = json.loads(handle.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{name}: found no valid JSON array ({error})") from error
            for row, value in enumerate(values, 1):
                yield row, _object(value, f"{name}, row {row}")
            return
        for row, line in enumerate(handle, 1):
            if not line.strip():
                continue
            where = f"{name}, row {row}"
            try:
                value = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield row, RowError(where, None, f"no valid JSON ({error})", "one JSON object a line")
                continue
            yield row, _object(value, where)


def _object(value: Any, where: str) -> Mapping[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    return RowError(where, None, f"a JSON {type(value).__name__}", "a JSON object")


def _read_csv(path: Path, name: str) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(handle, strict=True)
        header = next(reader, [])
        for row, values in enumerate(reader, 1):
            if len(values) == len(header):
                yield row, dict(zip(header, values, strict=True))
            elif values:
                yield row, RowError(f"{name}, row {row}", None, f"{len(values)} values", f"{len(header)}")


def _read_parquet(path: Path, name: str) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    row = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            for fields in batch.to_pylist():
                row += 1
                yield row, fields


def sha256_of(path: Path) -> str:
    """Of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
