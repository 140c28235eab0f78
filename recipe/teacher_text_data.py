"""The right (or all whole) responses of a sample store, and the training data that carries them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.schema import json_text
from data_prep.sources import sha256_of
from data_prep.staging import Staging
from verl_ext.config import ConfigError
from verl_ext.sample_store import MANIFEST, StoreError, read_manifest, read_rows

FILE = "train.parquet"
FORMAT = 1
NOT_SAMPLED = "not_sampled"
# Why a sample gives no text, in the order in which it is looked at -> why a question has none, if that was the last of
# its samples to go.
FAULTS = {
    "truncated": "all_truncated",
    "verifier_error": "only_verifier_errors",
    "wrong": "no_right_sample",
    "blank": "only_blank_texts",
    "special_token": "only_special_tokens",
}
REASONS = (NOT_SAMPLED, *FAULTS.values())
REPEATED, SURPLUS = "repeated", "beyond_per_question"
LEFT_OUT = (*FAULTS, REPEATED, SURPLUS)
BATCH = 256  # rows at a time: eight long responses each are some ten megabytes
# What `datasets` noted about the columns of its own files; it would read the new field by the old note.
_STALE_METADATA = b"huggingface"


@dataclass(frozen=True)
class ChosenTexts:
    """The texts of the questions asked for, and what became of the rest.

    Attributes:
        texts: question id -> its texts, at least one, in the order of the samples.
        dropped: reason (all of ``REASONS``) -> ids of the questions without a text.
        samples: samples that were looked at.
        left_out: reason (all of ``LEFT_OUT``) -> samples that gave no text.
    """

    texts: dict[str, list[str]]
    dropped: dict[str, list[str]]
    samples: int
    left_out: dict[str, int]

    @property
    def count(self) -> int:
        """Texts in all."""
        return sum(map(len, self.texts.values()))


def choose_texts(
    folder: Path,
    questions: Sequence[str],
    *,
    sampled: Collection[str],
    samples: int,
    threshold: float,
    per_question: int | None,
    special_token: Callable[[str], str | None],
    only_right: bool = True,
) -> ChosenTexts:
    """The right texts of a store: whole, judged, with a score of at least the threshold, each once.

    PACED (arXiv 2603.11178) scores text of the teacher in its distillation track. PBSD (arXiv 2605.05040) compares fair
    samples of the teacher, right or wrong: without ``only_right`` the verdict has no say, and what was drawn more often
    is there more often. A question whose samples go for
    several reasons is counted under that of the sample that came furthest in ``FAULTS``.

    Args:
        folder: of a sample store whose rows :func:`verl_ext.pass_rate_store.read_pass_rates` accepts.
        questions: ids, in the order in which the result has them.
        sampled: the questions that count as sampled; a store may hold more than were asked for.
        samples: only samples with an index below this one.
        threshold: score from which a sample is right.
        per_question: keep the first so many texts; None: all.
        special_token: the special token that a text spells, None where there is none
            (:meth:`verl_ext.reference_text.SpecialTokens.first_in`).
        only_right: leave out wrong, unjudged and repeated texts.

    Raises:
        StoreError: there is no store, or a sample has no text; names the file, the sample and the key.
    """
    wanted = set(sampled)
    found: dict[str, dict[int, str]] = {}
    faults: dict[str, Counter[str]] = {}
    for where, row in _samples(folder):
        name = row["question_id"]
        if name not in wanted or row["sample"] >= samples:
            continue
        fault = _fault(row, threshold if only_right else None, special_token, where)
        if fault is None:
            found.setdefault(name, {})[row["sample"]] = row["text"]
        else:
            faults.setdefault(name, Counter())[fault] += 1
    left_out = Counter(dict.fromkeys(LEFT_OUT, 0))
    for counts in faults.values():
        left_out.update(counts)
    texts: dict[str, list[str]] = {}
    dropped: dict[str, list[str]] = {reason: [] for reason in REASONS}
    for name in questions:
        if name not in found:
            dropped[_reason(faults.get(name, ()))].append(name)
            continue
        in_order = [found[name][sample] for sample in sorted(found[name])]
        different = list(dict.fromkeys(in_order)) if only_right else in_order
        texts[name] = different[:per_question]
        left_out[REPEATED] += len(in_order) - len(different)
        left_out[SURPLUS] += len(different) - len(texts[name])
    looked_at = sum(map(len, found.values())) + sum(map(Counter.total, faults.values()))
    return ChosenTexts(texts, dropped, looked_at, dict(left_out))


def _samples(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    path = folder / f"samples-{read_manifest(folder)['key']}.jsonl"
    for row in read_rows(path):
        yield f"{path}: sample {row['sample']} of question {row['question_id']}", row


def _fault(
    row: Mapping[str, Any], threshold: float | None, special_token: Callable[[str], str | None], where: str
) -> str | None:
    """Why the sample gives no text; without a threshold its verdict is not looked at."""
    text = row.get("text")
    if not isinstance(text, str):
        raise StoreError(f"{where}: text is {text!r}; allowed: text")
    if row["truncated"]:
        return "truncated"
    if threshold is not None and (fault := _verdict_fault(row, threshold)) is not None:
        return fault
    if not text.strip():
        return "blank"
    return None if special_token(text) is None else "special_token"


def _verdict_fault(row: Mapping[str, Any], threshold: float) -> str | None:
    import torch

    from verl_ext.pass_rates import success_mask
    from verl_ext.verifiers.result import OK

    if row["status"] != OK:
        return "verifier_error"
    # float32 like the trainer's rewards, as the pass rates are counted.
    right = success_mask(torch.tensor([row["score"]], dtype=torch.float32), threshold=threshold).item()
    return None if right else "wrong"


def _reason(faults: Collection[str]) -> str:
    return next((reason for fault, reason in reversed(FAULTS.items()) if fault in faults), NOT_SAMPLED)


# ------------------------------------------------------------------------------------------------------------ the file


def check_sources(files: Sequence[str], key: str, folder: Path) -> pa.Schema:
    """The schema of the new file, before anything is drawn: that of the files and, in ``extra_info``, the new field.

    Raises:
        ConfigError: a file cannot be read as parquet, differs from the first one in its columns, has the field already,
            or would be overwritten; names the key, the file and what is allowed.
    """
    schemas = {}
    for file in files:
        try:
            schemas[file] = pq.read_schema(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.train_files: {file} cannot be read as a parquet file: {error}") from error
    first = schemas[files[0]]
    for file, schema in schemas.items():
        if Path(file).resolve() == (folder / FILE).resolve():
            raise ConfigError(f"text.out is {folder}; allowed: another folder than that of data.train_files, {file}")
        if not schema.equals(first):
            raise ConfigError(f"data.train_files: {file} has the columns {_names(schema)}, {files[0]} {_names(first)}")
        fields = schema.field("extra_info").type
        if not pa.types.is_struct(fields):
            raise ConfigError(f"data.train_files: {file}: extra_info is {fields}; allowed: a struct")
        if fields.get_field_index(key) >= 0:
            raise ConfigError(f"text.key is {key!r}; allowed: a name that extra_info of {file} does not have yet")
    metadata = {name: value for name, value in (first.metadata or {}).items() if name != _STALE_METADATA}
    place = first.get_field_index("extra_info")
    return first.set(place, _with_texts(first.field(place), key)).with_metadata(metadata or None)


def _names(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _with_texts(extra_info: pa.Field, key: str) -> pa.Field:
    return extra_info.with_type(pa.struct([*extra_info.type, pa.field(key, pa.list_(pa.string()))]))


def write_data(
    folder: Path, files: Sequence[str], schema: pa.Schema, texts: Mapping[str, list[str]], facts: Mapping[str, Any]
) -> None:
    """Writes ``train.parquet``, the rows of the files whose question has texts, and last ``manifest.json``.

    Both are complete before the first appears under its name; what the folder holds beside them stays.

    Args:
        folder: made where it does not exist.
        files: the training data; see :func:`check_sources`.
        schema: of the new file; the last field of ``extra_info`` is that of the texts.
        texts: question id -> its texts.
        facts: for the manifest, which adds the files, their rows and their SHA-256.

    Raises:
        OSError: a file cannot be written.
    """
    with Staging() as staging:
        data = staging.add(folder / FILE, partial(_write_rows, files, schema, texts))
        manifest = {
            "format": FORMAT,
            **facts,
            "sources": [{"file": file, **_described(Path(file))} for file in files],
            "files": {FILE: _described(data)},
            "pyarrow": pa.__version__,
        }
        staging.add(folder / MANIFEST, partial(Path.write_text, data=json_text(manifest), encoding="utf-8"))
        staging.publish()


def _described(path: Path) -> dict[str, Any]:
    return {"rows": pq.read_metadata(path).num_rows, "sha256": sha256_of(path)}


def _write_rows(files: Sequence[str], schema: pa.Schema, texts: Mapping[str, list[str]], temporary: Path) -> None:
    place = schema.get_field_index("extra_info")
    with pq.ParquetWriter(temporary, schema) as writer:
        for file in files:
            with pq.ParquetFile(file) as source:
                for batch in source.iter_batches(batch_size=BATCH):
                    ids = [str(name) for name in batch.column(place).field("question_id").to_pylist()]
                    batch = batch.filter(pa.array([name in texts for name in ids]))
                    if batch.num_rows:
                        of_rows = pa.array([texts[name] for name in ids if name in texts], pa.list_(pa.string()))
                        columns = list(batch.columns)
                        columns[place] = pa.StructArray.from_arrays(
                            [*columns[place].flatten(), of_rows], fields=list(schema.field(place).type)
                        )
                        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
