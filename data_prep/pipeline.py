"""From a source to verl's parquet files: the part that all data sets have in common.

A run reads everything, then writes everything: train.parquet and/or test.parquet and manifest.json, which appear
together (see data_prep.staging). The same source and options give the same bytes. Every record that was read is either
in the files or counted under a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.dataset import COMMON_FIELDS, OUTPUT_SPLITS, DataSet, Draft, Settings
from data_prep.progress import ProgressLine
from data_prep.prompts import ANSWER_LINE, BOXED
from data_prep.records import DataError, LeftOut, Record, RowError, SourceError
from data_prep.schema import arrow_schema, json_text, make_row, write_typed_parquet
from data_prep.sources import Source, sha256_of
from data_prep.staging import Staging

MAX_EXAMPLES = 5  # of a reason for leaving rows out, on screen and in the manifest
MANIFEST = "manifest.json"


@dataclass
class Accounts:
    """What became of every record and draft; ``left_out`` is reason -> (count, examples)."""

    read: Counter[str] = field(default_factory=Counter)
    used: int = 0
    made: int = 0
    written: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    records_left_out: int = 0
    drafts_left_out: int = 0

    def leave_out(self, reason: str, example: str, *, record: bool) -> None:
        """Count a record, or a draft made of one, under a reason."""
        count, examples = self.left_out.get(reason, (0, []))
        self.left_out[reason] = (count + 1, examples if len(examples) == MAX_EXAMPLES else [*examples, example])
        if record:
            self.records_left_out += 1
        else:
            self.drafts_left_out += 1

    def check(self) -> None:
        """Raise RuntimeError where the counts do not add up: a fault of the program."""
        read, written = sum(self.read.values()), sum(self.written.values())
        if read != self.used + self.records_left_out or self.made != written + self.drafts_left_out:
            raise RuntimeError(f"rows were lost without a reason: {self}")

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "records_read": dict(self.read),
            "rows_made": self.made,
            "rows_written": {split: self.written[split] for split in OUTPUT_SPLITS if self.written[split]},
            "left_out": [
                {"reason": reason, "count": count, "examples": examples}
                for reason, (count, examples) in sorted(self.left_out.items())
            ],
        }


@dataclass
class Prepared:
    """The rows of a run, not yet written."""

    dataset: DataSet
    rows: dict[str, list[dict[str, Any]]]
    accounts: Accounts
    manifest: dict[str, Any]
    notes: list[str]


def prepare(
    dataset: DataSet,
    source: Source,
    settings: Settings,
    *,
    skip_broken: bool = False,
    limit: int | None = None,
) -> Prepared:
    """Read a source and make the rows; writes nothing.

    Args:
        dataset: what to make.
        source: where from.
        settings: prompt, seed and the data set's own options.
        skip_broken: count broken rows and go on, instead of stopping at the first.
        limit: at most so many rows a split.

    Raises:
        RowError: a row is broken (unless ``skip_broken``).
        SourceError: a file cannot be read, or no row is left.
    """
    accounts = Accounts()
    with ProgressLine() as say:
        drafts = _read(dataset, source, settings, accounts, skip_broken, limit, say)
    if dataset.arrange is not None:
        count = len(drafts)
        drafts = dataset.arrange(drafts, settings)
        if len({id(draft) for draft in drafts}) != count:
            raise RuntimeError(f"{dataset.name}: arrange() must return every draft once")
    facts = dict(dataset.facts(drafts, settings)) if dataset.facts else {}
    notes = [*source.notes, *facts.pop("notes", ())]
    rows = _make_rows(dataset, drafts, settings, accounts, limit)
    accounts.check()
    if not any(rows.values()):
        reasons = "; ".join(f"{reason}: {count}" for reason, (count, _) in sorted(accounts.left_out.items()))
        read = sum(accounts.read.values())
        raise SourceError(f"{dataset.name}: no rows are left of {read} read ({reasons or 'nothing was read'})")
    manifest = {
        "data_set": dataset.name,
        "verifier": {"function": dataset.verifier, "options": _verifier_options(dataset, settings)},
        "source": source.description,
        "prompt": settings.prompt.as_json(),
        "options": {
            "on_error": "skip" if skip_broken else "fail",
            "limit": limit,
            "seed": settings.seed,
            **settings.options,
        },
        "counts": accounts.as_json(),
        "repeated_questions": _repeated(rows),
        **facts,
        "notes": notes,
        "pyarrow": pa.__version__,
    }
    return Prepared(dataset, rows, accounts, manifest, notes)


def _verifier_options(dataset: DataSet, settings: Settings) -> dict[str, str]:
    """Where the verifier of mathematics finds the answer: what the prompt asks for."""
    if not dataset.verifier.startswith("verl_ext.verifiers.math_answer:"):
        return {}
    places = {BOXED: "boxed", ANSWER_LINE: "answer_line"}
    return {"extract": places.get(settings.prompt.answer_style, "any")}


def _read(
    dataset: DataSet,
    source: Source,
    settings: Settings,
    accounts: Accounts,
    skip_broken: bool,
    limit: int | None,
    say: Callable[[str, int, int | None], None],
) -> list[Draft]:
    drafts: list[Draft] = []
    keys: dict[tuple[str, str], Draft] = {}
    for split in source.splits:
        kept = 0
        for item in source.records(split):
            accounts.read[split] += 1
            say(f"{dataset.name}: records read", accounts.read.total(), source.total)
            try:
                if isinstance(item, RowError):
                    raise item
                made = _convert(dataset, item, settings)
            except LeftOut as reason:
                accounts.leave_out(str(reason), item.where, record=True)
                continue
            except RowError as error:
                if not skip_broken:
                    raise
                accounts.leave_out(error.reason, str(error), record=True)
                continue
            accounts.used += 1
            for draft in made:
                if isinstance(draft, RowError):
                    if not skip_broken:
                        raise draft
                    accounts.made += 1
                    accounts.leave_out(draft.reason, str(draft), record=False)
                    continue
                draft.where, draft.split = item.where, draft.split or split
                accounts.made += 1
                first = keys.setdefault((draft.split, draft.key), draft) if draft.key is not None else draft
                if first is not draft:
                    same = first.ground_truth == draft.ground_truth
                    reason = "repeated question" if same else "repeated question with another answer"
                    accounts.leave_out(reason, f"{draft.where} (first: {first.where})", record=False)
                    continue
                drafts.append(draft)
                kept += not draft.left_out
            # Where rows are arranged afterwards, which ones come first is not known yet.
            if dataset.arrange is None and limit is not None and kept >= limit:
                break
    return drafts


def _convert(dataset: DataSet, record: Record, settings: Settings) -> list[Draft | RowError]:
    try:
        made = dataset.convert(record, settings)
    except RowError:
        raise
    except ValueError as error:  # from a helper that does not know the place
        raise RowError(record.where, None, f"{error}", "a row without this fault") from error
    return [made] if isinstance(made, Draft) else list(made)


def _make_rows(
    dataset: DataSet, drafts: list[Draft], settings: Settings, accounts: Accounts, limit: int | None
) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in OUTPUT_SPLITS}
    for draft in drafts:
        if draft.left_out:
            accounts.leave_out(draft.left_out, draft.where, record=False)
            continue
        if draft.split not in rows:
            raise RuntimeError(f"{draft.where}: found the split {draft.split!r}; expected one of {OUTPUT_SPLITS}")
        made = rows[draft.split]
        if limit is not None and len(made) >= limit:
            accounts.leave_out(f"beyond --limit {limit}", draft.where, record=False)
            continue
        try:
            row = make_row(
                data_source=dataset.name,
                prompt=draft.messages or settings.prompt.messages(draft.fields),
                ground_truth=draft.ground_truth,
                split=draft.split,
                index=len(made),
                ability=dataset.ability,
                problem=draft.fields.get("problem", ""),
                solution=draft.solution,
                demonstration=draft.demonstration,
                **draft.extra,
            )
        except ValueError as error:
            raise DataError(f"{draft.where}: {error}") from error
        made.append(row)
        accounts.written[draft.split] += 1
    return {split: made for split, made in rows.items() if made}


def _repeated(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """Questions that occur more than once: rows beyond the first in a split, and questions of test also in train."""
    ids = {split: [row["extra_info"]["question_id"] for row in made] for split, made in rows.items()}
    counts = {split: len(of_split) - len(set(of_split)) for split, of_split in ids.items()}
    return {**counts, "test_also_in_train": len(set(ids.get("train", ())) & set(ids.get("test", ())))}


def write(prepared: Mapping[Path, Prepared]) -> None:
    """Write the files of one or several folders; all are complete before the first appears, manifests come last.

    Raises:
        SourceError: a folder holds a parquet file of an earlier run that this one would not replace.
        OSError: a file cannot be written.
    """
    for folder, part in prepared.items():
        for split in OUTPUT_SPLITS:
            path = folder / f"{split}.parquet"
            if split not in part.rows and path.exists():
                raise SourceError(f"{path} is there, and this run has no {split} rows; remove it or give another --out")
    with Staging() as staging:
        manifests: dict[Path, dict[str, Any]] = {}
        for folder, part in prepared.items():
            schema = arrow_schema({**COMMON_FIELDS, **part.dataset.extra_fields})
            files = {}
            for split, rows in part.rows.items():
                path = folder / f"{split}.parquet"
                temporary = staging.add(path, partial(_write_rows, rows, schema, path))
                files[path.name] = {"rows": len(rows), "sha256": sha256_of(temporary)}
            manifests[folder / MANIFEST] = {**part.manifest, "files": files}
        for path, manifest in manifests.items():
            staging.add(path, partial(Path.write_text, data=json_text(manifest), encoding="utf-8"))
        # An old manifest never stands beside new files.
        for path in manifests:
            path.unlink(missing_ok=True)
        staging.publish()


def _write_rows(rows: list[dict[str, Any]], schema: pa.Schema, path: Path, temporary: Path) -> None:
    write_typed_parquet(rows, temporary, schema, str(path))
