"""Validation metrics of a training run. verl's own bootstrap 1,000 resamples per question and prints 60 keys."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from verl_ext.answer_keys import AnswerKeys
from verl_ext.question_scores import question_scores


def validation_metrics(
    data_sources: list[str],
    uids: list[str],
    reward_infos: dict[str, list[Any]],
    expected_counts: dict[tuple[str, str], int] | None = None,
    keys: AnswerKeys | None = None,
) -> dict[str, float]:
    """mean@k, maj@k and pass@k over all questions, and mean@k per data source where there are several.

    The means of :func:`verl_ext.question_scores.question_scores`, as in `recipe.evaluate`.

    k is the number of samples asked for. A sample that never came back counts as wrong (``expected_counts`` says how
    many were asked for) and is counted under ``val/missing_samples``; a verifier error is left out of its question's
    mean and counted under ``val/verifier_errors``. pass@k is given for the k that every question has samples for, and
    not where a verdict lies between 0 and 1. ``keys`` says which answers vote together; None: those of equal text.
    """
    accuracy = reward_infos.get("acc") or reward_infos["reward"]
    answers = reward_infos.get("pred") or [None] * len(accuracy)
    statuses = reward_infos.get("status") or ["ok"] * len(accuracy)
    groups: dict[tuple[str, str], list[tuple[float, Any]]] = defaultdict(list)
    errors: Counter[tuple[str, str]] = Counter()
    for source, uid, verdict, answer, status in zip(data_sources, uids, accuracy, answers, statuses, strict=True):
        key = str(source), str(uid)
        if status not in (None, "ok"):
            errors[key] += 1
            continue
        groups[key].append((float(verdict or 0.0), answer))
    missing = 0
    for key, expected in (expected_counts or {}).items():
        lost = expected - len(groups.get(key, ())) - errors[key]
        if lost > 0:
            missing += lost
            groups[key] += [(0.0, None)] * lost
    counts = {"val/missing_samples": float(missing), "val/verifier_errors": float(errors.total())}
    if not groups:
        return counts

    correct = [[verdict for verdict, _ in rows] for rows in groups.values()]
    answers_PK = (keys or AnswerKeys())([[answer for _, answer in rows] for rows in groups.values()])
    asked = max(len(rows) + errors[key] for key, rows in groups.items())
    scores = question_scores(correct, answers_PK, samples=asked)
    sources = [source for source, _ in groups]
    values = {f"val/{name}": _mean(shares_P) for name, shares_P in scores.items() if _shown(name)} | counts
    for source in sorted(set(sources)) if len(set(sources)) > 1 else ():
        shares_P = scores[f"mean@{asked}"]
        values[f"val/{source}/mean@{asked}"] = _mean(
            [s for s, of in zip(shares_P, sources, strict=True) if of == source]
        )
    return values


def _shown(name: str) -> bool:
    """Powers of two are enough for a curve."""
    metric, _, k = name.partition("@")
    return metric != "pass" or int(k).bit_count() == 1


def _mean(shares_P: list[float]) -> float:
    return sum(shares_P) / len(shares_P)
