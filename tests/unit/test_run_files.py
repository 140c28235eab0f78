"""Metrics and completions survive killed runs, resumption and odd values; JSON stays strict."""

from __future__ import annotations

import enum
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from recipe.run_files import (
    RunFileError,
    RunFiles,
    _append_lines,
    as_number,
    json_line,
    read_json_lines,
    to_plain,
)
from verl_ext.atomic import write_atomically


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "run", tensorboard=False)


def strict(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_metrics_are_strict_json_whatever_the_trainer_hands_over(files: RunFiles) -> None:
    files.append_metrics(
        3,
        {
            "nan": math.nan,
            "inf": torch.tensor(math.inf),
            "numpy": numpy.float32(0.5),
            "torch": torch.tensor(2.0, dtype=torch.bfloat16),
            "count": numpy.int64(7),
            "flag": numpy.bool_(True),
            "histogram": torch.tensor([1, 0, 2]),
            "array": numpy.array([1.0, math.nan]),
            "text": "ü \ud800 \n",
            "step": 99,
        },
    )
    lines = files.metrics_path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    record = strict(lines[0])
    assert record == {
        "step": 3,
        "nan": None,
        "inf": None,
        "numpy": 0.5,
        "torch": 2.0,
        "count": 7,
        "flag": True,
        "histogram": [1, 0, 2],
        "array": [1.0, None],
        "text": "ü ? \n",
    }


def test_values_without_a_json_form_are_refused_by_key(files: RunFiles) -> None:
    with pytest.raises(TypeError, match=r"metrics\.bad"):
        files.append_metrics(1, {"bad": object()})
    with pytest.raises(TypeError, match="nested"):
        files.append_metrics(1, {"nested": {"a": 1}})
    assert not files.metrics_path.exists()


def test_to_plain_and_as_number() -> None:
    class Kind(enum.Enum):
        JSD = "jsd"

    @dataclass
    class Settings:
        kind: Kind
        path: Path

    assert to_plain(Settings(Kind.JSD, Path("a/b"))) == {"kind": "jsd", "path": "a/b"}
    assert as_number(torch.tensor(1.5)) == 1.5 and as_number(numpy.int32(2)) == 2.0
    assert [as_number(value) for value in (None, True, "1", math.nan, -math.inf, [1.0], object())] == [None] * 7
    assert as_number(10**400) is None
    assert json_line({"a": math.nan, "b": (1, 2)}) == '{"a": null, "b": [1, 2]}'


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_write(files: RunFiles) -> None:
    files.append_metrics(1, {"loss": 1.0})
    with open(files.metrics_path, "a") as file:
        file.write('{"step": 2, "los')
    assert [record["step"] for record in files.read_metrics()] == [1]
    files.append_metrics(2, {"loss": 2.0})
    assert [strict(line)["step"] for line in files.metrics_path.read_text().splitlines()] == [1, 2]


def test_a_whole_last_line_that_only_lacks_its_newline_is_kept(files: RunFiles) -> None:
    files.metrics_path.write_text('{"step": 1}')
    files.append_metrics(2, {})
    assert [record["step"] for record in files.read_metrics()] == [1, 2]


def test_a_torn_multi_byte_character_is_no_error(files: RunFiles) -> None:
    files.append_completions([{"step": 1, "response": "ü"}])
    with open(files.completions_path, "ab") as file:
        file.write('{"step": 2, "response": "ü'.encode()[:-1])
    assert files.read_completions() == [{"step": 1, "response": "ü"}]
    files.append_completions([{"step": 2, "response": "ß"}])
    assert [row["response"] for row in files.read_completions()] == ["ü", "ß"]


def test_corruption_in_the_middle_names_file_and_line(files: RunFiles) -> None:
    files.metrics_path.write_text('{"step": 1}\n{"step": 2,\n{"step": 3}\n')
    with pytest.raises(RunFileError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        files.read_metrics()
    files.metrics_path.write_text('{"step": 1}\n[1, 2]\n')
    with pytest.raises(RunFileError, match=r"line 2: expected a JSON object"):
        files.read_metrics()
    with pytest.raises(RunFileError, match="no such file"):
        read_json_lines(files.output_dir / "other.jsonl")


def test_truncate_to_step(files: RunFiles) -> None:
    for step in range(6):
        files.append_metrics(step, {"loss": step / 10})
        files.append_completions([{"step": step, "n": index} for index in range(2)])
        files.append_validation(step, {"items": ["q"], "right": [step]})
    with open(files.metrics_path, "a") as file:
        file.write('{"step": 6')
    assert files.truncate_to_step(3) == 2
    assert [record["step"] for record in files.read_metrics()] == [0, 1, 2, 3]
    assert [row["step"] for row in files.read_completions()] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row["step"] for row in files.read_validations()] == [0, 1, 2, 3]
    # A run that is resumed validates again at the step of its checkpoint.
    files.append_validation(3, {"items": ["q"], "right": [9]})
    assert files.read_validations()[-1] == {"step": 3, "items": ["q"], "right": [9]}
    assert files.last_step() == 3
    assert files.truncate_to_step(9) == 0
    files.append_metrics(4, {"loss": 9.0})
    assert files.read_metrics()[-1] == {"step": 4, "loss": 9.0}
    assert not list(files.output_dir.glob("*.tmp"))


def test_truncate_without_files(files: RunFiles) -> None:
    assert files.truncate_to_step(3) == 0 and files.last_step() is None and files.read_completions() == []
    assert files.read_validations() == []


def test_the_last_line_of_a_step_counts(files: RunFiles) -> None:
    for step, loss in ((1, 1.0), (2, 2.0), (1, 3.0)):
        files.append_metrics(step, {"loss": loss})
    assert files.read_metrics() == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_metrics_frame(files: RunFiles) -> None:
    assert files.metrics_frame().empty
    files.append_metrics(0, {"val/mean@8": 0.5})
    files.append_metrics(1, {"loss": math.nan, "pass_rate/histogram": [1, 2]})
    files.append_metrics(2, {"loss": 0.25, "pass_rate/histogram": [2, 1]})
    frame = files.metrics_frame()
    assert list(frame.index) == [0, 1, 2] and frame.index.name == "step"
    assert frame["loss"].dtype == float and frame["loss"].isna().tolist() == [True, True, False]
    assert frame.loc[2, "pass_rate/histogram"] == [2, 1]


def test_config_and_summary(files: RunFiles) -> None:
    files.write_config({"method": "sc_sdpo", "weighting": {"alpha": 0.5, "cap": None}, "path": Path("x")})
    assert yaml.safe_load(files.config_path.read_text()) == {
        "method": "sc_sdpo",
        "weighting": {"alpha": 0.5, "cap": None},
        "path": "x",
    }
    files.write_summary({"before": math.nan, "steps": 4})
    assert strict(files.summary_path.read_text()) == {"before": None, "steps": 4}


def test_omegaconf_is_resolved(files: RunFiles) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    files.write_config(omegaconf.OmegaConf.create({"a": 1, "b": "${a}", "c": ["x"]}))
    assert yaml.safe_load(files.config_path.read_text()) == {"a": 1, "b": 1, "c": ["x"]}


def test_tensorboard_holds_the_scalars_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunFiles(tmp_path) as files:
        for step in range(1, 5):
            files.append_metrics(step, {"loss": float(step), "nan": math.nan, "pass_rate/histogram": [1, 2]})
        files.truncate_to_step(2)
        files.append_metrics(3, {"loss": 30.0})
    events = EventAccumulator(str(files.tensorboard_dir))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_kept_row_is_recovered_once_and_only_for_its_step(files: RunFiles) -> None:
    files.append_metrics(1, {"loss": 2.0})
    assert files.recover_pending(2) is False
    files.write_pending(2, {"loss": 1.5, "step": 99})
    assert files.recover_pending(3) is False and files.recover_pending(1) is False
    assert files.recover_pending(2) is True and files.recover_pending(2) is False
    assert [(row["step"], row["loss"]) for row in files.read_metrics()] == [(1, 2.0), (2, 1.5)]
    assert len(files.metrics_path.read_text().splitlines()) == 2


def test_a_row_is_completed_in_place(files: RunFiles) -> None:
    for step in (1, 2):
        files.append_metrics(step, {"loss": float(step)})
    row = files.complete_metrics(1, {"val/mean@8": 0.25, "step": 7})
    assert row == {"step": 1, "loss": 1.0, "val/mean@8": 0.25}
    assert [json.loads(line) for line in files.metrics_path.read_text().splitlines()] == [row, {"step": 2, "loss": 2.0}]


def test_a_full_disk_is_named_with_its_file() -> None:
    # The device that is always full; links and folders have the same error.
    with pytest.raises(RunFileError, match="/dev/full cannot be written: No space left on device.*last checkpoint"):
        _append_lines(Path("/dev/full"), [{"step": 1}])


def test_an_atomic_write_that_fails_names_its_file_and_keeps_the_old_one(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(files.summary_path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*summary\.json'"):
        write_atomically(files.summary_path, "new")
    assert files.summary_path.read_text() == "old"
