"""What a collection for self-revision training leaves: traces, training rows and a manifest, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.schema import json_text
from data_prep.sources import sha256_of
from data_prep.staging import Staging
from recipe.srt_rows import ROW_FILES, Row
from recipe.srt_traces import Trace
from verl_ext.sample_store import MANIFEST

TRACES = "traces.parquet"
FORMAT = 1
TRACE_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("attempt_index", pa.int32()),
        ("revision_index", pa.int32()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("attempt", pa.string()),
        ("right", pa.bool_()),
        ("phrase", pa.string()),
        ("revision", pa.string()),
        ("cleaned", pa.bool_()),
    ]
)


def write_files(
    folder: Path, traces: Sequence[Trace] | None, rows: Mapping[str, Sequence[Row]], facts: Mapping[str, Any]
) -> list[Path]:
    """Writes ``traces.parquet``, the training rows and last ``manifest.json``; returns the files of rows, in order.

    All are complete before the first appears under its name. Files of an earlier call that this one does not write,
    such as those of other losses, are taken away: they would not be what the manifest says.

    Args:
        folder: made where it does not exist.
        traces: None: there are none to write (RFT).
        rows: name of ``ROW_FILES`` -> its rows, at least one.
        facts: for the manifest, which adds the files with their rows and their SHA-256.

    Raises:
        OSError: a file cannot be written.
    """
    from verl_ext.sft_rows import write_sft_rows

    with Staging() as staging:
        written = {}
        if traces is not None:
            written[TRACES] = staging.add(folder / TRACES, partial(write_traces, traces=traces))
        for name, content in rows.items():
            written[name] = staging.add(folder / name, partial(write_sft_rows, rows=content))
        described = {
            name: {"rows": pq.read_metadata(path).num_rows, "sha256": sha256_of(path)} for name, path in written.items()
        }
        manifest = {"format": FORMAT, **facts, "files": described, "pyarrow": pa.__version__}
        staging.add(folder / MANIFEST, partial(Path.write_text, data=json_text(manifest), encoding="utf-8"))
        staging.publish()
    for name in (TRACES, *ROW_FILES):
        if name not in written:
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in rows]


def write_traces(path: Path, traces: Sequence[Trace]) -> None:
    """The traces as parquet, in their order."""
    table = [
        {
            "prompt": [{"role": str(turn["role"]), "content": turn["content"]} for turn in trace.messages],
            **{name: getattr(trace, name) for name in TRACE_SCHEMA.names if name != "prompt"},
        }
        for trace in traces
    ]
    pq.write_table(pa.Table.from_pylist(table, schema=TRACE_SCHEMA), path)
