"""Do two models speak of the same tokens? Their distributions can only be compared if they do."""

from __future__ import annotations

from typing import Any

from verl_ext.config import ConfigError


def check_same_vocabulary(student: str, teacher: str, *, trust_remote_code: bool = False) -> None:
    """Compares the rows of the heads and the tokenizers of two models, given by folder or hub name.

    Raises:
        ConfigError: they differ, with both sizes or the first token that differs; or a model cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    sizes, tokens = [], []
    for key, path in (("actor_rollout_ref.model.path", student), ("distill.teacher.path", teacher)):
        config = _read(AutoConfig, key, path, trust_remote_code)
        sizes.append(config.get_text_config().vocab_size)
        tokens.append(_read(AutoTokenizer, key, path, trust_remote_code).get_vocab())
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"distill.teacher.path: {teacher} has a vocabulary of {sizes[1]} tokens, the student {student} one of "
            f"{sizes[0]}; token by token only models with the same vocabulary can be compared"
        )
    if tokens[0] != tokens[1]:
        different = sorted(set(tokens[0].items()) ^ set(tokens[1].items()), key=lambda item: (item[1], item[0]))
        token, number = different[0]
        raise ConfigError(
            f"distill.teacher.path: the tokenizers of {teacher} ({len(tokens[1])} tokens) and of the student {student} "
            f"({len(tokens[0])} tokens) differ in {len(different)} entries, the first is {token!r} as number {number}"
        )


def _read(loader: Any, key: str, path: str, trust_remote_code: bool) -> Any:
    try:
        return loader.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub raise many kinds
        raise ConfigError(f"{key}: {path} cannot be read: {type(error).__name__}: {error}") from error
