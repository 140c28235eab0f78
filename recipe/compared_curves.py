"""Learning curves of groups of runs, with bands over seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from recipe.compared_groups import Group
from recipe.compared_runs import ComparedRun
from recipe.intervals import Floats, VariancePart, half_width
from recipe.report_charts import Chart, Series, line_chart, percent, thin
from recipe.run_files import as_number

Band: TypeAlias = Literal["range", "interval"]
BANDS: dict[Band, str] = {
    "range": "from the lowest to the highest run",
    "interval": "95% t interval of the mean over seeds",
}
# What all charts together may draw, in points of a curve; it bounds the size of the page.
POINTS = 24_000
VALIDATION = re.compile(r"val/(?:(?P<source>.+)/)?(?P<kind>mean|maj|pass)@(?P<k>\d+)")
KINDS = ("mean", "maj", "pass")


@dataclass(frozen=True)
class Curve:
    """A chart's title and the metrics it can show: the first that any run has."""

    title: str
    keys: tuple[str, ...]
    options: Mapping[str, Any]


def _curve(title: str, *keys: str, **options: Any) -> Curve:
    return Curve(title, keys, options)


SHARE: dict[str, Any] = {"fmt": percent, "include": (0.0, 1.0)}
CURVES = (
    _curve("Training reward", "reward/mean", help="Mean of all rollouts of the step."),
    _curve("Pass rate", "pass_rate/mean", **SHARE, help="Mean over the step's questions."),
    _curve("Loss", "distill/loss", "loss", help="Each method's own: levels of different losses do not compare."),
    _curve("Divergence", "distill/divergence", y_label="nats a token", help="Between student and teacher, unweighted."),
    _curve(
        "Teacher gap",
        "teacher/gap",
        include=(0.0,),
        y_label="nats a token",
        help="Right answers under the teacher's context minus without it, median.",
    ),
    _curve("Teacher gap, wrong answers", "teacher/gap_wrong", include=(0.0,), y_label="nats a token"),
    _curve("Response length", "response/length", y_label="tokens", help="Mean over the rollouts of the step."),
    _curve("Truncated responses", "response/truncated", fmt=percent, include=(0.0,)),
    _curve(
        "Entropy", "student/entropy", "actor/entropy", y_label="nats a token", include=(0.0,), help="The student's."
    ),
    _curve("Entropy of the teacher", "teacher/entropy", y_label="nats a token", include=(0.0,)),
    _curve("Rows that train", "rows/train_share", **SHARE, help="Share of rows with a loss that is not exactly zero."),
    _curve("Effective sample size", "weight/effective_sample_size", include=(0.0,), y_label="questions"),
    _curve("Gradient norm", "actor/grad_norm", help="Before clipping."),
    _curve("Distance of the teacher", "teacher/distance", include=(0.0,), help="From its initial weights, L2."),
    _curve("Seconds a step", "time/step", include=(0.0,), y_label="seconds"),
)


def curves(groups: Sequence[Group], band: Band) -> list[Chart]:
    """The charts that the runs' metrics allow: validation first, then training.

    The line of a group is the mean over its finished runs, at the steps where all of them have a value; an unfinished
    run is a dashed line of its own. A metric that was measured at one step only has no curve.
    """
    wanted = [*_validation_curves(groups), *CURVES]
    drawn = [(curve, key) for curve in wanted if (key := _measured(groups, curve.keys))]
    series_count = sum(1 + len(group.unfinished) for group in groups)
    limit = max(40, POINTS // max(1, len(drawn) * series_count))
    charts = [_chart(groups, curve, key, band, limit) for curve, key in drawn]
    return [chart for chart in charts if chart is not None]


def _validation_curves(groups: Sequence[Group]) -> list[Curve]:
    """One for each data source and kind of accuracy, at the largest k of any run."""
    largest: dict[tuple[str, str], int] = {}
    keys = {key for group in groups for run in group.runs for record in run.records for key in record}
    for match in filter(None, map(VALIDATION.fullmatch, keys)):
        name = match["source"] or "", match["kind"]
        largest[name] = max(largest.get(name, 0), int(match["k"]))
    order = sorted(largest, key=lambda name: (name[0], KINDS.index(name[1])))
    return [
        _curve(
            f"Validation {kind}@{largest[source, kind]}" + (f", {source}" if source else ""),
            f"val/{f'{source}/' if source else ''}{kind}@{largest[source, kind]}",
            fmt=percent,
            help="On questions that are not trained on; step 0 is before training.",
        )
        for source, kind in order
    ]


def _measured(groups: Sequence[Group], keys: Sequence[str]) -> str | None:
    return next(
        (
            key
            for key in keys
            if any(len(_column(run, key)) > 1 for group in groups for run in group.runs)
        ),
        None,
    )  # fmt: skip


def _column(run: ComparedRun, key: str) -> dict[int, float]:
    return {
        int(record["step"]): value for record in run.records if (value := as_number(record.get(key))) is not None
    }  # fmt: skip


def _chart(groups: Sequence[Group], curve: Curve, key: str, band: Band, limit: int) -> Chart | None:
    columns = {id(run): _column(run, key) for group in groups for run in group.runs}
    steps = sorted({step for column in columns.values() for step in column})
    validation = key.startswith("val/")
    series: list[Series] = []
    for color, group in enumerate(groups):
        finished = [columns[id(run)] for run in group.finished]
        if common := [step for step in steps if finished and all(step in column for column in finished)]:
            values_ST = np.array([[column[step] for step in common] for column in finished])
            mean_T, low_T, high_T = mean_and_band(values_ST, band)
            banded = len(finished) > 1
            series.append(
                Series(
                    group.name,
                    _spread(steps, common, mean_T),
                    color,
                    _spread(steps, common, low_T) if banded else None,
                    _spread(steps, common, high_T) if banded else None,
                    markers=validation,
                )
            )
        for run in group.unfinished:
            own = columns[id(run)]
            values = [own.get(step) for step in steps]
            series.append(Series(f"{run.name} (unfinished)", values, color, markers=validation, dashed=True))
    series, steps, stretch = _thinned(series, steps, limit)
    options = dict(curve.options)
    if stretch > 1:
        options["help"] = f"{options.get('help', '')} Each point is the mean of {stretch} steps.".strip()
    chart = line_chart(curve.title, steps, series, **options)
    # The page has one legend for all charts.
    return None if chart is None else Chart(chart.title, chart.svg, [], chart.help)


def mean_and_band(values_ST: Floats, band: Band) -> tuple[Floats, Floats, Floats]:
    """Mean over runs, and the band's ends; with one run the band is the run.

    Args:
        values_ST: [S, T] value of each run at each step.

    Returns:
        [T] mean, lower and upper end.
    """
    mean_T = values_ST.mean(axis=0)
    runs = len(values_ST)
    if runs < 2 or band == "range":
        return mean_T, values_ST.min(axis=0), values_ST.max(axis=0)
    half_T = half_width([VariancePart(values_ST.var(axis=0, ddof=1) / runs, runs - 1)], 0.95)
    return mean_T, mean_T - half_T, mean_T + half_T


def _spread(steps: Sequence[int], known: Sequence[int], values: Floats) -> list[float | None]:
    found = dict(zip(known, map(float, values), strict=True))
    return [found.get(step) for step in steps]


def _thinned(series: Sequence[Series], steps: Sequence[int], limit: int) -> tuple[list[Series], list[int], int]:
    columns = [column for one in series for column in (one.values, one.low, one.high) if column is not None]
    steps, thinned, stretch = thin(steps, columns, limit)
    queue = iter(thinned)
    made = [
        Series(
            one.name,
            next(queue),
            one.color,
            None if one.low is None else next(queue),
            None if one.high is None else next(queue),
            one.markers,
            one.dashed,
        )
        for one in series
    ]
    return made, steps, stretch
