"""What must not leave the machine: passwords, keys and access tokens that stand in a configuration or a message.

Recognised by three signs, each of which is enough: the name of the key, the form of the value (a password in an
address, the prefixes of well-known services), or being the value of an environment variable with such a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"

# "token" also is a word of language models: eos_token, image_token.
_NAME = re.compile(
    r"(?:^|[_\-.])(?:(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!mask_)(?<!stop_)(?<!image_)token"
    r"|secrets?|passwords?|passwd|passphrase|api_?keys?|access_?keys?(?:_id)?|private_?keys?|credentials?|authorization)$",
    re.IGNORECASE,
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]*(?=@)")
_OF_A_SERVICE = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})")
# A shorter value would be found inside words.
_SHORTEST = 8


def names_a_secret(key: str) -> bool:
    """Whether a key of a configuration or an environment variable is named like a secret."""
    return _NAME.search(key) is not None


def redacted(value: Any) -> Any:
    """A copy of plain data (mappings, lists, scalars) with ``HIDDEN`` for every secret; keys stay.

    Numbers, truth values, None and empty texts are kept under any key: ``max_token`` is a limit.
    """
    return _copy(value, _secret_values())


def redacted_text(text: str) -> str:
    """A message without secrets."""
    return _clean(text, _secret_values())


def _copy(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(inner, str) and inner and names_a_secret(str(key)) else _copy(inner, secrets)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_copy(inner, secrets) for inner in value]
    return _clean(value, secrets) if isinstance(value, str) else value


def _clean(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _OF_A_SERVICE.sub(HIDDEN, _IN_ADDRESS.sub(HIDDEN, text))


def _secret_values() -> list[str]:
    """Of environment variables, the longest first, as one may contain another."""
    found = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and names_a_secret(name)}
    return sorted(found, key=len, reverse=True)
