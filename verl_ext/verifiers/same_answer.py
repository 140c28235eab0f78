"""Whether two answers are the same by another verifier's rule: its ``equivalent``, run like a verifier in the pool."""

from __future__ import annotations

import sys
from typing import Any

from verl_ext.verifier_process import load_function
from verl_ext.verifiers.result import verdict


def warm_up(verifier: str) -> None:
    """Loads the other verifier, and what it would load at its first use: on no pair's time."""
    function = _loaded[verifier] = load_function(verifier)
    getattr(sys.modules.get(getattr(function, "__module__", "")), "warm_up", lambda: None)()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    verifier: str,
) -> dict[str, Any]:
    """Compare two ``pred`` values.

    Args:
        data_source, extra_info: not used.
        solution_str: one answer.
        ground_truth: the other.
        verifier: ``package.module:function`` or ``path/to/file.py:function``, whose module has ``equivalent``.

    Returns:
        A dict in the shape of :mod:`verl_ext.verifiers.result`: ``acc`` 1.0 where both are the same answer.
    """
    if verifier not in _loaded:
        warm_up(verifier)
    same = _loaded[verifier].__globals__["equivalent"](ground_truth, solution_str)
    return verdict(bool(same), pred="", well_formed=True)


_loaded: dict[str, Any] = {}
