"""The checks of the teacher: refused, warned of or passed, as configured. Only TransferQueue's answer is made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transfer_queue import KVBatchMeta

from verl_ext import teacher_checks
from verl_ext.config import distill_config
from verl_ext.teacher_checks import GapAlarm, NegativeTeacherGap, check_equality

META = KVBatchMeta(keys=["a", "b", "c", "d"], tags=[{}] * 4, partition_id="train")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch):
    def set_fields(**fields: torch.Tensor) -> None:
        def get(*, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
            assert keys == META.keys and partition_id == "train"
            return {name: fields[name] for name in select_fields}

        monkeypatch.setattr(teacher_checks.tq, "kv_batch_get", get)

    return set_fields


def test_equal_engines_pass_and_are_recorded(answer):
    answer(mean=torch.tensor([0.0, 1e-8, 0.0, 0.0]), largest=torch.tensor([0.0, 1e-6, 0.0, 0.0]))
    assert check_equality(META, 1e-3) == {
        "self_check/divergence": pytest.approx(1e-8),
        "self_check/divergence_largest": pytest.approx(1e-6),
    }


@pytest.mark.parametrize("mean", [0.01, -0.01, float("nan")])
def test_differing_engines_are_refused_with_the_key_to_look_at(answer, mean):
    answer(mean=torch.tensor([0.0, mean, 0.0, 0.0]), largest=torch.tensor([0.0, 0.5, 0.0, 0.0]))
    with pytest.raises(RuntimeError, match="distill.teacher.self_check_tolerance=0.001"):
        check_equality(META, 1e-3)


def test_a_difference_of_exactly_the_tolerance_passes(answer):
    answer(mean=torch.tensor([0.0, 0.5]), largest=torch.tensor([0.0, 3.0]))
    assert check_equality(META, 0.5)["self_check/divergence_largest"] == 3.0


def alarm(action: str) -> GapAlarm:
    return GapAlarm(distill_config({"teacher": {"on_negative_gap": action}}))


def test_a_negative_gap_warns_stops_or_is_ignored():
    negative = {"teacher/gap": -0.2}
    assert "step 3" in str(alarm("warn").look(negative, 3))
    assert alarm("ignore").look(negative, 3) is None
    with pytest.raises(NegativeTeacherGap, match="may not read this context"):
        alarm("stop").look(negative, 3)


def test_only_the_first_step_with_right_answers_is_looked_at():
    gaps = alarm("stop")
    assert gaps.look({}, 1) is None and not gaps.measured
    assert gaps.look({"teacher/gap": 0.1}, 2) is None and gaps.measured
    assert gaps.look({"teacher/gap": -5.0}, 3) is None


def test_without_distillation_there_is_nothing_to_look_at():
    assert GapAlarm(distill_config({"coefficient": 0.0})).measured


def test_a_gap_of_zero_is_not_negative_and_wrong_answers_are_not_looked_at():
    gaps = alarm("stop")
    assert gaps.look({"teacher/gap_wrong": -5.0, "teacher/gap_mean": -5.0}, 1) is None and not gaps.measured
    assert gaps.look({"teacher/gap": 0.0}, 2) is None and gaps.measured


def test_the_message_says_how_large_the_gap_is_and_what_to_do():
    with pytest.raises(NegativeTeacherGap) as caught:
        alarm("stop").look({"teacher/gap": -0.25}, 7)
    for part in ("median gap -0.250", "step 7", "completions.jsonl", "distill.teacher.on_negative_gap=ignore"):
        assert part in str(caught.value)
