"""Entry point of the group ``vllm.general_plugins``: vLLM calls it in its server, engine and worker processes."""

from __future__ import annotations

import os


def register() -> None:
    """Names the socket of weight updates, ends a server whose engine died; prepares vLLM's CPU build where it runs."""
    from verl_ext import compat

    compat.receive_weights_on_own_socket()
    compat.end_server_with_its_engine()
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        compat.answer_for_vllm_version()
        compat.keep_vllm_linear_weights()
        compat.requests_without_an_adapter()
