"""What a comparison reads of a run: from its output folder, or from the row that a study kept of it.

A folder has every step's metrics and the whole configuration; a row has the validations, the last step's metrics and
the overrides of the command line. Rows are written for finished runs only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipe.report_content import lookup
from recipe.run_files import RunFileError, as_number, read_json_object, read_metric_records
from recipe.study_items import read_question_ids, unpack_items
from verl_ext.config import ConfigError

Record = Mapping[str, Any]

# Settings that change nothing a run computes.
NOT_COMPARED = (
    "run.output_dir", "run.overrides", "run.quiet", "run.log_tail", "run.ray_num_cpus", "run.save_every",
    "run.keep_checkpoints", "run.keep_best", "run.verify_checkpoints", "trainer.save_freq", "trainer.logger",
    "trainer.project_name", "trainer.experiment_name", "trainer.default_local_dir",
)  # fmt: skip
# Everything that is drawn by chance has its own key and takes it from run.seed.
SEED_KEYS = ("seed", "data_loader_seed")
# From where the configuration names this file, the project's folder on the run's machine is known.
AGENT_LOOPS_KEY, AGENT_LOOPS = "actor_rollout_ref.rollout.agent.agent_loop_config_path", "conf/agent_loops.yaml"
VALIDATION_DATA = ("data.val_files", "data")


@dataclass(frozen=True)
class Validated:
    """One validation, question by question.

    Attributes:
        step: of the run.
        samples: k, answers asked of every question.
        items: [P] names of the questions.
        accuracy_P: [P] share of right answers; NaN where the verifier could judge none.
    """

    step: int
    samples: int
    items: tuple[str, ...]
    accuracy_P: tuple[float, ...]


@dataclass(frozen=True)
class ComparedRun:
    """A run, as far as a comparison needs it.

    Attributes:
        name: its folder's name, or the id of its row.
        where: path of the folder or row.
        whole: whether every step's metrics and the whole configuration are known (a folder), or a row's only.
        method: of its configuration.
        label: what its group is called where nobody says otherwise: a row's entry, else the method.
        seed: None where it was not recorded.
        settings: dotted key to value as text, without the seed and what changes nothing.
        environment: versions, machine and commit, as far as they were recorded.
        records: metrics in the order of steps.
        unfinished: "" or how far it came, in words.
        last: the last validation by question, or None.
    """

    name: str
    where: Path
    whole: bool
    method: str
    label: str
    seed: int | None
    settings: Mapping[str, str]
    environment: Mapping[str, str]
    records: Sequence[Record]
    unfinished: str
    last: Validated | None

    @property
    def step(self) -> int:
        """The last one with metrics."""
        return int(self.records[-1]["step"])

    @property
    def validation_data(self) -> tuple[str, str] | None:
        """The key that says which questions were asked, and its value; None where the configuration does not say."""
        return next(((key, self.settings[key]) for key in VALIDATION_DATA if key in self.settings), None)


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """The runs of output folders, rows of studies (JSON files) and folders of rows, in this order.

    Raises:
        RunFileError: a path is none of these, or a file cannot be read; the message names it.
        ConfigError: the same run is given twice.
    """
    runs: list[ComparedRun] = []
    for path in paths:
        if path.is_file():
            runs.append(read_row(path))
        elif (path / "metrics.jsonl").exists():
            runs.append(read_folder(path))
        elif rows := sorted(path.glob("*.json")):
            runs += [read_row(row) for row in rows]
        else:
            raise RunFileError(
                f"{path}: no run to compare; expected the output folder of a run (it holds metrics.jsonl after the "
                "first step), a row of a study (.json) or a folder of rows"
            )
    seen: set[Path] = set()
    for run in runs:
        if run.where.resolve() in seen:
            raise ConfigError(f"{run.where} is given twice")
        seen.add(run.where.resolve())
    return runs


def read_folder(folder: Path) -> ComparedRun:
    """A run by its output folder. Raises RunFileError where a file is missing or cannot be read."""
    records = read_metric_records(folder / "metrics.jsonl")
    if not records:
        raise RunFileError(f"{folder / 'metrics.jsonl'}: no metrics yet; the first line comes after the first step")
    config = _read_config(folder / "config.yaml")
    summary_path = folder / "summary.json"
    summary = read_json_object(summary_path) if summary_path.exists() else None
    # Two checkouts hold the same files in different places.
    project = str(lookup(config, AGENT_LOOPS_KEY) or "").removesuffix(AGENT_LOOPS)
    places = [(str(lookup(config, "run.output_dir") or folder), "(output folder)"), (project, "(project)/")]
    settings = flat(config)
    for place, name in places:
        if place.startswith("/"):
            settings = {key: text.replace(place, name) for key, text in settings.items()}
    method = str(lookup(config, "distill.method") or (summary or {}).get("method") or "run")
    seed = lookup(config, "run.seed")
    return ComparedRun(
        name=folder.resolve().name,
        where=folder,
        whole=True,
        method=method,
        label=method,
        seed=None if seed is None else int(seed),
        settings={key: text for key, text in settings.items() if _compared(key)},
        environment={},
        records=records,
        unfinished=_unfinished(config, summary, records),
        last=_last_validation(folder / "validation.jsonl", records),
    )


def read_row(path: Path) -> ComparedRun:
    """A run by its row. Raises RunFileError where the file is no row of a study."""
    row = read_json_object(path)
    try:
        validations = {int(step): metrics for step, metrics in row["curve"].items()}
        records = [
            {"step": step, **{f"val/{key}": value for key, value in metrics.items()}}
            for step, metrics in sorted(validations.items())
        ]
        final = dict(row["final"])
        last_step = int(final.get("step", max(validations, default=0)))
        if records and records[-1]["step"] == last_step:
            records[-1] = {**final, **records[-1]}
        else:
            # ``final`` repeats the last validation, whose own step may be an earlier one.
            own = {key: value for key, value in final.items() if not key.startswith("val/")}
            records.append({**own, "step": last_step})
        settings = dict(_override(item) for item in row["overrides"])
        label, seed, run_id = str(row["entry"]), int(row["seed"]), str(row["run_id"])
        method = str(row.get("method") or label)
        environment = flat({key: row[key] for key in ("versions", "machine", "commit") if row.get(key)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFileError(f"{path}: not the row of a study's run ({type(error).__name__}: {error})") from None
    return ComparedRun(
        name=run_id,
        where=path,
        whole=False,
        method=method,
        label=label,
        seed=seed,
        settings={key: text for key, text in settings.items() if _compared(key)},
        environment=environment,
        records=records,
        unfinished="",
        last=_row_items(path, row, max(validations, default=None)),
    )


def flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys and values as text; a list is one value."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found.update({f"{key}.{inner}": text for inner, text in flat(value).items()})
        else:
            found[str(key)] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return found


def _compared(key: str) -> bool:
    return key not in NOT_COMPARED and key.rsplit(".", 1)[-1] not in SEED_KEYS


def _override(item: str) -> tuple[str, str]:
    key, _, value = item.partition("=")
    return key.lstrip("+"), "(removed)" if key.startswith("~") else value


def _unfinished(config: Mapping[str, Any], summary: Mapping[str, Any] | None, records: Sequence[Record]) -> str:
    # The stages of a chain count models, not steps.
    planned = None if lookup(config, "chain.stages") else as_number(lookup(config, "run.steps"))
    reached = f"step {records[-1]['step']}" + ("" if planned is None else f" of {planned:.0f}")
    # A run that was resumed for more steps has the summary of its first part.
    if summary is None or (planned is not None and records[-1]["step"] < planned):
        return f"unfinished, at {reached}"
    return ""


def _last_validation(path: Path, records: Sequence[Record]) -> Validated | None:
    if not path.exists() or not (found := read_metric_records(path)):
        return None
    one = found[-1]
    try:
        shares = [right / judged if judged else float("nan") for right, judged in _pairs(one["right"], one["judged"])]
        return Validated(int(one["step"]), int(one["samples"]), tuple(map(str, one["items"])), tuple(shares))
    except (KeyError, TypeError, ValueError) as error:
        raise RunFileError(f"{path}, step {one['step']}: not counts by question ({error})") from None


def _pairs(right: Sequence[float], judged: Sequence[float]) -> zip[tuple[float, float]]:
    return zip(right, judged, strict=True)


def _row_items(path: Path, row: Mapping[str, Any], step: int | None) -> Validated | None:
    found = None if step is None else unpack_items(row, step)
    if found is None:
        return None
    names = read_question_ids(path.parent, found.questions)
    # Without the file of names, equal digests are still the same questions in the same order.
    items = names or [f"{found.questions}, question {index}" for index in range(len(found.mean_P))]
    return Validated(int(step), found.samples, tuple(items), found.mean_P)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFileError(f"{path}: no such file; expected the output folder of a run") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFileError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, Mapping):
        raise RunFileError(f"{path}: expected a mapping, found {type(found).__name__}")
    return found
