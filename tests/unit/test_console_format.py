"""The line of a step, durations, the time left, and which lines of a log explain a failure."""

from __future__ import annotations

import math
from typing import Any

import pytest

from recipe.console import format_header, format_seconds, format_step_line
from recipe.console_format import StepClock, format_number, relevant_lines, validation_key

METRICS: dict[str, Any] = {
    "step": 12,
    "distill/loss": 0.04812,
    "reward/mean": 0.41,
    "pass_rate/mean": 0.41,
    "pass_rate/std": 0.312,
    "rows/train_share": 0.53,
    "weight/effective_sample_size": 31.24,
    "teacher/gap": -0.0123,
    "val/mean@8": 0.4551,
    "val/maj@8": 0.5,
    "time/step": 21.3,
    "time/rollout": 12.1,
    "time/student_pass": 1.2,
    "time/teacher_pass": 2.3,
    "time/update": 4.1,
    "time/weight_sync": 1.5,
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (12, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (2 * 86400 + 3 * 3600, "2 d 03 h"),
        (None, "-"),
        (math.nan, "-"),
        (-1, "-"),
    ],
)
def test_format_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_step_line_has_every_figure_under_its_title() -> None:
    header, line = format_header(40), format_step_line(METRICS, 40, 542.0)
    assert line.split() == (
        ["12/40", "0.0481", "0.410", "0.41±0.31", "53%", "31.2", "-0.012", "0.455", "21.3"]
        + ["12.1", "1.2", "2.3", "4.1", "1.5", "9", "min", "02", "s"]
    )
    assert len(header) == len(line) <= 120
    assert line.index("0.0481") + len("0.0481") == header.index("loss") + len("loss")


def test_missing_values_keep_the_columns() -> None:
    line = format_step_line({"step": 1, "distill/loss": math.nan, "reward/mean": 0.5, "time/step": 7.0}, 40, None)
    assert line.split() == ["1/40", "-", "0.500", "-", "-", "-", "-", "7.0", "-", "-", "-", "-", "-", "-"]
    assert len(line) == len(format_header(40))


@pytest.mark.parametrize("width", [20, 60, 80, 100, 119, 200])
def test_lines_fit_the_width(width: int) -> None:
    header, line = format_header(1000, width), format_step_line(METRICS, 1000, 9e4, width)
    assert len(line) <= max(width, 30) and len(header) == len(line)
    assert "loss" in header


def test_large_and_small_values_stay_in_their_columns() -> None:
    metrics = {**METRICS, "step": 99999, "distill/loss": -1.234e-7, "teacher/gap": -123456.0, "time/rollout": 12345.6}
    assert len(format_step_line(metrics, 99999, 1e6)) == len(format_header(99999))


def test_format_number() -> None:
    values = (0, 0.04812, 1234.56, 1e-7, 31.24, None, math.inf)
    assert [format_number(value) for value in values] == ["0", "0.0481", "1235", "1.0e-07", "31.24", "-", "-"]


def test_validation_key_prefers_mean_and_large_k() -> None:
    assert validation_key({"val/mean@4": 0.1, "val/mean@16": 0.1, "val/maj@64": 0.2}) == "val/mean@16"
    assert validation_key({"val/aime/maj@8": 0.1, "val/loss": 0.2}) == "val/aime/maj@8"
    assert validation_key({"val/mean@8": None, "loss": 1}) is None


def test_clock_ignores_validation_before_training_and_forgets_old_steps() -> None:
    clock = StepClock(10, window=2)
    assert clock.add(0, 100.0, None) is None
    assert clock.add(1, 130.0, 20.0) == 9 * 30
    assert clock.add(2, 140.0, 10.0) == 8 * 20
    assert clock.add(3, 150.0, 10.0) == 7 * 10
    assert StepClock(10).add(5, 0.0, 4.0) == 20  # resumed: the trainer's own figure


# --- what of a log explains a failure -------------------------------------------------------------------------------

LOG = """\
(pid=12) WARNING 11-20 10:00:01 some vLLM warning
/lib/x.py:3: FutureWarning: deprecated
  warnings.warn("deprecated")
INFO 11-20 loading
Loading: 100%|####| 3/3 [00:01<00:00, 2.1it/s]
(Worker pid=7, ip=10.0.0.1) Traceback (most recent call last):
(Worker pid=7, ip=10.0.0.1)   File "a.py", line 3, in f
(Worker pid=7, ip=10.0.0.1)     boom()
(Worker pid=7, ip=10.0.0.1) \x1b[31mtorch.OutOfMemoryError: CUDA out of memory\x1b[0m
(Worker pid=8, ip=10.0.0.2) Traceback (most recent call last):
(Worker pid=8, ip=10.0.0.2)   File "a.py", line 3, in f
(Worker pid=8, ip=10.0.0.2)     boom()
(Worker pid=8, ip=10.0.0.2) torch.OutOfMemoryError: CUDA out of memory
INFO shutting down
"""


def test_relevant_lines_are_the_traceback_without_noise_and_repeats() -> None:
    assert relevant_lines(LOG.splitlines()) == [
        "Traceback (most recent call last):",
        '  File "a.py", line 3, in f',
        "    boom()",
        "torch.OutOfMemoryError: CUDA out of memory",
    ]


def test_relevant_lines_fall_back_to_what_there_is() -> None:
    assert relevant_lines(["INFO a", "plain", "WARNING b"]) == ["plain"]
    assert relevant_lines(["INFO a", "", "WARNING b"]) == ["INFO a", "WARNING b"]
    assert relevant_lines([f"line {index}" for index in range(100)], limit=3) == ["line 97", "line 98", "line 99"]
    assert relevant_lines([]) == [] and relevant_lines(["plain", "INFO a"], errors_only=True) == []
