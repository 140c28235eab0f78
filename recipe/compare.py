"""One self-contained HTML page that compares runs: ``python -m recipe.compare RUN_DIR [RUN_DIR ...]``.

Runs that differ only in their seed are one group. The page loads nothing from anywhere and is made from the runs'
files only, so it can be made while some of them are still going on.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from recipe.compared_curves import BANDS, KINDS, Band, curves
from recipe.compared_groups import Group, differences, environment_differences, group_runs
from recipe.compared_numbers import Difference, Final, differences_to, final_numbers
from recipe.compared_runs import read_runs
from recipe.pages import page_environment
from recipe.report_charts import percent
from recipe.run_files import RunFileError
from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError

TEMPLATE = Path(__file__).with_name("compare.html.j2")
LEVEL = 0.95

DESCRIPTION = """Compare training runs on one HTML page: learning curves with bands over seeds, final accuracies with
intervals, differences question by question, and the settings that differ. Runs that differ only in run.seed are one
group. Unfinished runs are shown as such and are part of no number."""
EPILOG = """examples:
  python -m recipe.compare outputs/sdpo-* outputs/sc_sdpo-*
  python -m recipe.compare docs/results/methods --reference grpo
  python -m recipe.compare outputs/* --group 'small lr=outputs/lr1e-6-*' --output lr.html"""

# Over a chart, every chart shows its numbers at the same step; without script they are the browser's own hover text.
SCRIPT = """
var cards = Array.from(document.querySelectorAll('.card')).map(function (card) {
  var texts = {};
  card.querySelectorAll('.hit title').forEach(function (title) {
    var text = title.textContent;
    texts[text.slice(0, text.indexOf(':'))] = text;
  });
  return {card: card, out: card.querySelector('.readout'), texts: texts};
});
cards.forEach(function (one) {
  one.card.addEventListener('mouseover', function (event) {
    var mark = event.target.closest('.hit');
    var text = mark ? mark.querySelector('title').textContent : '';
    var place = text.slice(0, text.indexOf(':'));
    cards.forEach(function (other) { other.out.textContent = other.texts[place] || ''; });
  });
  one.card.addEventListener('mouseleave', function () {
    cards.forEach(function (other) { other.out.textContent = ''; });
  });
});
"""


def build_comparison(
    paths: Sequence[Path],
    output: Path,
    *,
    wanted: Sequence[tuple[str, str]] = (),
    reference: str | None = None,
    band: Band = "range",
) -> list[str]:
    """Writes the page; returns its warnings: runs that are unfinished, groups that cannot be compared.

    Args:
        paths: see :func:`recipe.compared_runs.read_runs`.
        wanted: see :func:`recipe.compared_groups.group_runs`.
        reference: the group that the others are compared with; by default the first.
        band: of the curves.

    Raises:
        RunFileError: a path holds no run, or a file cannot be read.
        ConfigError: the runs cannot be grouped as asked, or there is no such reference.
    """
    groups = group_runs(read_runs(paths), wanted)
    names = [group.name for group in groups]
    if reference is not None and reference not in names:
        raise ConfigError(f"--reference {reference!r} is no group; the groups are {', '.join(map(repr, names))}")
    first = groups[0 if reference is None else names.index(reference)]
    finals, against = final_numbers(groups, LEVEL), differences_to(groups, first, LEVEL)
    warnings = _warnings(groups, against)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, render(groups, finals, against, warnings, first.name, band))
    return warnings


def render(
    groups: Sequence[Group],
    finals: Sequence[Final],
    against: Sequence[Difference],
    warnings: Sequence[str],
    reference: str,
    band: Band,
) -> str:
    """The page as text; everything that comes from the runs is escaped."""
    environment = page_environment()
    colors = {group.name: color for color, group in enumerate(groups)}
    metrics = sorted({one.metric for one in finals if one.metric})
    # Of each kind of accuracy one column, whatever its k.
    kinds = [kind for kind in KINDS if any(name.startswith(kind) for one in finals for name in one.others)]
    return environment.get_template(TEMPLATE.name).render(
        title=" · ".join(group.name for group in groups[:4]) + (" · …" if len(groups) > 4 else ""),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        groups=groups,
        runs=[_run(run, group, colors) for group in groups for run in group.runs],
        metric=", ".join(metrics),
        grouping="Runs of a group differ in their seed only."
        if not any(group.mixed for group in groups)
        else "Runs of a group differ in their seed, and in more where it says so.",
        alarms=warnings,
        level=percent(LEVEL),
        finals=[_final(one, groups[index], kinds) for index, one in enumerate(finals)],
        other_names=[f"{kind}@k" for kind in kinds],
        reference=reference,
        differences=[_difference(one, colors) for one in against],
        charts=curves(groups, band),
        band_text="Line: mean over a group's finished runs, at the steps where all of them have a value. "
        f"Band: {BANDS[band]}.",
        dashed=any(group.unfinished for group in groups),
        settings=differences(groups) + environment_differences(groups),
        settings_text="The seed and what changes nothing in a run (folders, loggers) are left out."
        + ("" if all(group.whole for group in groups) else " A study's row holds only what its command line set."),
        script=Markup(SCRIPT),
        # The browser runs this script and no other, whatever a run's files contain.
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def _warnings(groups: Sequence[Group], against: Sequence[Difference]) -> list[str]:
    found = [
        f"{run.name} ({group.name}): {run.unfinished}; it is part of no band, number or difference"
        for group in groups
        for run in group.unfinished
    ]
    found += [
        f"the runs of {group.name} differ in more than their seed: {', '.join(group.mixed[:6])}"
        + (f" and {len(group.mixed) - 6} more" if len(group.mixed) > 6 else "")
        for group in groups
        if group.mixed
    ]
    found += [f"{one.group} against {one.reference}: {one.note}" for one in against if one.note]
    return found


def _run(run: Any, group: Group, colors: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": run.name,
        "group": group.name,
        "color": colors[group.name],
        "seed": "not recorded" if run.seed is None else run.seed,
        "state": run.unfinished or f"finished, at step {run.step}",
        "unfinished": bool(run.unfinished),
    }


def _final(one: Final, group: Group, kinds: Sequence[str]) -> dict[str, Any]:
    seeds = ", ".join("?" if seed is None else str(seed) for seed in one.seeds)
    count = f"{len(group.finished)}" if not group.unfinished else f"{len(group.finished)} of {len(group.runs)}"
    interval = one.interval
    return {
        "group": one.group,
        "runs": f"{count} (seed{'s' if len(one.seeds) > 1 else ''} {seeds})" if one.seeds else count,
        "steps": ", ".join(map(str, one.steps)) or "–",
        "metric": one.metric,
        "value": "" if one.value is None else _points(one.value),
        "interval": f"[{_points(interval.low)}, {_points(interval.high)}]" if interval else "",
        "population": _population(interval) if interval else "",
        "others": [_other(one.others, kind) for kind in kinds],
        "note": one.note,
    }


def _points(share: float) -> str:
    return f"{100 * share:.1f}%"


def _population(interval: Any) -> str:
    spoken = {"seeds": "seeds", "items": "questions", "seeds and items": "seeds and questions"}[interval.population]
    counts = [f"{interval.n_seeds} run{'s' if interval.n_seeds > 1 else ''}"]
    if interval.n_items > 1:
        counts.append(f"{interval.n_items} questions")
    return f"{spoken} ({', '.join(counts)})"


def _other(others: Mapping[str, float], kind: str) -> str:
    return next(
        (f"{_points(value)} (k {name.partition('@')[2]})" for name, value in others.items() if name.startswith(kind)),
        "–",
    )


def _difference(one: Difference, colors: Mapping[str, int]) -> dict[str, Any]:
    made = {"group": one.group, "color": colors[one.group], "note": one.note, "value": ""}
    if one.comparison is None:
        return made
    found, interval = one.comparison, one.comparison.difference
    return made | {
        "value": f"{100 * interval.value:+.1f}",
        "interval": f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]",
        "population": _population(interval),
        "pairing": f"seeds {found.pairing}" if interval.population != "items" else "",
        "p_items": _p_value(found.p_items),
        "p_seeds": _p_value(found.p_seeds),
        "verdict": found.verdict,
        "tone": {"yes": "good", "no": "bad"}.get(found.verdict, ""),
    }


def _p_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if value >= 0.001 else "< 0.001"


def _named_group(text: str) -> tuple[str, str]:
    name, equals, pattern = text.rpartition("=")
    if not equals or not name or not pattern:
        raise argparse.ArgumentTypeError(f"expected NAME=PATTERN, found {text!r}")
    return name, pattern


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m recipe.compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="output folder of a run, row of a study (.json), or folder of rows such as docs/results/methods",
    )
    made.add_argument(
        "--output", type=Path, default=Path("compare.html"), metavar="FILE", help="(default: %(default)s)"
    )
    made.add_argument(
        "--group",
        "--label",
        action="append",
        default=[],
        type=_named_group,
        metavar="NAME=PATTERN",
        help="put the runs whose name, method or path matches PATTERN (* and ?) into group NAME; may be repeated",
    )
    made.add_argument("--reference", metavar="NAME", help="the group that the others are compared with (the first)")
    made.add_argument(
        "--band",
        choices=list(BANDS),
        default="range",
        help="of the curves: range, " + "; ".join([BANDS["range"], f"interval, {BANDS['interval']}"]) + " (range)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        warnings = build_comparison(
            options.runs, options.output, wanted=options.group, reference=options.reference, band=options.band
        )
    except (RunFileError, ConfigError, OSError) as error:
        print(f"recipe.compare: {error}", file=sys.stderr)
        return 2
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
