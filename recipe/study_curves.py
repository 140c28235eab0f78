"""Learning curves of a study as a picture: one panel per entry, the mean over seeds with the range of the runs.

A panel of its own for every entry, on one pair of axes: the bands of methods that are close lie on top of each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recipe.report_charts import nice_ticks, short
from recipe.run_files import as_number
from recipe.study_accuracy import rows_of
from recipe.study_file import Study
from recipe.svg_parts import BEFORE, DOT, GRID, MEAN, svg_line, svg_page, svg_text

PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, BOTTOM, GAP = 240, 150, 44, 46, 30, 26
COLUMNS = 3

Curve = dict[int, list[float]]


def curves(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Curve]:
    """mean@k of the finished runs by entry and step; an entry with fewer than three steps has no curve.

    Nor has a method of several stages: its steps are the stages.
    """
    found: dict[str, Curve] = {}
    for entry in study.entries:
        curve: Curve = {}
        for row in rows_of(study, rows, entry):
            if "stage" in row["final"]:
                continue
            metric = str(row["summary"]["metric"]).removeprefix("val/")
            for step, values in row["curve"].items():
                if (value := as_number(values.get(metric))) is not None:
                    curve.setdefault(int(step), []).append(value)
        if len(curve) > 2:
            found[entry] = dict(sorted(curve.items()))
    return found


def curves_svg(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The picture; None where no entry has a curve, or they end at different steps."""
    found = curves(study, rows)
    if not found or len({max(curve) for curve in found.values()}) > 1:
        return None
    metric = next(str(row["summary"]["metric"]).removeprefix("val/") for row in rows.values())
    values = [value for curve in found.values() for step in curve.values() for value in step]
    ticks = nice_ticks(min(values), max(values), 4)
    last = max(max(curve) for curve in found.values())
    columns = min(COLUMNS, len(found))
    width = LEFT + columns * (PANEL_WIDTH + GAP)
    height = TOP + math.ceil(len(found) / columns) * (PANEL_HEIGHT + BOTTOM + GAP)
    parts = [svg_text(LEFT, 20, f"{metric} held out by step: mean over seeds, range of the runs", "start", 14)]
    for number, (entry, curve) in enumerate(found.items()):
        left = LEFT + number % columns * (PANEL_WIDTH + GAP)
        top = TOP + number // columns * (PANEL_HEIGHT + BOTTOM + GAP)
        parts += _panel(left, top, entry, curve, ticks, last, with_labels=number % columns == 0)
    return svg_page(width, height, f"{study.name}: {metric} by step and entry", parts)


def _panel(
    left: float, top: float, entry: str, curve: Curve, ticks: Sequence[float], last: int, *, with_labels: bool
) -> list[str]:
    def x(step: int) -> float:
        return left + step / max(1, last) * PANEL_WIDTH

    def y(value: float) -> float:
        return top + PANEL_HEIGHT - (value - ticks[0]) / (ticks[-1] - ticks[0]) * PANEL_HEIGHT

    runs = max(len(values) for values in curve.values())
    parts = [svg_text(left, top - 6, f"{entry} ({runs} {'seed' if runs == 1 else 'seeds'})", "start")]
    for tick in ticks:
        parts.append(svg_line(left, y(tick), left + PANEL_WIDTH, y(tick), GRID, 1))
        if with_labels:
            parts.append(svg_text(left - 6, y(tick) + 4, short(tick), "end", 11))
    for step in curve:
        parts.append(svg_text(x(step), top + PANEL_HEIGHT + 16, str(step), "middle", 11))
    upper = [f"{x(step):.1f},{y(max(values)):.1f}" for step, values in curve.items()]
    lower = [f"{x(step):.1f},{y(min(values)):.1f}" for step, values in reversed(curve.items())]
    parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{DOT}" fill-opacity="0.25"/>')
    line = " ".join(f"{x(step):.1f},{y(statistics.fmean(values)):.1f}" for step, values in curve.items())
    parts.append(f'<polyline points="{line}" fill="none" stroke="{DOT}" stroke-width="2"/>')
    # Readable on dark pages too, where MEAN's dark blue is not: a light ring around it.
    parts += [
        f'<circle cx="{x(step):.1f}" cy="{y(statistics.fmean(values)):.1f}" r="3.5" fill="{MEAN}" stroke="{BEFORE}"/>'
        for step, values in curve.items()
    ]
    return parts
