"""A teacher of another vocabulary or tokenizer is refused before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recipe.compose import ROOT, compose_config
from recipe.preflight import check_teacher
from verl_ext.config import ConfigError
from verl_ext.vocabulary import check_same_vocabulary

STUDENT = ROOT / "models" / "tiny_world" / "plain"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A copy of the student without its weights."""
    folder = tmp_path / "teacher"
    shutil.copytree(STUDENT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_the_same_vocabulary_passes_whatever_else_differs(teacher):
    change(teacher / "config.json", lambda config: config.update(intermediate_size=96))
    check_same_vocabulary(str(STUDENT), str(teacher))


def test_another_size_is_refused_with_both(teacher):
    change(teacher / "config.json", lambda config: config.update(vocab_size=160))
    with pytest.raises(ConfigError, match=r"vocabulary of 160 tokens.*one of 128"):
        check_same_vocabulary(str(STUDENT), str(teacher))


def test_another_tokenizer_of_the_same_size_is_refused_with_the_first_token_that_differs(teacher):
    def swap(tokenizer: dict) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        one, other = [token for token, number in sorted(vocabulary.items(), key=lambda item: item[1])][40:42]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    change(teacher / "tokenizer.json", swap)
    with pytest.raises(ConfigError, match=r"differ in 4 entries, the first is .* as number 40"):
        check_same_vocabulary(str(STUDENT), str(teacher))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match="distill.teacher.path.*cannot be read"):
        check_same_vocabulary(str(STUDENT), str(tmp_path))


def test_the_preflight_compares_the_external_teacher(teacher):
    change(teacher / "config.json", lambda config: config.update(vocab_size=160))
    config = compose_config(["teacher=external", f"distill.teacher.path={teacher}"])
    with pytest.raises(ConfigError, match="160"):
        check_teacher(config)
    check_teacher(compose_config(["method=grpo", "teacher=external", f"distill.teacher.path={teacher}"]))


def test_a_support_larger_than_the_vocabulary_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="topk is 129; allowed: up to 128"):
        check_teacher(compose_config(["distill.divergence.topk=129"]))
    check_teacher(compose_config(["distill.divergence.topk=129", "divergence=jsd_full"]))
