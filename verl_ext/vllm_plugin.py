"""Entry point of the group ``vllm.general_plugins``: vLLM calls it in its server, engine and worker processes."""

from __future__ import annotations

import os


def register() -> None:
    """Names the socket of weight updates; prepares vLLM's CPU build for them where that is what runs."""
    from verl_ext import compat

    compat.receive_weights_on_own_socket()
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        compat.answer_for_vllm_version()
        compat.keep_vllm_linear_weights()
        compat.requests_without_an_adapter()
