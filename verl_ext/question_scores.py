"""Scores of every question: what validation in training and `recipe.evaluate` take their means of.

Shapes: P questions, K samples asked of each. A verdict is 1 (right), 0 (wrong) or a share between; samples that the
verifier could not judge are not among them, so a question may have fewer than K.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from verl_ext.sample_statistics import majority_correct, mean_at_k, pass_at_k


def question_scores(
    correct_PK: Sequence[Sequence[float]],
    answers_PK: Sequence[Sequence[Hashable | None]] | None,
    *,
    samples: int,
    ks: Iterable[int] | None = None,
) -> dict[str, list[float]]:
    """mean@K, maj@K where answers are given, and pass@k of every question.

    Args:
        correct_PK: verdicts, at least one a question.
        answers_PK: keys of the answers; equal keys vote together, None or an empty text does not vote. See
            :mod:`verl_ext.answer_keys` for the keys of answers that the verifier takes for the same.
        samples: K, asked of each question: the number in the names. Those of a question may be fewer.
        ks: of pass@k; None: 1 to the fewest verdicts of a question, or none where a verdict is neither 0 nor 1.

    Returns:
        ``"mean@16"``, ``"maj@16"``, ``"pass@4"`` …, each with [P] shares.

    Raises:
        ValueError: no question, one without verdicts, k larger than the fewest verdicts of a question, or pass@k asked
            for with verdicts between 0 and 1.
    """
    if not correct_PK:
        raise ValueError("no questions to score")
    binary = all(verdict in (0.0, 1.0) for row in correct_PK for verdict in row)
    fewest = min(len(row) for row in correct_PK)
    if ks is None:
        ks = range(1, fewest + 1) if binary else ()
    ks = list(ks)
    if ks and not binary:
        raise ValueError("pass@k needs verdicts of 0 or 1; found one in between")
    counts = [(len(row), int(sum(row))) for row in correct_PK] if ks else []
    passes: dict[int, dict[tuple[int, int], float]] = {
        k: {count: pass_at_k(*count, k) for count in sorted(set(counts))} for k in ks
    }
    scores = {f"mean@{samples}": [mean_at_k([row]) for row in correct_PK]}
    if answers_PK is not None:
        rows = zip(correct_PK, answers_PK, strict=True)
        scores[f"maj@{samples}"] = [majority_correct(correct, answers) for correct, answers in rows]
    for k, by_count in passes.items():
        scores[f"pass@{k}"] = [by_count[count] for count in counts]
    return scores
