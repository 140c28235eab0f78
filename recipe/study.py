"""Study: `python -m recipe.study conf/study/methods.yaml` runs a declared grid and writes one row per finished run."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.cluster import needed, prepare_environment, ray_cluster
from recipe.compose import ROOT, compose_config
from recipe.console_format import format_seconds
from recipe.environment import commit, machine, versions
from recipe.output_folder import unused_folder
from recipe.study_chart import study_svg
from recipe.study_conditions import row_settings
from recipe.study_file import KEYS, Study, StudyRun, read_study
from recipe.study_index import index_text
from recipe.study_page import write_page
from recipe.study_question import QUESTION_KEYS
from recipe.study_rows import (
    cost_lines,
    expected_seconds,
    keep_run,
    read_rows,
    row_path,
    table,
)
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError

Run = Callable[[DictConfig], Mapping[str, Any]]

DESCRIPTION = """Run a declared grid of trainings on the real stack, in one Ray cluster, and write one row (JSON) per
finished run. Runs that have a row are skipped, so an interrupted study goes on with the same command; a run that fails
does not stop the others. The cost is printed before anything starts."""
EPILOG = "\n".join(
    [
        "Keys of the study file:",
        *(f"  {key:<17} {text}" for key, text in KEYS.items()),
        "Keys of a question:",
        *(f"  {key:<17} {text}" for key, text in QUESTION_KEYS.items()),
    ]
)


@dataclass
class Outcome:
    """What happened to the runs of a study; ``failed`` holds run id, log and the error in one line."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, Path, str]] = field(default_factory=list)


def configurations(study: Study, outputs: Path, *, quiet: bool = False) -> dict[str, DictConfig]:
    """Every run's checked configuration, by run id. Raises ConfigError naming the run: nothing has been started yet."""
    configs: dict[str, DictConfig] = {}
    for run in study.own_runs:
        overrides = [*run.overrides, f"run.seed={run.seed}"] + (["run.quiet=true"] if quiet else [])
        try:
            config = compose_config(overrides)
        except ConfigError as error:
            raise ConfigError(f"run {run.run_id}: {error}") from error
        with open_dict(config):
            config.run.output_dir = str(unused_folder(outputs / study.name / run.run_id))
        configs[run.run_id] = config
    platforms = {config.run.platform for config in configs.values()}
    if len(platforms) > 1:
        raise ConfigError(f"the runs ask for several platforms ({platforms}); one Ray cluster has one: use two studies")
    return configs


def run_study(
    study: Study,
    configs: Mapping[str, DictConfig],
    results: Path,
    run_one: Run,
    *,
    where: Mapping[str, Any] | None = None,
    settings: Callable[[DictConfig], Mapping[str, Any]] | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Runs what has no row yet, one run after the other; ``run_one`` trains by a configuration.

    Rows of other studies are not made here. A row keeps what ``settings`` says of its configuration. A
    KeyboardInterrupt ends the study; rows of finished runs stay.
    """
    outcome = Outcome()
    rows = read_rows(results, study)
    for run in study.own_runs:
        if run.run_id in rows:
            outcome.skipped.append(run.run_id)
            continue
        left = [one for one in study.own_runs if one.run_id not in rows and one.run_id not in _failed_ids(outcome)]
        say(f"run {run.run_id} ({len(left)} left{_time_left(left, rows)})")
        config = configs[run.run_id]
        folder = Path(config.run.output_dir)
        started = time.perf_counter()
        try:
            kept = settings(config) if settings else None
            summary = run_one(config)
            seconds = time.perf_counter() - started
            row = keep_run(row_path(results, study, run), run, summary, folder, seconds, where or {}, kept)
        except Exception as error:
            outcome.failed.append((run.run_id, folder / "run.log", _in_one_line(error)))
            say(f"run {run.run_id} failed after {format_seconds(time.perf_counter() - started)}; going on")
            continue
        rows[run.run_id] = row
        outcome.done.append(run.run_id)
    return outcome


def _failed_ids(outcome: Outcome) -> set[str]:
    return {run_id for run_id, _, _ in outcome.failed}


def _time_left(left: Sequence[StudyRun], rows: Mapping[str, Mapping[str, Any]]) -> str:
    seconds = [expected_seconds(run, rows) for run in left]
    if None in seconds:
        return ""
    return f", about {format_seconds(sum(seconds))}"


def _in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A remote error's message is a whole traceback; what happened stands in its last line.
    remote = "Traceback" in str(error) or "ray::" in str(error)
    text = (lines[-1] if remote else lines[0]) if lines else ""
    return f"{type(error).__name__}: {text}"[:300]


@contextlib.contextmanager
def cluster(configs: Mapping[str, DictConfig]) -> Iterator[None]:
    """One Ray cluster that is large enough for the largest run."""
    largest = max(configs.values(), key=lambda config: (needed(config)["GPU"], needed(config)["CPU"]))
    largest = OmegaConf.create(OmegaConf.to_container(largest, resolve=True))
    with open_dict(largest):
        if largest.run.ray_num_cpus is None:
            largest.run.ray_num_cpus = int(max(needed(config)["CPU"] for config in configs.values())) + 2
    with ray_cluster(largest):
        yield


def _run_all(study: Study, configs: Mapping[str, DictConfig], results: Path) -> Outcome:
    from recipe import train

    prepare_environment(next(iter(configs.values())).run.platform)
    where = {"versions": versions(), "machine": machine(), "commit": commit(ROOT)}
    with cluster(configs):
        return run_study(study, configs, results, train.run, where=where, settings=row_settings)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m recipe.study",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="the study, a YAML file such as conf/study/methods.yaml"
    )
    made.add_argument("--dry-run", action="store_true", help="print the grid and its cost, run nothing")
    made.add_argument("--table", action="store_true", help="print a markdown table of the rows there are, run nothing")
    made.add_argument("--plot", type=Path, metavar="SVG", help="draw the rows there are into this file, run nothing")
    made.add_argument("--page", type=Path, metavar="MD", help="write the results page with its pictures, run nothing")
    made.add_argument(
        "--index",
        type=Path,
        metavar="MD",
        help="write the list of all studies beside FILE or in conf/study, run nothing",
    )
    made.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of the rows")
    made.add_argument("--outputs", type=Path, default=Path("outputs") / "study", help="folder of the runs' own files")
    made.add_argument("--quiet", action="store_true", help="no line per step")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code: 1 where a run failed, 2 where the study cannot be run at all."""
    asked = parser()
    options = asked.parse_args(arguments)
    if options.file is None and options.index is None:
        asked.error("the following arguments are required: FILE (or --index MD)")
    started = time.perf_counter()
    try:
        if options.index is not None:
            folder = ROOT / "conf" / "study" if options.file is None else options.file.parent
            write_atomically(options.index, index_text(folder, options.results, options.index))
            print(json.dumps({"written": [str(options.index)]}))
            return 0
        study = read_study(options.file)
        rows = read_rows(options.results, study)
        if options.table:
            print(table(study, rows))
            return 0
        if options.plot is not None:
            write_atomically(options.plot, study_svg(study, rows))
            return 0
        if options.page is not None:
            if old := sum("settings" not in row for row in rows.values()):
                print(f"composing the command lines of {old} rows that do not hold their settings", file=sys.stderr)
            written = write_page(study, rows, options.file, options.results, options.page)
            print(json.dumps({"study": study.name, "rows": len(rows), "written": [str(path) for path in written]}))
            return 0
        configs = configurations(study, options.outputs.absolute(), quiet=options.quiet)
        print("\n".join(cost_lines(study, rows)), flush=True)
        if options.dry_run:
            return 0
        missing = any(run.run_id not in rows for run in study.own_runs)
        nothing_to_do = Outcome(skipped=[run.run_id for run in study.own_runs])
        outcome = _run_all(study, configs, options.results) if missing else nothing_to_do
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; rows of finished runs are kept, the same command goes on", file=sys.stderr)
        return 130
    if outcome.done:
        print(table(study, read_rows(options.results, study)))
    for run_id, log, error in outcome.failed:
        print(f"failed: {run_id}: {error}; log: {log}", file=sys.stderr)
    summary = {
        "study": study.name,
        "runs": len(study.own_runs),
        "done": len(outcome.done),
        "skipped": len(outcome.skipped),
        "failed": len(outcome.failed),
        "seconds": round(time.perf_counter() - started, 1),
        "results": str(options.results / study.name),
    }
    print(json.dumps(summary), flush=True)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
