"""Summary of one evaluation: mean@K, maj@K and pass@1 … pass@K with intervals over questions.

Shapes: P questions, K samples each. All values are shares in [0, 1].
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from recipe.score_interval import share_interval
from verl_ext.question_scores import question_scores


def summarize(
    correct_PK: Sequence[Sequence[float]],
    answers_PK: Sequence[Sequence[Hashable | None]] | None = None,
    *,
    samples: int | None = None,
    ks: Sequence[int] | None = None,
    level: float = 0.95,
) -> dict[str, dict[str, float]]:
    """mean@K, maj@K where answers are given, and pass@k.

    The intervals speak about other questions of the same kind, answered by the same run: they hold the choice of
    questions and the sampling of answers, not another training run (:mod:`recipe.intervals` has those). The procedure
    is :func:`recipe.score_interval.share_interval` on one value a question.

    Args:
        correct_PK: [P, K] verdicts: 1 right, 0 wrong. Shares in between (partly right) are averaged, but have no
            pass@k.
        answers_PK: [P, K] canonical keys of the answers; equal keys vote together, and None or an empty text does not
            vote. Which answers are equivalent is the verifier's business (:mod:`verl_ext.answer_keys`): "1/2" and "0.5"
            are two answers here.
        samples: K, where questions may have fewer verdicts, because the verifier could not judge all. None: all
            questions have as many.
        ks: of pass@k; by default 1 … K (or the fewest verdicts of a question), or none where a verdict is neither 0
            nor 1.
        level: of confidence, in (0, 1).

    Returns:
        Keys such as ``"mean@16"``, ``"maj@16"``, ``"pass@4"``; each ``{"value", "low", "high"}``.

    Raises:
        ValueError: no question or no sample, questions with differing numbers of samples (without ``samples``), or
            more than these, a verdict outside [0, 1], answers of another shape, k larger than the number of samples or
            asked for with verdicts between 0 and 1.
    """
    correct = [[float(verdict) for verdict in row] for row in correct_PK]
    samples = _samples(correct, samples)
    if answers_PK is not None:
        _check_answers(answers_PK, correct)
    scores = question_scores(correct, answers_PK, samples=samples, ks=ks)
    return {key: share_with_interval(shares_P, level) for key, shares_P in scores.items()}


def share_with_interval(shares_P: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """The mean of one share a question, ``{"value", "low", "high"}``; see :func:`summarize`."""
    # Rounding may leave a share of exactly 1 a little above.
    clipped_P = np.clip(shares_P, 0.0, 1.0)
    low, high = share_interval(clipped_P, level)
    return {"value": float(clipped_P.mean()), "low": low, "high": high}


def _samples(correct: Sequence[Sequence[float]], asked: int | None) -> int:
    if not correct:
        raise ValueError("no questions to summarise")
    samples = len(correct[0]) if asked is None else asked
    for question, row in enumerate(correct):
        if not row:
            raise ValueError(f"question {question} has no samples")
        if asked is not None and len(row) > asked:
            raise ValueError(f"question {question} has {len(row)} samples, asked for {asked}")
        if asked is None and len(row) != samples:
            raise ValueError(
                f"question {question} has {len(row)} samples, question 0 has {samples}; expected as many of each"
            )
        for verdict in row:
            if not 0 <= verdict <= 1:
                raise ValueError(f"verdicts must lie in [0, 1]; question {question} has {verdict:g}")
    return samples


def _check_answers(answers_PK: Sequence[Sequence[Any]], correct: Sequence[Sequence[float]]) -> None:
    if len(answers_PK) != len(correct):
        raise ValueError(f"answers of {len(answers_PK)} questions for verdicts of {len(correct)}")
    for question, (answers, verdicts) in enumerate(zip(answers_PK, correct, strict=True)):
        if len(answers) != len(verdicts):
            raise ValueError(f"question {question} has {len(verdicts)} verdicts for {len(answers)} answers")
