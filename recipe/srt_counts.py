"""Counts of a collection: how many attempts, revisions and traces, by branch, and why the others gave none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipe.srt_attempts import ATTEMPT_FAULTS, BRANCHES, RIGHT, WRONG, RevisionPlan
from recipe.srt_traces import REVISION_FAULTS, Collected


def totals(questions: int, plan: RevisionPlan, collected: Collected) -> dict[str, Any]:
    """Both branches together."""
    return {
        "questions": questions,
        "attempts": plan.judged.total(),
        "right": plan.judged[RIGHT],
        "wrong": plan.judged[WRONG],
        "mean": plan.mean,
        "revisions": collected.revisions.total(),
        "correction_rate": collected.rate(WRONG),
        "retention": collected.rate(RIGHT),
        "traces": len(collected.traces),
        "traces_right": collected.count(RIGHT),
        "traces_wrong": collected.count(WRONG),
    }


def dropped(plan: RevisionPlan, collected: Collected) -> dict[str, int]:
    """Flat, every reason with its number, 0 too; both branches and the attempts without a verdict together."""
    found = {f"dropped_attempts_{reason}": 0 for reason in ATTEMPT_FAULTS}
    found |= {f"dropped_revisions_{reason}": 0 for reason in REVISION_FAULTS}
    for kind, left_out in (("attempts", plan.left_out), ("revisions", collected.left_out)):
        for (_, reason), count in left_out.items():
            found[f"dropped_{kind}_{reason}"] += count
    return found


def by_branch(plan: RevisionPlan, collected: Collected) -> dict[str, dict[str, Any]]:
    """For the manifest."""
    return {
        branch: {
            "attempts": plan.judged[branch],
            "revised": plan.revised(branch),
            "revisions": collected.revisions[branch],
            "revisions_right": collected.right[branch],
            "share_right": collected.rate(branch),
            "traces": collected.count(branch),
            "dropped_attempts": {reason: plan.left_out[branch, reason] for reason in ATTEMPT_FAULTS},
            "dropped_revisions": {reason: collected.left_out[branch, reason] for reason in REVISION_FAULTS},
        }
        for branch in BRANCHES
    }


def listed(left_out: Mapping[tuple[str, str], int], branches: Sequence[str]) -> str:
    """The reasons of some branches with their numbers, in words."""
    return ", ".join(f"{why} {count}" for (branch, why), count in left_out.items() if branch in branches) or "none"


def table(plan: RevisionPlan, collected: Collected) -> str:
    """The branches side by side, for people; reasons that took nothing are not shown."""
    found = by_branch(plan, collected)
    lines = [f"{'':<34}" + "".join(f"{branch:>8}" for branch in BRANCHES)]

    def line(name: str, values: Sequence[int], *, always: bool = True) -> None:
        if always or any(values):
            lines.append(f"{name:<34}" + "".join(f"{value:>8}" for value in values))

    line("attempts", [found[branch]["attempts"] for branch in BRANCHES])
    for reason in ATTEMPT_FAULTS:
        line(f"  not revised: {reason}", [plan.left_out[branch, reason] for branch in BRANCHES], always=False)
    line("revisions", [found[branch]["revisions"] for branch in BRANCHES])
    for reason in REVISION_FAULTS:
        line(f"  no trace: {reason}", [collected.left_out[branch, reason] for branch in BRANCHES], always=False)
    line("traces", [found[branch]["traces"] for branch in BRANCHES])
    return "\n".join(lines)
