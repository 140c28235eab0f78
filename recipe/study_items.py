"""Right answers by question in the rows of a study, so that its methods can be compared question by question.

A row holds, under ``items``, one text of counts per validation, such as "8 0 3" for three questions; which questions
these are stands once per study in ``questions-DIGEST.txt`` beside the rows, one id a line in the same order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_ext.atomic import write_atomically
from verl_ext.config import ConfigError
from verl_ext.sample_statistics import pass_at_k


@dataclass(frozen=True)
class ItemCounts:
    """One validation of a run, question by question.

    Attributes:
        questions: digest of the ids; equal digests are the same questions in the same order.
        samples: k, asked of every question.
        right_P: [P] right answers (their sum, where a verifier gives shares).
        judged_P: [P] answers that the verifier judged.
    """

    questions: str
    samples: int
    right_P: tuple[float, ...]
    judged_P: tuple[float, ...]

    @property
    def mean_P(self) -> tuple[float, ...]:
        """[P] share of right answers; NaN where none was judged."""
        return tuple(
            right / judged if judged else math.nan for right, judged in zip(self.right_P, self.judged_P, strict=True)
        )

    @property
    def mean(self) -> float:
        """mean@k: over the questions that were judged."""
        judged = [value for value in self.mean_P if not math.isnan(value)]
        return sum(judged) / len(judged) if judged else math.nan

    def pass_P(self, k: int) -> tuple[float, ...]:
        """[P] unbiased pass@k; NaN where none was judged.

        Raises:
            ValueError: k larger than the samples of a question, or answers that are neither right nor wrong.
        """
        if any(right != int(right) for right in self.right_P):
            raise ValueError("pass@k needs answers that are right or wrong; some are partly right")
        return tuple(
            pass_at_k(int(judged), int(right), k) if judged else math.nan
            for right, judged in zip(self.right_P, self.judged_P, strict=True)
        )


def pack_items(validations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The ``items`` of a row, from ``validation.jsonl``; None where nothing was validated.

    ``judged`` has a step only where a question has fewer verdicts than samples.

    Raises:
        ValueError: the validations of the run ask different questions.
    """
    if not validations:
        return None
    asked = [list(one["items"]) for one in validations]
    for one, questions in zip(validations, asked, strict=True):
        if questions != asked[0]:
            raise ValueError(f"the validation at step {one['step']} has other questions than the one before it")
    samples = max(int(one["samples"]) for one in validations)
    short = [one for one in validations if any(count != samples for count in one["judged"])]
    return {
        "questions": questions_digest(asked[0]),
        "samples": samples,
        "right": {str(one["step"]): _pack(one["right"]) for one in validations},
        "judged": {str(one["step"]): _pack(one["judged"]) for one in short},
    }


def questions_digest(questions: Sequence[str]) -> str:
    """Of the ids in their order."""
    return hashlib.sha256("\n".join(questions).encode()).hexdigest()[:12]


def unpack_items(row: Mapping[str, Any], step: int | str) -> ItemCounts | None:
    """One validation of a row; None where the row has no counts by question (an older one) or not at this step.

    Raises:
        ConfigError: counts that cannot be; names the run.
    """
    items = row.get("items")
    if not items or str(step) not in items["right"]:
        return None
    where = f"row {row['run_id']}, items of step {step}"
    samples = int(items["samples"])
    right_P = _unpack(items["right"][str(step)], where)
    judged_P = _unpack(items["judged"][str(step)], where) if str(step) in items["judged"] else [samples] * len(right_P)
    if len(judged_P) != len(right_P) or not right_P:
        raise ConfigError(f"{where}: {len(right_P)} counts of right answers and {len(judged_P)} of judged ones")
    for right, judged in zip(right_P, judged_P, strict=True):
        if not 0 <= right <= judged <= samples:
            raise ConfigError(f"{where}: {right:g} right of {judged:g} judged answers, of {samples} samples")
    return ItemCounts(str(items["questions"]), samples, tuple(right_P), tuple(judged_P))


def write_questions(folder: Path, questions: Sequence[str]) -> Path:
    """Keeps the ids that a digest stands for; nothing happens where they are there."""
    path = _path(folder, questions_digest(questions))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{one}\n" for one in questions))
    return path


def read_question_ids(folder: Path, digest: str) -> list[str] | None:
    """The ids behind a digest; None where the file is not there. Raises ConfigError where it holds other ids."""
    path = _path(folder, digest)
    if not path.exists():
        return None
    questions = path.read_text(encoding="utf-8").splitlines()
    if questions_digest(questions) != digest:
        raise ConfigError(f"{path} holds other questions than its name says; take it from version control again")
    return questions


def _path(folder: Path, digest: str) -> Path:
    return folder / f"questions-{digest}.txt"


def _pack(counts: Sequence[float]) -> str:
    return " ".join(repr(count) for count in counts)


def _unpack(text: str, where: str) -> list[float]:
    try:
        return [float(part) for part in text.split()]
    except ValueError:
        raise ConfigError(f"{where}: expected numbers, found {text[:60]!r}") from None
