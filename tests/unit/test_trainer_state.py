"""Counters and random generators of the driver go through a file of plain JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_ext.trainer_state import STATE_FILE, load, random_states, save, set_random_states


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(())),
            float(torch.randn(()))]  # fmt: skip


def test_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn()  # half of a pair is kept back by both
    save(tmp_path, {"steps": 3})
    expected = draws()
    draws()
    assert load(tmp_path) == {"steps": 3}
    assert draws() == expected


def test_the_file_is_strict_json_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    save(tmp_path, {"steps": 3, "pair_check": None})
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert set(json.loads((tmp_path / STATE_FILE).read_text())) == {"steps", "pair_check", "random"}
    assert random_states() == json.loads(json.dumps(random_states()))
    with pytest.raises(ValueError, match="Out of range"):
        save(tmp_path, {"steps": float("nan")})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"random": {}}', '{"random": {"python": 1}}', "\x00"])
def test_a_file_without_them_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match="trainer.json cannot be used"):
        load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer.json is missing"):
        load(tmp_path)


def test_states_of_another_seed_differ() -> None:
    before = random_states()
    try:
        torch.manual_seed(1)
        one = random_states()["torch"]
        torch.manual_seed(2)
        assert random_states()["torch"] != one
    finally:
        set_random_states(before)
