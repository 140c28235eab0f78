"""What the report says about a run: header, key numbers, alarms, the choice of charts and of completions."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.console_format import format_seconds, validation_key
from recipe.report_charts import Chart, Series, heat_map, line_chart, percent, short, stacked_chart
from recipe.run_files import as_number
from verl_ext.localisation import profile

Record = Mapping[str, Any]

# Where a fact stands in the configuration: the first of these dotted keys that has a value.
FACT_KEYS: dict[str, tuple[str, ...]] = {
    "Method": ("method.name", "method", "recipe.method.name", "recipe.method", "trainer.experiment_name"),
    "Model": ("model.name", "actor_rollout_ref.model.path", "model.path", "model"),
    "Data": ("data.name", "recipe.data", "data.train_files"),
    "Hardware": ("hardware.name", "recipe.hardware", "hardware"),
}
LIBRARY_KEYS = ("environment.versions", "environment.libraries", "versions", "libraries")
MACHINE_KEYS = ("environment.machine", "machine")

PROFILE_POSITIONS = 20
RIGHT_FROM = 0.5  # reward of a right answer

PHASES = (
    ("time/rollout", "rollout"),
    ("time/student_pass", "student pass"),
    ("time/teacher_pass", "teacher pass"),
    ("time/update", "update"),
    ("time/weight_sync", "weight sync"),
)


@dataclass(frozen=True)
class KeyNumber:
    """One of the large numbers at the top."""

    label: str
    value: str
    detail: str = ""
    tone: str = ""  # "good", "bad" or nothing


def lookup(config: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key, or None."""
    value: Any = config
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _first(config: Mapping[str, Any], keys: Sequence[str], kinds: tuple[type, ...]) -> Any:
    return next((value for key in keys if isinstance(value := lookup(config, key), kinds) and value), None)


def describe(config: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record]) -> list[tuple[str, str]]:
    """The header's lines: method, model, data, hardware, steps, libraries, machine; only what is known."""
    facts: list[tuple[str, str]] = []
    for name, keys in FACT_KEYS.items():
        value = summary.get(name.lower()) or _first(config, keys, (str, list))
        if value:
            facts.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    done = records[-1]["step"]
    planned = next(
        (as_number(lookup(config, key)) for key in ("trainer.total_training_steps", "steps") if lookup(config, key)),
        None,
    )
    facts.append(("Steps", f"{done} of {planned:.0f}" if planned and planned > done else str(done)))
    for name, keys in (("Libraries", LIBRARY_KEYS), ("Machine", MACHINE_KEYS)):
        value = _first(config, keys, (str, Mapping))
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        if value:
            facts.append((name, value))
    return facts


def key_numbers(records: Sequence[Record], summary: Mapping[str, Any]) -> list[KeyNumber]:
    """Validation before and after, what a step takes, and how much of the data trains."""
    cards: list[KeyNumber] = []
    metric = summary.get("metric")
    if not isinstance(metric, str) or not _known(records, metric):
        metric = next((key for record in records if (key := validation_key(record))), None)
    if metric:
        first, last = _known(records, metric)[0], _known(records, metric)[-1]
        name = metric.removeprefix("val/")
        if first[0] == last[0]:
            cards.append(KeyNumber(f"validation {name}", percent(first[1]), f"measured once, at step {first[0]}"))
        else:
            change = 100 * (last[1] - first[1])
            tone = "good" if change > 0 else "bad" if change < 0 else ""
            detail = f"{change:+.1f} points, step {first[0]} → {last[0]}"
            cards.append(KeyNumber(f"validation {name}", f"{percent(first[1])} → {percent(last[1])}", detail, tone))
    rewards = [value for _, value in _known(records, "reward/mean")]
    if rewards:
        cards.append(KeyNumber("training reward", f"{rewards[0]:.2f} → {rewards[-1]:.2f}", "first and last step"))
    start = as_number(summary.get("seconds_to_first_step"))
    if start is None:
        start = next((value for _, value in _known(records, "time/to_first_step")), None)
    if start is not None:
        cards.append(KeyNumber("to the first step", format_seconds(start), "start-up included"))
    times = [value for step, value in _known(records, "time/step") if step > 0]
    if times:
        cards.append(KeyNumber("per step", format_seconds(statistics.median(times)), f"median of {len(times)}"))
    shares = [value for _, value in _known(records, "rows/train_share")]
    if shares:
        cards.append(KeyNumber("rows that train", percent(statistics.fmean(shares)), "mean over steps"))
    return cards


def alarms(records: Sequence[Record]) -> list[str]:
    """Plain signs that something is wrong, with the steps they were seen at."""
    found: list[str] = []

    def add(text: str, steps: Sequence[int]) -> None:
        if steps:
            found.append(f"{text} ({_steps_text(steps)})")

    for key in ("distill/loss", "actor/grad_norm"):
        # A value that is not finite is written as null; one that was not measured is absent.
        add(f"{key} was not finite", [one["step"] for one in records if key in one and one[key] is None])
    add("no row trained", [step for step, value in _known(records, "rows/train_share") if value == 0])
    add(
        "no question had a success, so no sibling could serve as demonstration",
        [
            record["step"]
            for record in records
            if (counts := _counts(record)) and sum(counts) > 0 and sum(counts[1:]) == 0
        ],
    )
    add("no row had a demonstration", [s for s, value in _known(records, "rows/demonstration_share") if value == 0])
    add(
        "the teacher was no better than the student: gap below 0",
        [s for s, v in _known(records, "teacher/gap") if v < 0],
    )
    add("the verifier failed on some rows", [s for s, value in _known(records, "verifier/errors") if value > 0])
    metric = next((key for record in records if (key := validation_key(record))), None)
    if metric:
        known = _known(records, metric)
        if known[-1][1] < known[0][1]:
            found.append(f"validation {metric.removeprefix('val/')} is lower than before training")
    return found


def charts(records: Sequence[Record], completions: Sequence[Record] = ()) -> list[Chart]:
    """The charts that the run's metrics and completions allow, in the order of reading."""
    steps = [record["step"] for record in records]

    def column(key: str) -> list[float | None]:
        return [as_number(record.get(key)) for record in records]

    def single(title: str, key: str, color: int, **options: Any) -> Chart | None:
        return line_chart(title, steps, [Series(title.lower(), column(key), color)], **options)

    mean, spread = column("pass_rate/mean"), column("pass_rate/std")
    pairs = list(zip(mean, spread, strict=True))
    low = [None if m is None or s is None else max(0.0, m - s) for m, s in pairs]
    high = [None if m is None or s is None else min(1.0, m + s) for m, s in pairs]
    candidates = [
        line_chart(
            "Validation accuracy",
            steps,
            _validation_series(records),
            fmt=percent,
            help="On questions that are not trained on; step 0 is before training.",
        ),
        single("Training reward", "reward/mean", 2, fmt=short, help="Mean reward of all rollouts of the step."),
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
        single("Loss", "distill/loss", 1, help=_loss_help(records)),
        *_pair_charts(steps, column),
        single(
            "Rows that train",
            "rows/train_share",
            3,
            fmt=percent,
            include=(0.0, 1.0),
            help="Share of rows with a loss that is not exactly zero; the others are not forwarded.",
        ),
        single(
            "Effective sample size",
            "weight/effective_sample_size",
            4,
            include=(0.0,),
            help="(Σ w)² / Σ w²: how many questions the weighted update amounts to.",
        ),
        single(
            "Teacher gap",
            "teacher/gap",
            5,
            include=(0.0,),
            y_label="nats a token",
            help="Right answers under the teacher's context minus without it, median; near 0 it teaches nothing.",
        ),
        line_chart(
            "Divergence on the top 5% of tokens",
            steps,
            [
                Series(f"{outcome} answers", column(f"distill/top5_share_{outcome}"), color)
                for outcome, color in (("right", 3), ("wrong", 1))
            ],
            fmt=percent,
            include=(0.0, 1.0),
            help="Share of a response's divergence that falls on 5% of its tokens: high where the teacher objects to "
            "single steps.",
        ),
        _profile_chart(completions),
        line_chart(
            "Reviser",
            steps,
            [
                Series("wrong attempts corrected", column("reviser/correction_rate"), 1, markers=True),
                Series("right attempts kept right", column("reviser/retention"), 3, markers=True),
            ],
            fmt=percent,
            x_label="model",
            include=(0.0, 1.0),
            help="Share of right answers among revisions of the model's own attempts, model by model: "
            + ", ".join(f"{record['step']} {record['stage']}" for record in records if "stage" in record),
        ),
        single("Response length", "response/length", 0, y_label="tokens", help="Mean over the rollouts of the step."),
        single("Gradient norm", "actor/grad_norm", 1, help="Before clipping."),
        stacked_chart(
            "Seconds by phase", steps, _phase_series(records), y_label="seconds", help="Where the time of a step goes."
        ),
    ]
    return [chart for chart in candidates if chart is not None]


def _loss_help(records: Sequence[Record]) -> str:
    if any("preference/margin" in record for record in records):
        return "Preference loss. With unfiltered pairs it falls to log 2 = 0.693, where student and teacher agree."
    return "Weighted divergence between student and teacher."


def _pair_charts(steps: list[int], column: Callable[[str], list[float | None]]) -> list[Chart | None]:
    """What the preference loss on pairs looks at."""
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


def choose_completions(rows: Sequence[Record], limit: int) -> list[Record]:
    """At most ``limit`` completions, from steps spread evenly over the run, the first and the last one included."""
    by_step: dict[Any, list[Record]] = {}
    for row in rows:
        by_step.setdefault(row.get("step"), []).append(row)
    groups = list(by_step.values())
    wanted = max(1, min(len(groups), limit // 4))
    last = len(groups) - 1
    picked = sorted({round(index * last / max(1, wanted - 1)) for index in range(wanted)}) if groups else []
    each = limit // max(1, len(picked))
    return [row for index in picked for row in groups[index][:each]]


def _validation_series(records: Sequence[Record]) -> list[Series]:
    """A curve for each data set and kind of accuracy, at the largest k that was measured."""
    largest: dict[tuple[str, str], tuple[int, str]] = {}
    for key in {key for record in records for key in record}:
        match = re.fullmatch(r"val/(?:(.+)/)?(mean|maj|pass)@(\d+)", key)
        if match and _known(records, key):
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


def _known(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    return [(one["step"], value) for one in records if (value := as_number(one.get(key))) is not None]


def _steps_text(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) <= 6:
        return "steps " + ", ".join(map(str, steps))
    return f"{len(steps)} steps, first {steps[0]}, last {steps[-1]}"
