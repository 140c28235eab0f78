"""One self-contained HTML page about a training run: ``python -m recipe.report RUN_DIR``.

The page is made from the files in the run's folder only, so it can be made again at any time, even during the run.
It loads nothing from anywhere: styles, drawings and its few lines of script are inside.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from recipe import report_content
from recipe.console_format import clean_line
from recipe.run_files import RunFileError, as_number, read_json_lines, read_metric_records
from verl_ext.atomic import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.j2")
MAX_COMPLETIONS = 48
MAX_TEXT = 6000  # characters of a prompt, response or context; the whole text is in completions.jsonl
MAX_CONFIG = 200_000

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
    summary = _read_summary(folder / "summary.json")

    target = Path(out) if out is not None else folder / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, render(records, completions, config, summary, folder.resolve().name))
    return target


def render(
    records: Sequence[Mapping[str, Any]],
    completions: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None,
    summary: Mapping[str, Any],
    run_name: str,
) -> str:
    """The page as text. All texts of the run are escaped: a model's output is not to be trusted with a browser."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts = report_content.describe(config or {}, summary, records)
    config_text = "" if config is None else yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110)
    chosen = report_content.choose_completions(completions, MAX_COMPLETIONS)
    return environment.get_template(TEMPLATE.name).render(
        run_name=run_name,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        facts=facts,
        cards=report_content.key_numbers(records, summary),
        alarms=report_content.alarms(records),
        charts=report_content.charts(records, completions),
        completions=[_completion(row) for row in chosen],
        completion_total=len(completions),
        config_text=_shortened(config_text, MAX_CONFIG, "config.yaml"),
        script=Markup(SCRIPT),
        # The browser runs this script and no other, whatever a completion contains.
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


_RESPONSE = {"teacher": "Response, sampled by the teacher", "student": "Response, sampled by the student"}


def _completion(row: Mapping[str, Any]) -> dict[str, Any]:
    """One sampled completion as the template shows it."""
    prompt, response = _text(row.get("prompt")), _text(row.get("response"))
    context = _text(row.get("teacher_context"))
    return {
        "step": row.get("step", "–"),
        "question": _text(row.get("question_id")),
        "preview": " ".join(prompt[-400:].split())[-110:],
        "reward": _figure(row.get("reward")),
        "good": (as_number(row.get("reward")) or 0) > 0,
        "pass_rate": _figure(row.get("pass_rate")),
        "weight": _figure(row.get("weight")),
        "demonstration": {True: "yes", False: "no"}.get(row.get("has_demonstration"), "–"),
        "texts": [
            ("Prompt", _shortened(prompt)),
            (_RESPONSE.get(str(row.get("sampled_by")), "Response"), _shortened(response)),
            ("Teacher context", _shortened(context) if context else "none"),
        ],
    }


def _figure(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:.3g}"


def _text(value: Any) -> str:
    """A prompt may be a string or a list of chat messages."""
    if value is None:
        return ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and all(isinstance(one, Mapping) and "content" in one for one in value):
        text = "\n\n".join(f"[{one.get('role', '?')}]\n{_text(one['content'])}" for one in value)
    else:
        text = json.dumps(value, ensure_ascii=False, indent=1)
    return "\n".join(clean_line(line) for line in text.split("\n"))


def _shortened(text: str, limit: int = MAX_TEXT, where: str = "completions.jsonl") -> str:
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n… {len(text) - limit} more characters in {where}"


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


def _read_summary(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(summary, Mapping):
        raise RunFileError(f"{path}: expected a JSON object, found {type(summary).__name__}")
    return summary


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
