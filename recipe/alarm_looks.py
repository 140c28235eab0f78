"""What the checks of a run look at, and what each of them sees: the steps at which a threshold was crossed.

Relative checks compare means over ``WINDOW`` steps with the mean over the first ``WINDOW``, so that one odd step is no
alarm, and need two windows. A look returns None where its metrics were not written. Pure: no files, no verl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from recipe.console_format import validation_key
from recipe.leaks import leaks, template_phrases
from recipe.run_files import as_number

Record = Mapping[str, Any]

WINDOW = 5
ACCURACY_LOST = 1 / 3  # of the best accuracy so far
ACCURACY_POINTS = 0.05  # and at least so much: small test sets jump
BELOW_START = 0.02
REWARD_LOST = 0.5
LENGTH_LEFT = 0.5
TRUNCATED = 0.2
ENTROPY_LEFT = 0.2
DRIFT = 4.0
DEMONSTRATIONS = 0.05
WEIGHT_SHARE = 0.1
LEAK_SHARE, LEAK_ROWS, LEAK_WINDOW = 0.05, 2, 20


@dataclass(frozen=True)
class Sighting:
    """A step at which a threshold was crossed; of several the one with the largest ``badness`` is shown."""

    step: int
    badness: float
    value: str


@dataclass(frozen=True)
class RunView:
    """What the checks look at."""

    records: Sequence[Record]
    completions: Sequence[Record] = ()
    distill: Mapping[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> list[tuple[int, float]]:
        return [(one["step"], value) for one in self.records if (value := as_number(one.get(key))) is not None]

    def ratio(self, above: str, below: str) -> list[tuple[int, float]]:
        """One metric over another, at the steps that have both and where the second is above 0."""
        whole = dict(self.series(below))
        return [(step, value / whole[step]) for step, value in self.series(above) if whole.get(step, 0) > 0]


Look = Callable[[RunView], list[Sighting] | None]


def _windows(
    series: Sequence[tuple[int, float]], size: int = WINDOW, middle: Callable[[list[float]], float] = fmean
) -> list[tuple[int, float]]:
    """Means over ``size`` values in a row, at the step of the last one; over all where there are fewer."""
    size = min(size, len(series))
    return [
        (series[end - 1][0], middle([value for _, value in series[end - size : end]]))
        for end in range(size, len(series) + 1)
        if size
    ]


def _from_start(series: Sequence[tuple[int, float]]) -> tuple[float, list[tuple[int, float]]] | None:
    """The first window's mean and the windows that share no step with it; None where there is no such window."""
    windows = _windows(series)
    later = windows[WINDOW:]
    return (windows[0][1], later) if later else None


def not_finite(run: RunView) -> list[Sighting] | None:
    """Loss or gradient is null in the metrics, or a step was skipped for it."""
    # A value that is not finite is written as null; one that was not measured is absent.
    keys = [key for key in ("distill/loss", "loss", "actor/grad_norm") if any(key in record for record in run.records)]
    if not keys:
        return None
    found = [
        Sighting(record["step"], float(len(bad)), " and ".join(bad))
        for record in run.records
        if (bad := [key for key in keys if key in record and as_number(record[key]) is None])
    ]
    skipped = [Sighting(step, n, "a step was skipped") for step, n in run.series("update/skipped_non_finite") if n > 0]
    known = {one.step for one in found}
    return sorted([*found, *(one for one in skipped if one.step not in known)], key=lambda one: one.step)


def accuracy_collapsed(run: RunView) -> list[Sighting] | None:
    """Validation far below the best before it."""
    series = run.series(_validation(run))
    if len(series) < 2:
        return None
    found, best = [], series[0]
    for step, value in series[1:]:
        lost = best[1] - value
        if lost >= ACCURACY_POINTS and lost > ACCURACY_LOST * best[1]:
            found.append(Sighting(step, lost, f"{100 * value:.1f}%, after {100 * best[1]:.1f}% at step {best[0]}"))
        best = max(best, (step, value), key=lambda one: one[1])
    return found


def below_start(run: RunView) -> list[Sighting] | None:
    """The last validation below the first."""
    series = run.series(_validation(run))
    if len(series) < 2:
        return None
    (_, before), (step, after) = series[0], series[-1]
    if before - after <= BELOW_START:
        return []
    return [Sighting(step, before - after, f"{100 * after:.1f}%, before training {100 * before:.1f}%")]


def _validation(run: RunView) -> str:
    return next((key for record in run.records if (key := validation_key(record))), "")


def reward_collapsed(run: RunView) -> list[Sighting] | None:
    """Training reward far below the best window before it."""
    windows = _windows(run.series("reward/mean"))
    if len(windows) <= WINDOW:
        return None
    found, best = [], windows[0][1]
    for step, value in windows[1:]:
        if best > 0 and value < REWARD_LOST * best:
            found.append(Sighting(step, best - value, f"{value:.3f}, after {best:.3f}"))
        best = max(best, value)
    return found


def length_collapsed(run: RunView) -> list[Sighting] | None:
    """Responses far shorter than at the start, and not better."""
    lengths, rewards = _from_start(run.series("response/length")), _from_start(run.series("reward/mean"))
    if lengths is None:
        return None
    start, later = lengths
    reward_start, reward_later = rewards if rewards else (0.0, [])
    reward_at = dict(reward_later)
    return [
        Sighting(step, start - value, f"{value:.0f} tokens, at the start {start:.0f}")
        for step, value in later
        # Shorter and better is what this family of methods is for.
        if value < LENGTH_LEFT * start and reward_at.get(step, reward_start) <= reward_start
    ]


def entropy_collapsed(run: RunView) -> list[Sighting] | None:
    """The policy's entropy, measured or estimated, far below its start."""
    return _below_share_of_start(run, ("actor/entropy", "student/nll"), ENTROPY_LEFT)


def _below_share_of_start(run: RunView, keys: Sequence[str], share: float) -> list[Sighting] | None:
    for key in keys:
        found = _from_start(run.series(key))
        if found is not None:
            start, later = found
            return [
                Sighting(step, start - value, f"{key} {value:.3g} nats, at the start {start:.3g}")
                for step, value in later
                if start > 0 and value < share * start
            ]
    return None


def teacher_drifted(run: RunView) -> list[Sighting] | None:
    """The teacher's entropy far from its start, or the divergence far above it."""
    found: dict[int, Sighting] = {}
    measured = False
    for key, both_ways in (("teacher/entropy", True), ("distill/divergence", False)):
        windows = _from_start(run.series(key))
        if windows is None:
            continue
        measured = True
        start, later = windows
        for step, value in later:
            if start <= 0 or value <= 0 and not both_ways:
                continue  # a sampled token's or a clipped divergence has either sign, and no ratio
            times = value / start
            if times > DRIFT or (both_ways and times < 1 / DRIFT):
                badness = times if times > 1 else 1 / max(times, 1e-9)
                found.setdefault(step, Sighting(step, badness, f"{key} {value:.3g} nats, at the start {start:.3g}"))
    return sorted(found.values(), key=lambda one: one.step) if measured else None


def negative_gap(run: RunView) -> list[Sighting] | None:
    """The teacher with its context finds right answers less likely than the student does."""
    series = run.series("teacher/gap")
    if not series:
        return None
    # Already a median over rows; the step of few right answers that stands alone must not decide a window either.
    windows = _windows(series, middle=median)
    return [Sighting(step, -value, f"{value:.3g} nats a token") for step, value in windows if value < 0]


def no_demonstrations(run: RunView) -> list[Sighting] | None:
    """Hardly any row has a demonstration or a reference."""
    for key in ("context/with_demonstration", "context/with_reference"):
        series = run.ratio(key, "context/rows")
        if series:
            return [
                Sighting(step, -value, f"{100 * value:.1f}% of the rows")
                for step, value in _windows(series)
                if value < DEMONSTRATIONS
            ]
    return None


def no_success(run: RunView) -> list[Sighting] | None:
    """A step whose questions were all without a right answer."""
    counts = [(one["step"], one["pass_rate/histogram"]) for one in run.records if one.get("pass_rate/histogram")]
    known = [(step, [as_number(n) or 0.0 for n in row]) for step, row in counts if isinstance(row, list)]
    if not known:
        return None
    return [Sighting(step, row[0], f"0 of {row[0]:.0f}") for step, row in known if row[0] > 0 and not any(row[1:])]


def nothing_trains(run: RunView) -> list[Sighting] | None:
    """A step without a row that trains."""
    series = run.series("rows/train_share")
    return [Sighting(step, 1.0, "0%") for step, value in series if value == 0] if series else None


def few_weights(run: RunView) -> list[Sighting] | None:
    """The weight of the batch on few of its questions."""
    series = run.ratio("weight/effective_sample_size", "pass_rate/questions")
    if not series:
        return None
    return [
        Sighting(step, -value, f"{100 * value:.1f}% of the questions")
        for step, value in _windows(series)
        if value < WEIGHT_SHARE
    ]


def truncated(run: RunView) -> list[Sighting] | None:
    """Many responses at the limit of their length."""
    series = run.series("response/truncated")
    if not series:
        return None
    return [Sighting(step, v, f"{100 * v:.1f}% of the responses") for step, v in _windows(series) if v > TRUNCATED]


def verifier_failed(run: RunView) -> list[Sighting] | None:
    """Errors and timeouts of the verifier."""
    errors, timeouts = run.series("verifier/errors"), dict(run.series("verifier/timeouts"))
    if not errors:
        return None
    total = [(step, value + timeouts.get(step, 0.0)) for step, value in errors]
    return [Sighting(step, value, f"{value:.0f} responses") for step, value in total if value > 0]


def leak(run: RunView) -> list[Sighting] | None:
    """Phrases of the teacher's prompt in the student's responses."""
    source = run.distill.get("sequences")
    context = run.distill.get("context")
    # Text that was replayed, or sampled by the teacher, is not the student's.
    own = isinstance(source, Mapping) and source.get("source") in ("student_rollouts", "pairs")
    rows = [row for row in run.completions if row.get("sampled_by") != "teacher"]
    if not own or not isinstance(context, Mapping) or context.get("kind") in (None, "none") or not rows:
        return None
    rows = sorted(rows, key=lambda row: row.get("step") or 0)
    # What the model says before its first update it has not learned from the teacher.
    before = sum((row.get("step") or 0) <= 1 for row in rows)
    phrases = template_phrases(context)
    while own_words := {one.phrase for one in leaks(rows[:before], phrases)}:
        phrases = [phrase for phrase in phrases if phrase not in own_words]
    found = {before + one.row: one.phrase for one in leaks(rows[before:], phrases)}
    sightings: dict[int, Sighting] = {}
    for end in range(before + 1, len(rows) + 1):
        window = range(max(before, end - LEAK_WINDOW), end)
        leaking = [place for place in window if place in found]
        share = len(leaking) / len(window)
        if leaking and leaking[-1] == end - 1 and len(leaking) >= LEAK_ROWS and share > LEAK_SHARE:
            value = f"“{found[end - 1]}” or the like in {len(leaking)} of {len(window)} responses"
            sighting = Sighting(rows[end - 1].get("step") or 0, share, value)
            sightings[sighting.step] = max(sighting, sightings.get(sighting.step, sighting), key=lambda s: s.badness)
    return list(sightings.values())
