"""The typed ``text`` block of `python -m recipe.teacher_text`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.config import ConfigError


@dataclass
class TeacherTextConfig:
    """What is written of the teacher's samples, and where to.

    Attributes:
        out: folder of ``train.parquet`` and ``manifest.json``.
        key: the field of ``extra_info`` that holds a question's texts; ``distill.sequences.reference_key`` of training.
        only_right: only right texts, each once; else every whole text, also wrong, unjudged and repeated ones: fair
            samples of the teacher.
        per_question: at most so many texts of a question, the first ones; None: all.
    """

    out: str | None = None
    key: str = "teacher_text"
    only_right: bool = True
    per_question: int | None = None

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        if not self.out:
            raise ConfigError("text.out has no value; give the folder of the new training data, text.out=DIR")
        if not isinstance(self.key, str) or not self.key:
            raise ConfigError(f"text.key is {self.key!r}; allowed: the name of a new field of extra_info")
        if not isinstance(self.only_right, bool):
            raise ConfigError(f"text.only_right is {self.only_right!r}; allowed: true, false")
        count = self.per_question
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(f"text.per_question is {count!r}; allowed: a whole number from 1, or null for all")


def text_config(config: DictConfig) -> TeacherTextConfig:
    """The checked ``text`` block. Raises ConfigError."""
    settings = TeacherTextConfig(**OmegaConf.to_container(config.text, resolve=True))
    settings.validate()
    return settings


def defaults() -> dict[str, Any]:
    """Plain values for the Hydra config store."""
    return asdict(TeacherTextConfig())
