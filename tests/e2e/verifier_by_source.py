"""A verifier of one's own (`verifier.function=path/to/file.py:NAME`): every data source has its own function."""

from __future__ import annotations

from typing import Any

from verl_ext.verifiers import multiple_choice, tool_use


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Options are the tool-use verifier's."""
    if data_source.startswith("sciknoweval"):
        return multiple_choice.compute_score(data_source, solution_str, ground_truth, extra_info, require_tags=False)
    return tool_use.compute_score(data_source, solution_str, ground_truth, extra_info, **options)
