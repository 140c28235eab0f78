"""The teacher's weights: closed form of the average, by name, in fp32 only, saved and loaded by shard."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext import teacher


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))


def shards(seed: int = 0) -> dict[str, torch.Tensor]:
    return teacher.local_shards(model(seed))


@settings(deadline=None, max_examples=20)
@given(rate=st.floats(0.0, 1.0), updates=st.integers(0, 30))
def test_a_student_that_stands_still_is_approached_by_powers_of_one_minus_the_rate(rate: float, updates: int) -> None:
    start, student = shards(0), shards(1)
    copied = {name: tensor.clone() for name, tensor in start.items()}
    for _ in range(updates):
        teacher.move_towards(copied, student, rate)
    left = (1 - rate) ** updates
    for name, tensor in copied.items():
        expected = student[name].double() + left * (start[name].double() - student[name].double())
        torch.testing.assert_close(tensor.double(), expected, atol=2e-6, rtol=0)


def test_a_slow_average_absorbs_small_steps_in_fp32() -> None:
    """tau 0.05 and steps of 1e-6: the share of the student's way that the teacher has gone is that of the formula."""
    generator = torch.Generator().manual_seed(0)
    student = {"w": 0.02 * torch.randn(2000, generator=generator)}
    moved = {"w": student["w"].clone()}
    start = student["w"].clone()
    for _ in range(300):
        student["w"] += 1e-6
        teacher.move_towards(moved, student, 0.05)
    absorbed = float((moved["w"] - start).mean() / (student["w"] - start).mean())
    assert absorbed == pytest.approx(0.937, abs=0.01)


def test_rates_of_zero_and_one_freeze_and_copy() -> None:
    moved, student = shards(0), shards(1)
    teacher.move_towards(moved, student, 0.0)
    assert all(torch.equal(tensor, shards(0)[name]) for name, tensor in moved.items())
    teacher.move_towards(moved, student, 1.0)
    assert teacher.squared_distance(moved, student) == pytest.approx(0.0, abs=1e-12)


def test_the_average_moves_the_module_s_own_parameters() -> None:
    module = model(0)
    teacher.move_towards(teacher.local_shards(module), shards(1), 1.0)
    torch.testing.assert_close(module[0].weight.data, shards(1)["0.weight"])


def test_parameters_are_matched_by_name_not_by_position() -> None:
    student = shards(1)
    moved = dict(reversed(list(shards(0).items())))
    teacher.move_towards(moved, student, 1.0)
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, student[name])


def test_a_bf16_teacher_is_refused_with_the_key_to_set() -> None:
    half = {name: tensor.to(torch.bfloat16) for name, tensor in shards().items()}
    with pytest.raises(ValueError, match="bfloat16.*actor_rollout_ref.ref.fsdp_config.model_dtype=fp32"):
        teacher.move_towards(half, shards(), 0.05)


def test_a_bf16_student_may_be_averaged() -> None:
    moved = shards(0)
    teacher.move_towards(moved, {name: tensor.to(torch.bfloat16) for name, tensor in shards(1).items()}, 0.5)
    assert all(tensor.dtype == torch.float32 for tensor in moved.values())


def test_other_parameters_or_shapes_are_refused_by_name() -> None:
    fewer = {name: tensor for name, tensor in shards().items() if name != "1.weight"}
    with pytest.raises(ValueError, match="1 parameters, the first is 1.weight"):
        teacher.move_towards(shards(), fewer, 0.05)
    other = shards() | {"1.weight": torch.zeros(5, 5)}
    with pytest.raises(ValueError, match=r"1.weight is \(2, 4\) in the teacher and \(5, 5\) in the student"):
        teacher.move_towards(shards(), other, 0.05)


def test_the_squared_distance_is_that_of_all_parameters_together() -> None:
    first, second = shards(0), shards(1)
    expected = sum(float((first[name] - second[name]).double().square().sum()) for name in first)
    assert teacher.squared_distance(first, second) == pytest.approx(expected, rel=1e-5)


def test_saved_shards_come_back_bit_for_bit(tmp_path: Path) -> None:
    original, restored = shards(0), shards(1)
    teacher.save(original, tmp_path / "teacher", rank=1, world_size=2)
    teacher.load(restored, tmp_path / "teacher", rank=1, world_size=2)
    assert all(torch.equal(restored[name], tensor) for name, tensor in original.items())
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["teacher_world_size_2_rank_1.safetensors"]


def test_saving_does_not_change_the_teacher_and_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    first = shards(0)
    before = copy.deepcopy(first)
    teacher.save(first, tmp_path, rank=0, world_size=1)
    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())
    teacher.save(shards(1), tmp_path, rank=0, world_size=1)
    teacher.load(first, tmp_path, rank=0, world_size=1)
    assert torch.equal(first["0.weight"], shards(1)["0.weight"])


def test_a_teacher_of_another_world_size_is_refused_with_both_sizes_named(tmp_path: Path) -> None:
    teacher.save(shards(), tmp_path, rank=0, world_size=1)
    with pytest.raises(FileNotFoundError) as caught:
        teacher.load(shards(), tmp_path, rank=0, world_size=2)
    assert "2 ranks" in str(caught.value) and "teacher_world_size_1_rank_0.safetensors" in str(caught.value)


def test_a_checkpoint_without_a_teacher_says_that_nothing_was_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found: nothing"):
        teacher.load(shards(), tmp_path / "none", rank=0, world_size=1)


def test_a_saved_teacher_of_another_model_is_refused(tmp_path: Path) -> None:
    teacher.save({"other": torch.zeros(2)}, tmp_path, rank=0, world_size=1)
    with pytest.raises(ValueError, match="differ in 4 parameters"):
        teacher.load(shards(), tmp_path, rank=0, world_size=1)
