"""Which curves the report draws, by what they tell: learning, questions, teacher and student, text, time."""

from __future__ import annotations

import re
from collections.abc import Sequence

from recipe.alarm_looks import Record
from recipe.report_charts import Chart, Series, heat_map, line_chart, percent, stacked_chart
from recipe.report_columns import Columns
from recipe.report_teacher import pair_charts, teacher_charts
from recipe.run_files import as_number

PHASES = (
    ("time/rollout", "rollout"),
    ("time/student_pass", "student pass"),
    ("time/teacher_pass", "teacher pass"),
    ("time/update", "update"),
    ("time/weight_sync", "weight sync"),
)


def chart_groups(records: Sequence[Record], completions: Sequence[Record] = ()) -> list[tuple[str, list[Chart]]]:
    """The charts that the run's metrics and completions allow, in the order of reading; no group is empty."""
    columns = Columns(records)
    groups = [
        ("Learning", _learning(columns)),
        ("Which questions train", _questions(columns)),
        ("Teacher and student", teacher_charts(columns, completions)),
        ("Text", _text(columns)),
        ("Time", _time(columns)),
    ]
    drawn = [(name, [chart for chart in charts if chart is not None]) for name, charts in groups]
    return [(name, charts) for name, charts in drawn if charts]


def _learning(columns: Columns) -> list[Chart | None]:
    records, steps = columns.records, columns.steps
    mean, spread = columns("pass_rate/mean"), columns("pass_rate/std")
    pairs = list(zip(mean, spread, strict=True))
    low = [None if m is None or s is None else max(0.0, m - s) for m, s in pairs]
    high = [None if m is None or s is None else min(1.0, m + s) for m, s in pairs]
    return [
        line_chart(
            "Validation accuracy",
            steps,
            _validation_series(records),
            fmt=percent,
            help="On questions that are not trained on; step 0 is before training.",
        ),
        columns.chart("Training reward", ("training reward", "reward/mean", 2), help="Mean reward of all rollouts."),
        line_chart(
            "Pass rate",
            steps,
            [Series("pass rate", mean, 0, low, high)],
            fmt=percent,
            include=(0.0, 1.0),
            help="Mean over the step's questions, with one standard deviation between questions.",
        ),
        heat_map(
            "Pass rates over time",
            steps,
            [_counts(record) for record in records],
            help="How many of a question's rollouts succeed. Questions at the bottom (never) and at the top (always) "
            "carry no weight where the kernel is zero there.",
        ),
        columns.chart("Loss", ("loss", _loss_key(records), 1), help=_loss_help(records)),
        *pair_charts(columns),
        columns.chart("Gradient norm", ("gradient norm", "actor/grad_norm", 1), help="Before clipping."),
        line_chart(
            "Reviser",
            steps,
            [
                Series("wrong attempts corrected", columns("reviser/correction_rate"), 1, markers=True),
                Series("right attempts kept right", columns("reviser/retention"), 3, markers=True),
            ],
            fmt=percent,
            x_label="model",
            include=(0.0, 1.0),
            help="Share of right answers among revisions of the model's own attempts, model by model: "
            + ", ".join(f"{record['step']} {record['stage']}" for record in records if "stage" in record),
        ),
    ]


def _questions(columns: Columns) -> list[Chart | None]:
    return [
        columns.chart(
            "Rows that train",
            ("rows that train", "rows/train_share", 3),
            ("questions with weight", "weight/active_share", 0),
            fmt=percent,
            include=(0.0, 1.0),
            help="Share of rows with a loss that is not exactly zero; the others are not forwarded.",
        ),
        columns.chart(
            "Effective sample size",
            ("effective", "weight/effective_sample_size", 4),
            ("questions of the step", "pass_rate/questions", 7),
            dashed=("pass_rate/questions",),
            include=(0.0,),
            help="(Σ w)² / Σ w²: how many questions the weighted update amounts to.",
        ),
        columns.chart(
            "Question weights",
            ("largest", "weight/largest", 1),
            ("mean", "weight/mean", 0),
            include=(0.0,),
            help="After normalising over the batch; one question with a large weight decides the step.",
        ),
    ]


def _text(columns: Columns) -> list[Chart | None]:
    return [
        columns.chart(
            "Response length",
            ("response length", "response/length", 0),
            y_label="tokens",
            help="Mean over the rollouts of the step.",
        ),
        columns.chart(
            "Responses cut",
            ("responses cut", "response/truncated", 1),
            fmt=percent,
            include=(0.0, 0.1),
            help="Share that reached data.max_response_length; a cut answer counts as wrong.",
        ),
        columns.chart(
            "Entropy",
            ("student, measured", "actor/entropy", 0),
            ("student, from its samples", "student/nll", 4),
            ("teacher", "teacher/entropy", 5),
            include=(0.0,),
            y_label="nats a token",
            help="Student from its samples: mean of -log π(y), whose expectation over own rollouts is the entropy.",
        ),
    ]


def _time(columns: Columns) -> list[Chart | None]:
    phases = _phase_series(columns.records)
    help = "Where the time of a step goes."
    return [stacked_chart("Seconds by phase", columns.steps, phases, y_label="seconds", help=help)]


def _loss_key(records: Sequence[Record]) -> str:
    """The distillation loss; without distillation the policy loss."""
    return "distill/loss" if any("distill/loss" in record for record in records) else "loss"


def _loss_help(records: Sequence[Record]) -> str:
    if any("preference/margin" in record for record in records):
        return "Preference loss. With unfiltered pairs it falls to log 2 = 0.693, where student and teacher agree."
    if _loss_key(records) == "loss":
        return "Policy loss."
    return "Weighted divergence between student and teacher."


def _validation_series(records: Sequence[Record]) -> list[Series]:
    """A curve for each data set and kind of accuracy, at the largest k that was measured."""
    largest: dict[tuple[str, str], tuple[int, str]] = {}
    for key in {key for record in records for key in record}:
        match = re.fullmatch(r"val/(?:(.+)/)?(mean|maj|pass)@(\d+)", key)
        if match and any(as_number(record.get(key)) is not None for record in records):
            name = (match[1] or "", match[2])
            largest[name] = max(largest.get(name, (0, "")), (int(match[3]), key))
    order = {"mean": 0, "maj": 1, "pass": 2}
    series = []
    for (_, _), (_, key) in sorted(largest.items(), key=lambda item: (item[0][0], order[item[0][1]])):
        band = [[as_number(record.get(f"{key}/{end}")) for record in records] for end in ("low", "high")]
        known = all(any(value is not None for value in one) for one in band)
        values = [as_number(record.get(key)) for record in records]
        low, high = band if known else (None, None)
        series.append(Series(key.removeprefix("val/"), values, len(series) % 7, low, high, markers=True))
    return series


def _phase_series(records: Sequence[Record]) -> list[Series]:
    columns = {key: [as_number(record.get(key)) for record in records] for key, _ in PHASES}
    rest: list[float | None] = []
    for index, record in enumerate(records):
        total = as_number(record.get("time/step"))
        rest.append(None if total is None else max(0.0, total - sum(columns[key][index] or 0 for key, _ in PHASES)))
    series = [Series(name, columns[key], color) for color, (key, name) in enumerate(PHASES)]
    series = [one for one in series if any(one.values)]
    return series + ([Series("other", rest, 7)] if any(rest) else [])


def _counts(record: Record) -> list[float] | None:
    counts = record.get("pass_rate/histogram")
    return [as_number(count) or 0.0 for count in counts] if isinstance(counts, list) and counts else None
