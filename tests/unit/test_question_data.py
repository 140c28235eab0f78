"""Questions of parquet files: repeats, contradictions, and messages that name the file, the row and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
from omegaconf import OmegaConf

from verl_ext.config_values import ConfigError
from verl_ext.question_data import file_list, read_questions


def row(question: str | None, answer: str = "2", **changed: Any) -> dict[str, Any]:
    values = {
        "prompt": [{"role": "user", "content": f"question {question}"}],
        "data_source": "d",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": 0, "question_id": question},
    }
    return values | changed


def write(folder: Path, name: str, *rows: dict[str, Any]) -> str:
    pandas.DataFrame(list(rows)).to_parquet(folder / name)
    return str(folder / name)


def refused(files: list[str], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_questions(files, "forgetting.files", **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("a", ["a"]),
        (Path("a"), ["a"]),
        (["a", "b"], ["a", "b"]),
        (OmegaConf.create(["a"]), ["a"]),
        ([], []),
    ],
)
def test_a_key_may_name_one_file_several_or_none(value: Any, expected: list[str]) -> None:
    assert file_list(value) == expected


def test_a_question_is_there_once_in_the_order_of_the_files(tmp_path: Path) -> None:
    files = [write(tmp_path, "a", row("q1"), row("q0"), row("q1")), write(tmp_path, "b", row("q2"), row("q0"))]
    requests, repeats = read_questions(files, "k")
    assert [request.question_id for request in requests] == ["q1", "q0", "q2"] and repeats == 2
    assert requests[0].messages[0]["content"] == "question q1" and requests[0].ground_truth == "2"
    assert requests[0].data_source == "d" and requests[0].extra_info["question_id"] == "q1"
    requests, repeats = read_questions(files, "k", limit=2)
    assert [request.question_id for request in requests] == ["q1", "q0"] and repeats == 0


def test_two_answers_to_one_question_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "a", row("q0"), row("q0", "3"))
    assert f"{file} row 1: question q0 was there before with the answer '2', here it is '3'" in refused([file])


def test_bad_files_and_rows_are_named(tmp_path: Path) -> None:
    assert "forgetting.files: " in (message := refused([str(tmp_path / "gone")])) and "does not exist" in message
    (tmp_path / "torn").write_bytes(b"PAR1")
    assert "cannot be read as parquet" in refused([str(tmp_path / "torn")])
    file = write(tmp_path, "a", row("q0"), row(None))
    assert f"{file} row 1: extra_info.question_id is missing" in refused([file])
    file = write(tmp_path, "b", {name: value for name, value in row("q0").items() if name != "reward_model"})
    assert f"{file} row 0: 'reward_model' is missing" in refused([file])
    assert f"{file} row 0: 'question' is missing" in refused([file], prompt_key="question")
    assert "forgetting.files [] holds no question" in refused([])
