"""Validation metrics of a training run. verl's own bootstrap 1,000 resamples per question and prints 60 keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from verl_ext.answer_keys import AnswerKeys
from verl_ext.question_scores import question_scores

QuestionKey: TypeAlias = tuple[str, str]
"""Data source and uid."""


@dataclass
class QuestionAnswers:
    """The answers to one question that count.

    Attributes:
        verdicts: 1 right, 0 wrong (or partly right); a sample that never came back is wrong.
        answers: what the verifier read, None where it read nothing.
        errors: samples that the verifier could not judge; they are not among the verdicts.
        lost: samples that never came back; they are.
    """

    verdicts: list[float] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    errors: int = 0
    lost: int = 0


def group_answers(
    data_sources: list[str],
    uids: list[str],
    reward_infos: Mapping[str, list[Any]],
    expected_counts: Mapping[QuestionKey, int] | None = None,
) -> dict[QuestionKey, QuestionAnswers]:
    """The samples of a validation by question; ``expected_counts`` says how many of each were asked for."""
    accuracy = reward_infos.get("acc") or reward_infos["reward"]
    answers = reward_infos.get("pred") or [None] * len(accuracy)
    statuses = reward_infos.get("status") or ["ok"] * len(accuracy)
    found: dict[QuestionKey, QuestionAnswers] = {}
    for source, uid, verdict, answer, status in zip(data_sources, uids, accuracy, answers, statuses, strict=True):
        question = found.setdefault((str(source), str(uid)), QuestionAnswers())
        if status not in (None, "ok"):
            question.errors += 1
            continue
        question.verdicts.append(float(verdict or 0.0))
        question.answers.append(answer)
    for key, expected in (expected_counts or {}).items():
        question = found.setdefault(key, QuestionAnswers())
        question.lost = max(0, expected - len(question.verdicts) - question.errors)
        question.verdicts += [0.0] * question.lost
        question.answers += [None] * question.lost
    return found


def validation_metrics(
    data_sources: list[str],
    uids: list[str],
    reward_infos: Mapping[str, list[Any]],
    expected_counts: Mapping[QuestionKey, int] | None = None,
    keys: AnswerKeys | None = None,
) -> dict[str, float]:
    """:func:`metrics_of` the samples as verl hands them over."""
    return metrics_of(group_answers(data_sources, uids, reward_infos, expected_counts), keys)


def metrics_of(questions: Mapping[QuestionKey, QuestionAnswers], keys: AnswerKeys | None = None) -> dict[str, float]:
    """mean@k, maj@k and pass@k over all questions, and mean@k per data source where there are several.

    The means of :func:`verl_ext.question_scores.question_scores`, as in `recipe.evaluate`.

    k is the number of samples asked for. A sample that never came back counts as wrong and is counted under
    ``val/missing_samples``; a verifier error is left out of its question's mean and counted under
    ``val/verifier_errors``. pass@k is given for the k that every question has samples for, and not where a verdict
    lies between 0 and 1. ``keys`` says which answers vote together; None: those of equal text.
    """
    counts = {
        "val/missing_samples": float(sum(question.lost for question in questions.values())),
        "val/verifier_errors": float(sum(question.errors for question in questions.values())),
    }
    groups = {key: question for key, question in questions.items() if question.verdicts}
    if not groups:
        return counts

    asked = samples_asked(groups)
    answers_PK = (keys or AnswerKeys())([question.answers for question in groups.values()])
    scores = question_scores([question.verdicts for question in groups.values()], answers_PK, samples=asked)
    values = {f"val/{name}": _mean(shares_P) for name, shares_P in scores.items() if _shown(name)} | counts
    sources = [source for source, _ in groups]
    for source in sorted(set(sources)) if len(set(sources)) > 1 else ():
        rows = zip(scores[f"mean@{asked}"], sources, strict=True)
        values[f"val/{source}/mean@{asked}"] = _mean([share for share, of in rows if of == source])
    return values


def _shown(name: str) -> bool:
    """Powers of two are enough for a curve."""
    metric, _, k = name.partition("@")
    return metric != "pass" or int(k).bit_count() == 1


def _mean(shares_P: list[float]) -> float:
    return sum(shares_P) / len(shares_P)


def samples_asked(questions: Mapping[QuestionKey, QuestionAnswers]) -> int:
    """The k of mean@k; 0 without a question that was judged."""
    judged = (question for question in questions.values() if question.verdicts)
    return max((len(question.verdicts) + question.errors for question in judged), default=0)
