"""A study as a picture: one line per entry, a dot per seed, for a page that shows SVG files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from recipe.report_charts import nice_ticks, short
from recipe.run_files import as_number
from recipe.study_file import Study
from recipe.svg_parts import BEFORE, DOT, GRID, MEAN, svg_line, svg_page, svg_text
from verl_ext.config import ConfigError

WIDTH, ROW, LEFT, RIGHT, TOP, BOTTOM = 760, 30, 210, 30, 44, 46


def study_svg(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Dots: the runs' last validation; the bar among them: their mean; grey: before training, mean over all runs.

    Colours read on light and dark pages.

    Raises:
        ConfigError: the study has no finished run.
    """
    if not rows:
        raise ConfigError(f"study {study.name} has no finished run to draw; run it first")
    # Entries of other studies may have been asked other numbers of samples.
    metric = ", ".join(dict.fromkeys(str(row["summary"]["metric"]).removeprefix("val/") for row in rows.values()))
    after = {
        entry: [
            value
            for run in study.runs
            if run.entry == entry and run.run_id in rows
            if (value := as_number(rows[run.run_id]["summary"]["after"])) is not None
        ]
        for entry in study.entries
    }
    before = [value for row in rows.values() if (value := as_number(row["summary"]["before"])) is not None]
    everything = before + [value for values in after.values() for value in values]
    ticks = nice_ticks(min(everything), max(everything), 6)
    height = TOP + ROW * len(after) + BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - LEFT - RIGHT)

    base = height - BOTTOM
    parts = [svg_text(LEFT, 20, f"{metric} held out, after training", "start", 14)]
    for tick in ticks:
        parts.append(svg_line(x(tick), TOP, x(tick), base, GRID, 1))
        parts.append(svg_text(x(tick), base + 18, short(tick), "middle"))
    if before:
        mean = statistics.fmean(before)
        parts.append(svg_line(x(mean), TOP, x(mean), base, BEFORE, 2, "5 4"))
        parts.append(svg_text(x(mean), base + 36, f"before training {mean:.3f}", "middle"))
    for number, (entry, values) in enumerate(after.items()):
        y = TOP + ROW * (number + 0.5)
        parts.append(svg_text(LEFT - 12, y + 4, entry, "end"))
        if not values:
            parts.append(svg_text(LEFT + 8, y + 4, "not run", "start", 11))
        for value in values:
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="5" fill="{DOT}" fill-opacity="0.6"/>')
        if values:
            mean = statistics.fmean(values)
            parts.append(svg_line(x(mean), y - 10, x(mean), y + 10, MEAN, 3))
    return svg_page(WIDTH, height, f"{study.name}: {metric} by entry", parts)
