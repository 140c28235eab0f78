"""Validation metrics of a training run. verl's own bootstrap 1,000 resamples per question and prints 60 keys."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from verl_ext.sample_statistics import maj_at_k, mean_at_k, pass_at_k


def validation_metrics(
    data_sources: list[str],
    uids: list[str],
    reward_infos: dict[str, list[Any]],
    expected_counts: dict[tuple[str, str], int] | None = None,
) -> dict[str, float]:
    """mean@k, maj@k and pass@k over all questions, and mean@k per data source where there are several.

    k is the number of samples asked for. A sample that never came back counts as wrong (``expected_counts`` says how
    many were asked for) and is counted under ``val/missing_samples``; a verifier error is left out of its question's
    mean and counted under ``val/verifier_errors``. pass@k is given for the k that every question has samples for.
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
    asked = max(len(rows) + errors[key] for key, rows in groups.items())
    values = {
        f"val/mean@{asked}": mean_at_k(correct),
        f"val/maj@{asked}": maj_at_k(correct, [[answer for _, answer in rows] for rows in groups.values()]),
        **counts,
    }
    fewest = min(len(rows) for rows in correct)
    for k in (2**i for i in range(fewest.bit_length()) if 2**i <= fewest):
        values[f"val/pass@{k}"] = sum(pass_at_k(len(rows), int(sum(rows)), k) for rows in correct) / len(correct)
    sources = sorted({source for source, _ in groups})
    for source in sources if len(sources) > 1 else ():
        part = [[verdict for verdict, _ in rows] for (name, _), rows in groups.items() if name == source]
        values[f"val/{source}/mean@{asked}"] = mean_at_k(part)
    return values
