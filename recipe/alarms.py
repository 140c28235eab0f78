"""Signs that a run goes wrong, read from its metrics and sampled completions.

Every check has a threshold in words, says at which step it was first crossed and by which value, and what to do. A
check whose metrics were not written is "not measured", which is not the same as quiet. Pure: no files, no verl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe import alarm_looks as looks
from recipe.alarm_looks import (
    ACCURACY_POINTS,
    BELOW_START,
    DEMONSTRATIONS,
    DRIFT,
    ENTROPY_LEFT,
    LEAK_ROWS,
    LEAK_SHARE,
    LEAK_WINDOW,
    LENGTH_LEFT,
    REWARD_LOST,
    TRUNCATED,
    WEIGHT_SHARE,
    WINDOW,
    Look,
    Record,
    RunView,
    Sighting,
)

ALARM, QUIET, NOT_MEASURED = "alarm", "quiet", "not measured"


@dataclass(frozen=True)
class Rule:
    """What is looked for: a name for what is wrong, the threshold in words, what to do, and the look itself."""

    name: str
    threshold: str
    advice: str
    look: Look


@dataclass(frozen=True)
class Check:
    """One check of a run: ``step`` is the first step of the alarm, ``value`` the worst value, ``seen`` all steps."""

    name: str
    threshold: str
    advice: str
    state: str
    step: int | None = None
    value: str = ""
    seen: str = ""

    def line(self) -> str:
        """The alarm in one line, for a terminal."""
        return f"{self.name} ({self.seen}): {self.value}; threshold: {self.threshold}. {self.advice}"


def check_run(
    records: Sequence[Record], completions: Sequence[Record] = (), config: Mapping[str, Any] | None = None
) -> list[Check]:
    """All checks, alarms first.

    Args:
        records: of ``metrics.jsonl``, in the order of steps.
        completions: of ``completions.jsonl``.
        config: the resolved configuration; without it the leak of the teacher's phrases is not measured.
    """
    distill = (config or {}).get("distill")
    run = RunView(records, completions, distill if isinstance(distill, Mapping) else {})
    found = [_checked(rule, rule.look(run)) for rule in CHECKS]
    return sorted(found, key=lambda one: (ALARM, QUIET, NOT_MEASURED).index(one.state))


def alarms(checks: Sequence[Check]) -> list[Check]:
    """Those that were crossed."""
    return [one for one in checks if one.state == ALARM]


def _checked(rule: Rule, sightings: list[Sighting] | None) -> Check:
    words = (rule.name, rule.threshold, rule.advice)
    if not sightings:
        return Check(*words, NOT_MEASURED if sightings is None else QUIET)
    worst = max(sightings, key=lambda one: one.badness)
    steps = [one.step for one in sightings]
    value = worst.value if len(steps) == 1 else f"{worst.value} at step {worst.step}"
    return Check(*words, ALARM, steps[0], value, steps_text(steps))


def steps_text(steps: Sequence[int]) -> str:
    """Steps in few words."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) <= 4:
        return "steps " + ", ".join(map(str, steps))
    return f"{len(steps)} steps, first {steps[0]}, last {steps[-1]}"


CHECKS = (
    Rule(
        "loss or gradient was not finite",
        "every value finite",
        "The step was skipped; non_finite.jsonl holds its rows. A lower learning rate or clip_grad.",
        looks.not_finite,
    ),
    Rule(
        "accuracy collapsed",
        f"validation lower than its best by a third of it and by {100 * ACCURACY_POINTS:.0f} points",
        "Take the checkpoint of the best step. A slower teacher (distill.teacher.update_rate, teacher=frozen) or a "
        "lower learning rate.",
        looks.accuracy_collapsed,
    ),
    Rule(
        "validation ended below its start",
        f"more than {100 * BELOW_START:.0f} points below the first validation",
        "Compare with method=grpo on the same data; look at the intervals before believing it.",
        looks.below_start,
    ),
    Rule(
        "training reward collapsed",
        f"mean of {WINDOW} steps under {100 * REWARD_LOST:.0f}% of the best such mean",
        "The same as for accuracy; look at the completions of that step for a broken format.",
        looks.reward_collapsed,
    ),
    Rule(
        "responses became short without becoming better",
        f"mean length of {WINDOW} steps under {100 * LENGTH_LEFT:.0f}% of the first {WINDOW}, the reward not higher",
        "The teacher may have lost the reasoning: remove_thinking, demonstration=random; read the completions.",
        looks.length_collapsed,
    ),
    Rule(
        "entropy collapsed",
        f"mean of {WINDOW} steps under {100 * ENTROPY_LEFT:.0f}% of the first {WINDOW}",
        "A higher temperature, a slower teacher, a lower learning rate, or divergence=jsd in place of a reverse KL.",
        looks.entropy_collapsed,
    ),
    Rule(
        "the teacher drifted",
        f"its entropy beyond a factor of {DRIFT:.0f} of its start, or the divergence above {DRIFT:.0f} times its start",
        "teacher=frozen or a smaller distill.teacher.update_rate; a shorter context.",
        looks.teacher_drifted,
    ),
    Rule(
        "the teacher was no better than the student",
        f"median gap on right answers of {WINDOW} steps below 0",
        "The model may not read this context: look at the teacher contexts of the completions; distill.context.*.",
        looks.negative_gap,
    ),
    Rule(
        "hardly any row had a demonstration",
        f"under {100 * DEMONSTRATIONS:.0f}% of the rows over {WINDOW} steps",
        "Easier questions, more rollouts (actor_rollout_ref.rollout.n), or distill.context.feedback=true.",
        looks.no_demonstrations,
    ),
    Rule(
        "no question had a success",
        "at least one question with a right answer in every step",
        "Easier questions or more rollouts; check the verifier on the completions.",
        looks.no_success,
    ),
    Rule(
        "no row trained",
        "some row with a loss in every step",
        "All questions solved or none: another mix of difficulty, distill.weighting.floor_zero and floor_one.",
        looks.nothing_trains,
    ),
    Rule(
        "few questions carried the weight",
        f"effective sample size under {100 * WEIGHT_SHARE:.0f}% of the questions over {WINDOW} steps",
        "distill.weighting.cap, normalizer=mean_active, or a larger batch.",
        looks.few_weights,
    ),
    Rule(
        "the student writes the teacher's words",
        f"phrases of the teacher's prompt in more than {100 * LEAK_SHARE:.0f}% of {LEAK_WINDOW} responses, at least "
        f"{LEAK_ROWS} of them; phrases that it wrote before training do not count",
        "Another template (distill.context.*_template), or distill.divergence.skip_tokens; filter such rows.",
        looks.leak,
    ),
    Rule(
        "responses were cut",
        f"more than {100 * TRUNCATED:.0f}% at data.max_response_length over {WINDOW} steps",
        "Raise data.max_response_length: a cut answer counts as wrong.",
        looks.truncated,
    ),
    Rule(
        "the verifier failed",
        "no error and no timeout",
        "python -m data_prep.validate FILE; verifier.time_limit, verifier.memory_mib.",
        looks.verifier_failed,
    ),
)
