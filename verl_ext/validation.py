"""Validation metrics of a training run. verl's own bootstrap 1,000 resamples per question and prints 60 keys."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from verl_ext.sample_statistics import maj_at_k, mean_at_k, pass_at_k


def validation_metrics(
    data_sources: list[str],
    uids: list[str],
    reward_infos: dict[str, list[Any]],
    expected_counts: dict[tuple[str, str], int] | None = None,
) -> dict[str, float]:
    """mean@k, maj@k and pass@k over all questions, and mean@k per data source where there are several.

    A sample that never came back counts as wrong (``expected_counts`` says how many were asked for) and is counted
    under ``val/missing_samples``; a verifier error is left out and counted under ``val/verifier_errors``.
    """
    accuracy = reward_infos.get("acc") or reward_infos["reward"]
    answers = reward_infos.get("pred") or [None] * len(accuracy)
    statuses = reward_infos.get("status") or ["ok"] * len(accuracy)
    groups: dict[tuple[str, str], list[tuple[float, Any]]] = defaultdict(list)
    errors = 0
    for source, uid, verdict, answer, status in zip(data_sources, uids, accuracy, answers, statuses, strict=True):
        if status not in (None, "ok"):
            errors += 1
            continue
        groups[str(source), str(uid)].append((float(verdict or 0.0), answer))
    missing = 0
    for key, expected in (expected_counts or {}).items():
        lost = expected - len(groups[key])
        if lost > 0:
            missing += lost
            groups[key] += [(0.0, None)] * lost
    missing = max(0, missing - errors)
    if not groups:
        return {"val/missing_samples": float(missing), "val/verifier_errors": float(errors)}

    correct = [[verdict for verdict, _ in rows] for rows in groups.values()]
    samples = min(len(rows) for rows in correct)
    values = {
        f"val/mean@{samples}": mean_at_k(correct),
        f"val/maj@{samples}": maj_at_k(correct, [[answer for _, answer in rows] for rows in groups.values()]),
        "val/missing_samples": float(missing),
        "val/verifier_errors": float(errors),
    }
    for k in (2**i for i in range(samples.bit_length()) if 2**i <= samples):
        values[f"val/pass@{k}"] = sum(pass_at_k(len(rows), int(sum(rows)), k) for rows in correct) / len(correct)
    sources = sorted({source for source, _ in groups})
    for source in sources if len(sources) > 1 else ():
        part = [[verdict for verdict, _ in rows] for (name, _), rows in groups.items() if name == source]
        values[f"val/{source}/mean@{samples}"] = mean_at_k(part)
    return values
