"""One self-contained HTML page about a training run: ``python -m recipe.report RUN_DIR``.

The page is made from the files in the run's folder only, so it can be made again at any time, even during the run.
It loads nothing from anywhere: styles, drawings and its few lines of script are inside.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from recipe import report_content
from recipe.alarms import alarms, check_run
from recipe.pages import page_environment
from recipe.report_changes import changes_view
from recipe.report_completions import completions_view, shortened
from recipe.report_curves import chart_groups
from recipe.run_files import (
    CHANGES_FILE,
    RunFileError,
    read_json_lines,
    read_json_object,
    read_metric_records,
)
from verl_ext.atomic import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.j2")
TABLE_SCRIPT = Path(__file__).with_name("report_table.js")
MAX_CONFIG = 200_000  # characters
MAX_VALUE = 300
COLUMNS = (
    ("step", "step", "trainer step"),
    ("reward", "reward", "what the verifier gave"),
    ("p̂", "rate", "share of the question's rollouts that succeed"),
    ("weight", "weight", "weight of the question in the loss"),
    ("nats", "divergence", "divergence between student and teacher, mean over the response's tokens"),
    ("tokens", "tokens", "length of the response, where it was recorded token by token"),
    ("demo", "demo", "whether the teacher saw a demonstration"),
)

# Shows the hovered step's numbers above the chart; without script they are still there as the browser's own hover text.
SCRIPT = """
document.querySelectorAll('.card').forEach(function (card) {
  var out = card.querySelector('.readout');
  if (!out) return;
  card.addEventListener('mouseover', function (event) {
    var mark = event.target.closest('.hit, .cell');
    out.textContent = mark ? mark.querySelector('title').textContent : '';
  });
  card.addEventListener('mouseleave', function () { out.textContent = ''; });
});
"""


def build_report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run and return its path: ``out``, or ``report.html`` in the run's folder.

    Raises RunFileError where there are no metrics, or a file cannot be read; it names the file and the line.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise RunFileError(f"{folder}: no such folder; expected the output folder of a training run")
    metrics_path = folder / "metrics.jsonl"
    if not metrics_path.exists():
        raise RunFileError(f"{metrics_path}: no such file; expected the output folder of a training run")
    records = read_metric_records(metrics_path)
    if not records:
        raise RunFileError(f"{metrics_path}: no metrics yet; the first line is written after the first step")
    completions_path = folder / "completions.jsonl"
    completions = read_json_lines(completions_path) if completions_path.exists() else []
    config = _read_config(folder / "config.yaml")
    summary_path = folder / "summary.json"
    summary = read_json_object(summary_path) if summary_path.exists() else {}

    target = Path(out) if out is not None else folder / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    page = render(records, completions, config, summary, folder.resolve().name, changes_view(folder / CHANGES_FILE))
    write_atomically(target, page)
    return target


def render(
    records: Sequence[Mapping[str, Any]],
    completions: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None,
    summary: Mapping[str, Any],
    run_name: str,
    changes: Mapping[str, Any],
) -> str:
    """The page as text; ``changes`` is of :func:`recipe.report_changes.changes_view`.

    All texts of the run are escaped: a model's output is not to be trusted with a browser.
    """
    environment = page_environment()
    script = SCRIPT + TABLE_SCRIPT.read_text(encoding="utf-8")
    facts = report_content.describe(config or {}, summary, records)
    config_text = "" if config is None else yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110)
    checks = check_run(records, completions, config)
    return environment.get_template(TEMPLATE.name).render(
        run_name=run_name,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        facts=facts,
        cards=report_content.key_numbers(records, summary),
        alarms=alarms(checks),
        checks=checks,
        groups=chart_groups(records, completions),
        table=completions_view(completions),
        columns=COLUMNS,
        changes=changes,
        config_text=shortened(config_text, MAX_CONFIG, "config.yaml"),
        script=Markup(script),
        # The browser runs this script and no other, whatever a completion contains.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _read_config(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFileError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, Mapping):
        raise RunFileError(f"{path}: expected a mapping, found {type(config).__name__}")
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m recipe.report",
        description="Make the HTML report of a training run: curves, pass rates over time, completions, configuration.",
        epilog="example: python -m recipe.report outputs/my_run --out my_run.html",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output folder of a training run; it holds metrics.jsonl")
    parser.add_argument("--out", metavar="FILE", help="where to write the page (default: RUN_DIR/report.html)")
    options = parser.parse_args(arguments)
    try:
        path = build_report(options.run_dir, options.out)
    except (RunFileError, OSError) as error:
        print(f"recipe.report: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
