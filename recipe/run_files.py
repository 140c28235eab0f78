"""The files of one training run: resolved config, metrics, sampled completions, TensorBoard scalars, summary.

``metrics.jsonl`` is the record that everything else is made from (console, report, studies), so it is strict JSON, one
flat object a line, and each line is one write: a killed run leaves at most one torn line, at the end.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from verl_ext.atomic import write_atomically
from verl_ext.redaction import redacted

if TYPE_CHECKING:
    import pandas


CHANGES_FILE = "changes.json"


class RunFileError(ValueError):
    """A file of the run is missing or cannot be read; the message names the file and, where there is one, the line."""


def to_plain(value: Any, where: str = "value") -> Any:
    """Turn numpy and torch scalars, arrays, paths, enums, dataclasses and OmegaConf nodes into plain JSON types.

    A float that is not finite becomes None, because JSON has no word for it. An object without a faithful JSON form
    raises TypeError with the key it was found under: writing its ``repr`` would hide the mistake until much later.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return to_plain(value.value, where)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if type(value).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        return to_plain(OmegaConf.to_container(value, resolve=True), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays, without importing either
        return to_plain(value.tolist(), where)
    raise TypeError(f"{where}: cannot be written as JSON, it is a {type(value).__module__}.{type(value).__qualname__}")


def json_line(record: Mapping[str, Any], where: str = "record") -> str:
    """One strict JSON object on one line, without the newline."""
    return json.dumps(to_plain(record, where), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))


def as_number(value: Any) -> float | None:
    """The value as a finite float, or None where it is missing, not finite or not a number."""
    try:
        plain = to_plain(value)
    except TypeError:
        return None
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        return None
    try:
        return float(plain)
    except OverflowError:
        return None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file. A torn last line is left out; anything else raises RunFileError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RunFileError(f"{path}: no such file") from None
    except OSError as error:
        raise RunFileError(f"{path}: cannot be read ({error.strerror})") from None
    lines = raw.split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            # Only the very last line, without its newline, can be the trace of a killed writer.
            if number == len(lines):
                break
            raise RunFileError(f"{path}, line {number}: not valid JSON ({error}); found: {_excerpt(line)}") from None
        if not isinstance(record, dict):
            raise RunFileError(f"{path}, line {number}: expected a JSON object, found: {_excerpt(line)}")
        records.append(record)
    return records


def read_json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; RunFileError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise RunFileError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_metric_records(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run in the order of their steps; of several lines for one step the last one counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(read_json_lines(path), start=1):
        step = record.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise RunFileError(f'{path}, object {number}: key "step" must be a whole number, found {step!r}')
        by_step[step] = record
    return [by_step[step] for step in sorted(by_step)]


def _excerpt(line: bytes) -> str:
    return repr(line[:80].decode("utf-8", errors="replace")) + (" …" if len(line) > 80 else "")


class RunFiles:
    """Writes and reads the files in a run's output folder. One writer a run: the driver process."""

    def __init__(self, output_dir: str | os.PathLike[str], *, tensorboard: bool = True) -> None:
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.config_path = self.output_dir / "config.yaml"
        self.metrics_path = self.output_dir / "metrics.jsonl"
        self.completions_path = self.output_dir / "completions.jsonl"
        self.validation_path = self.output_dir / "validation.jsonl"
        self.summary_path = self.output_dir / "summary.json"
        self.pending_path = self.output_dir / "pending_row.json"
        self.report_path = self.output_dir / "report.html"
        self.log_path = self.output_dir / "run.log"
        self.tensorboard_dir = self.output_dir / "tensorboard"
        self._tensorboard_wanted = tensorboard
        self._writer: Any = None
        self._purge_step: int | None = None

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- writing ------------------------------------------------------------------------------------------------------

    def write_config(self, config: Any) -> Path:
        """Write the resolved configuration (a mapping, dataclass or OmegaConf node) as YAML, without its secrets."""
        plain = redacted(to_plain(config, "config"))
        write_atomically(self.config_path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120))
        return self.config_path

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Keep the run's final summary, so that a report made later shows the same numbers."""
        write_atomically(self.summary_path, json_line(summary, "summary") + "\n")
        return self.summary_path

    def write_changes(self, changes: Mapping[str, Any]) -> Path:
        """Write what the run changed against its presets (:func:`recipe.preset_changes.preset_changes`)."""
        path = self.output_dir / CHANGES_FILE
        write_atomically(path, json_line(changes, "changes") + "\n")
        return path

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append one step's metrics, to metrics.jsonl and to TensorBoard; returns the record as it was written."""
        record = {"step": int(step), **{key: value for key, value in metrics.items() if key != "step"}}
        plain = to_plain(record, "metrics")
        nested = [key for key, value in plain.items() if isinstance(value, dict)]
        if nested:
            raise TypeError(f"metrics must be flat; these are mappings: {', '.join(nested)}")
        _append_lines(self.metrics_path, [plain])
        self._write_scalars(plain)
        return plain

    def write_pending(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep the row of a step whose checkpoint is about to be written, in case the run ends before the row is."""
        write_atomically(self.pending_path, json_line({**metrics, "step": step}, "metrics") + "\n")

    def recover_pending(self, step: int) -> bool:
        """Append the kept row where it is that of ``step`` and metrics.jsonl lacks it; returns whether it did."""
        if not self.pending_path.exists() or self.last_step() == step:
            return False
        records = read_json_lines(self.pending_path)
        if not records or records[0].get("step") != step:
            return False
        self.append_metrics(step, records[0])
        return True

    def complete_metrics(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Add values to the row of a step that is written already (validation made up for); returns the whole row."""
        plain = to_plain(metrics, "metrics")
        records = self.read_metrics()
        row = next(record for record in records if record["step"] == step)
        row |= {key: value for key, value in plain.items() if key != "step"}
        write_atomically(self.metrics_path, "".join(json_line(record) + "\n" for record in records))
        self._write_scalars(plain | {"step": step})
        return row

    def append_completions(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Append sampled completions, one object each; returns how many were written."""
        plain = [to_plain(row, f"completion {index}") for index, row in enumerate(rows)]
        _append_lines(self.completions_path, plain)
        return len(plain)

    def append_validation(self, step: int, counts: Mapping[str, Any]) -> None:
        """Append the right answers by question of one validation (``verl_ext.validation_items.item_counts``)."""
        _append_lines(self.validation_path, [to_plain({"step": int(step), **counts}, "validation")])

    def append_non_finite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows of an optimiser step that was skipped because loss or gradient was not finite."""
        plain = [to_plain(row, f"row {index}") for index, row in enumerate(rows)]
        _append_lines(self.output_dir / "non_finite.jsonl", plain)

    def truncate_to_step(self, step: int) -> int:
        """Forget everything after ``step``: what a run that resumes from this step's checkpoint will do again.

        Returns how many metric lines were dropped. TensorBoard purges the same steps when it is next written to.
        """
        dropped = _keep_lines(self.metrics_path, lambda record: record.get("step", 0) <= step)
        for path in (self.completions_path, self.validation_path):
            _keep_lines(path, lambda record: record.get("step", 0) <= step)
        self.close()
        self._purge_step = step + 1
        return dropped

    def close(self) -> None:
        """Close the TensorBoard writer; appending again opens a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metric records in the order of steps; empty where none has been written yet."""
        return read_metric_records(self.metrics_path) if self.metrics_path.exists() else []

    def read_completions(self) -> list[dict[str, Any]]:
        """The sampled completions; empty where none has been written yet."""
        return read_json_lines(self.completions_path) if self.completions_path.exists() else []

    def read_validations(self) -> list[dict[str, Any]]:
        """Right answers by question, in the order of steps; empty where no validation has been written.

        A run that is resumed validates again: of several lines for one step the last one counts, as for the metrics.
        """
        return read_metric_records(self.validation_path) if self.validation_path.exists() else []

    def last_step(self) -> int | None:
        """The last step with metrics, or None."""
        records = self.read_metrics()
        return records[-1]["step"] if records else None

    def metrics_frame(self) -> pandas.DataFrame:
        """The metrics as a DataFrame indexed by step; values that were not measured are NaN."""
        import pandas

        records = self.read_metrics()
        if not records:
            return pandas.DataFrame(index=pandas.Index([], name="step"))
        frame = pandas.DataFrame.from_records(records).set_index("step")
        for key in frame.columns:
            # A column of numbers and nulls comes out as objects; lists such as the histogram stay as they are.
            if not frame[key].map(lambda value: isinstance(value, list | str)).any():
                frame[key] = pandas.to_numeric(frame[key])
        return frame

    # --- TensorBoard --------------------------------------------------------------------------------------------------

    def _write_scalars(self, record: Mapping[str, Any]) -> None:
        if not self._tensorboard_wanted:
            return
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                warnings.warn(f"no TensorBoard files: {error} (metrics.jsonl has the same numbers)", stacklevel=3)
                self._tensorboard_wanted = False
                return
            self._writer = SummaryWriter(str(self.tensorboard_dir), purge_step=self._purge_step)
            self._purge_step = None
        for key, value in record.items():
            number = as_number(value)
            if key != "step" and number is not None:
                self._writer.add_scalar(key, number, record["step"])
        self._writer.flush()


def _append_lines(path: Path, records: list[Any]) -> None:
    """Append records with one write. A torn line that a killed run left at the end is cut off first."""
    if not records:
        return
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    data = text.encode("utf-8", errors="replace")
    try:
        with open(path, "a+b", buffering=0) as file:
            _cut_torn_end(file)
            view = memoryview(data)
            while view:  # a raw write may be partial on a full or remote disk
                view = view[file.write(view) :]
    except OSError as error:
        raise RunFileError(
            f"{path} cannot be written: {error.strerror}; free some space there. The last checkpoint is whole, and the "
            "same command goes on from it"
        ) from error


def _cut_torn_end(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    whole = file.read()
    last = whole[whole.rfind(b"\n") + 1 :]
    try:
        json.loads(last)
    except ValueError:
        file.truncate(size - len(last))
    else:
        file.write(b"\n")  # the object is complete and only its newline is missing: keep it
    file.seek(0, os.SEEK_END)


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    if not path.exists():
        return 0
    records = read_json_lines(path)
    kept = [record for record in records if keep(record)]
    write_atomically(path, "".join(json_line(record) + "\n" for record in kept))
    return len(records) - len(kept)
