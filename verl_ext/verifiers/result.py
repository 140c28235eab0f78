"""The one shape of a verdict. A verifier is a function

    compute_score(data_source, solution_str, ground_truth, extra_info=None, **options) -> dict

and returns what :func:`verdict` or :func:`failure` makes. The keys are the same in every case, because verl turns the
dicts of a batch into columns. Standard library only: verifiers are loaded in many small processes.
"""

from __future__ import annotations

from typing import Any

KEYS = ("score", "acc", "pred", "format", "feedback", "status", "error")
OK, ERROR, TIMEOUT = "ok", "error", "timeout"
STATUSES = (OK, ERROR, TIMEOUT)
FAILURES = (ERROR, TIMEOUT)


def verdict(right: bool, *, pred: str, well_formed: bool, feedback: str = "") -> dict[str, Any]:
    """The verifier did its work and found the response right or wrong (status ``ok`` either way).

    Args:
        right: whether the response counts as right: score and acc 1.0, else 0.0.
        pred: the answer it found, in a form in which equal answers are mostly equal strings; "" where it found none.
        well_formed: whether the response has the shape that the prompt asks for.
        feedback: words for the model on a wrong attempt. They never contain the gold answer; dropped where right.
    """
    value = 1.0 if right else 0.0
    return {
        "score": value,
        "acc": value,
        "pred": pred,
        "format": 1.0 if well_formed else 0.0,
        "feedback": "" if right else feedback,
        "status": OK,
        "error": "",
    }


def same_text(answer_a: str, answer_b: str) -> bool:
    """``equivalent`` of a verifier whose equal answers are equal ``pred`` texts; "" (no answer) equals nothing."""
    return answer_a != "" and answer_a == answer_b


def failure(error: str, *, status: str = ERROR) -> dict[str, Any]:
    """The verifier, or the row, is broken: this says nothing about the response.

    Such a row is left out of the pass rate and of the means, and counted.

    Raises:
        ValueError: ``status`` is neither ``error`` nor ``timeout``.
    """
    if status not in FAILURES:
        raise ValueError(f"status={status!r} is not allowed; expected one of {FAILURES}")
    return {"score": 0.0, "acc": 0.0, "pred": "", "format": 0.0, "feedback": "", "status": status, "error": error}
