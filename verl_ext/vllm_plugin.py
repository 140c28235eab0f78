"""Entry point of the group ``vllm.general_plugins``: vLLM calls it in its server, engine and worker processes."""

from __future__ import annotations

import os


def register() -> None:
    """Prepares vLLM's CPU build for weight updates; does nothing elsewhere."""
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from verl_ext import compat

        compat.answer_for_vllm_version()
        compat.keep_vllm_linear_weights()
        compat.requests_without_an_adapter()
