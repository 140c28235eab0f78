"""Charts of the teacher against the student: by outcome, by pass rate, along the response, and of pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from recipe.alarm_looks import Record
from recipe.report_bars import grouped_bars
from recipe.report_charts import Chart, Series, line_chart, percent
from recipe.report_columns import Columns
from recipe.run_files import as_number
from verl_ext.localisation import profile

PROFILE_POSITIONS = 20
RIGHT_FROM = 0.5  # reward of a right answer


def teacher_charts(columns: Columns, completions: Sequence[Record]) -> list[Chart | None]:
    """Where the two differ, and on which questions and answers."""
    return [
        columns.chart(
            "Teacher gap",
            ("right answers", "teacher/gap", 5),
            include=(0.0,),
            y_label="nats a token",
            help="Right answers: log-probability under the teacher's context minus without it, median. Above 0 the "
            "context helps, near 0 it teaches nothing.",
        ),
        columns.chart(
            "Teacher gap on wrong answers",
            ("wrong answers", "teacher/gap_wrong", 1),
            include=(0.0,),
            y_label="nats a token",
            help="The same on wrong answers: how far below 0 the teacher objects to them.",
        ),
        line_chart(
            "Rows with a demonstration",
            columns.steps,
            [
                series
                for series in (
                    Series("demonstration", columns.ratio("context/with_demonstration", "context/rows"), 2),
                    Series("reference", columns.ratio("context/with_reference", "context/rows"), 5),
                    Series("any context", columns.ratio("context/distilled", "context/rows"), 0, dashed=True),
                )
                if any(value is not None for value in series.values)
            ],
            fmt=percent,
            include=(0.0, 1.0),
            help="Without a context a row carries no distillation loss.",
        ),
        by_pass_rate(
            "Gap by pass rate",
            columns,
            "gap",
            help="Mean gap of all answers, by the pass rate of their question, in three stretches of the run.",
        ),
        by_pass_rate(
            "Divergence by pass rate",
            columns,
            "divergence",
            help="Mean divergence by the pass rate of the question: where there is something left to learn.",
        ),
        columns.chart(
            "Divergence by outcome",
            ("right answers", "distill/divergence_right", 3),
            ("wrong answers", "distill/divergence_wrong", 1),
            include=(0.0,),
            y_label="nats a token",
            help="Before weights and clipping of ratios, mean over distilled rows.",
        ),
        columns.chart(
            "Divergence on the top 5% of tokens",
            ("right answers", "distill/top5_share_right", 3),
            ("wrong answers", "distill/top5_share_wrong", 1),
            fmt=percent,
            include=(0.0, 1.0),
            help="Share of a response's divergence that falls on 5% of its tokens: high where the teacher objects to "
            "single steps.",
        ),
        _profile_chart(completions),
        columns.chart(
            "Teacher against student weights",
            ("distance", "teacher/distance", 6),
            include=(0.0,),
            help="Norm of the difference of all weights: how far an EMA teacher lags, a frozen one is left.",
        ),
    ]


def by_pass_rate(title: str, columns: Columns, statistic: str, *, help: str) -> Chart | None:
    """Means of ``by_pass_rate/<statistic>/<bin>`` over the first, middle and last third of the steps that have them."""
    pattern = re.compile(rf"by_pass_rate/{re.escape(statistic)}/p(\d+)_(\d+)")
    bins = sorted(
        {
            (int(found[1]), int(found[2]), key)
            for one in columns.records
            for key in one
            if (found := pattern.fullmatch(key))
        }
    )
    measured = [one for one in columns.records if any(as_number(one.get(key)) is not None for _, _, key in bins)]
    parts = min(3, len(measured))
    cuts = [round(part * len(measured) / parts) for part in range(parts + 1)] if parts else [0]
    series = []
    for part, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        stretch = measured[first:last]
        values = []
        for _, _, key in bins:
            known = [value for one in stretch if (value := as_number(one.get(key))) is not None]
            values.append(sum(known) / len(known) if known else None)
        ends = (stretch[0]["step"], stretch[-1]["step"])
        name = f"step {ends[0]}" if ends[0] == ends[1] else f"steps {ends[0]} to {ends[1]}"
        series.append(Series(name, values, (7, 4, 0)[part + 3 - parts]))
    labels = [f"{'' if low == 0 else '> '}{low} to {high}%" for low, high, _ in bins]
    return grouped_bars(title, labels, series, y_label="nats a token", x_label="pass rate of the question", help=help)


def _profile_chart(completions: Sequence[Record]) -> Chart | None:
    """Divergence along the response, by outcome, over all completions that were recorded with it."""
    rows = [
        row
        for row in completions
        if row.get("divergence")
        and all(as_number(value) is not None for value in [row.get("reward"), *row["divergence"]])
    ]
    right = [row["divergence"] for row in rows if row["reward"] >= RIGHT_FROM]
    wrong = [row["divergence"] for row in rows if row["reward"] < RIGHT_FROM]
    places = [round(100 * (place + 0.5) / PROFILE_POSITIONS) for place in range(PROFILE_POSITIONS)]
    return line_chart(
        "Divergence along the response",
        places,
        [
            Series(f"right answers ({len(right)})", profile(right, PROFILE_POSITIONS), 3),
            Series(f"wrong answers ({len(wrong)})", profile(wrong, PROFILE_POSITIONS), 1),
        ],
        y_label="nats a token",
        x_label="% of the response",
        include=(0.0,),
        help="Mean over the sampled completions of all steps: where teacher and student differ.",
    )


def pair_charts(column: Columns) -> list[Chart | None]:
    """What the preference loss on pairs looks at."""
    steps = column.steps
    sides = (("teacher's samples", "positive", 3), ("student's samples", "negative", 1))
    return [
        line_chart(
            "Preference margin",
            steps,
            [
                Series("margin", column("preference/margin"), 0),
                Series("by the divergences", column("preference/margin_expected"), 2, dashed=True),
            ],
            include=(0.0,),
            y_label="nats",
            help="The two agree on average where both samples come from the distributions they are scored with.",
        ),
        line_chart(
            "Student against teacher",
            steps,
            [Series(name, column(f"preference/log_ratio_{side}"), color) for name, side, color in sides],
            include=(0.0,),
            y_label="nats a response",
            help="log-probability of the student minus that of the teacher, who reads its context.",
        ),
        line_chart(
            "Preference accuracy",
            steps,
            [
                Series("margin above 0", column("preference/accuracy"), 0),
                Series("1 - σ(margin)", column("preference/one_less_sigma"), 4),
            ],
            fmt=percent,
            include=(0.0, 1.0),
            help="Share of pairs whose margin is positive, and the mean factor of the gradient.",
        ),
        line_chart(
            "Right samples",
            steps,
            [Series(name, column(f"preference/pass_rate_{side}"), color) for name, side, color in sides],
            fmt=percent,
            include=(0.0, 1.0),
            help="Share of right answers on both sides of the pairs.",
        ),
    ]
