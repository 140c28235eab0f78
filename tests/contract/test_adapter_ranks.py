"""LoRA through the real engines on one and on two ranks: the adapter switched off is the frozen teacher."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.contract

PROGRAM = Path(__file__).with_name("adapter_program.py")
# Not in a package: pytest imports test modules one by one.
_spec = importlib.util.spec_from_file_location("forked_ranks", PROGRAM.with_name("forked_ranks.py"))
forked_ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(forked_ranks)
INPUTS = ["logits", "hidden_states"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What rank 0 of one rank and of two wrote."""
    folder = tmp_path_factory.mktemp("adapter")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("VERL_", "RAY_"))}
    inherited |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROGRAM.parents[2])}
    worlds = [[forked_ranks.World(size, str(folder / f"world_{size}.json"))] for size in (1, 2)]
    forked_ranks.run_ranks(PROGRAM, folder, worlds, inherited, timeout=600)
    return {size: json.loads((folder / f"world_{size}.json").read_text()) for size in (1, 2)}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("world", [1, 2])
def test_only_the_adapter_moves_and_the_teacher_stays(results, inputs, world):
    found = results[world][inputs]
    assert found["described"] == "adapter off"
    assert len(found["adapter"]) == 2 * 7 * 3 and sorted(found["changed"]) == sorted(found["adapter"])
    assert found["discrepancy"] > 0.1, "teacher and student differ after the steps"
    assert all(norm > 0 for norm in found["norms"])


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("world", [1, 2])
def test_verls_reference_is_the_model_without_its_adapter_and_leaves_the_teacher_s_states(results, inputs, world):
    found = results[world][inputs]
    assert found["reference_moved"] == 0 and found["adapter_moved"] > 0.1
    rows = 4 // world
    assert found["store"] == [rows, rows]


@pytest.mark.parametrize("inputs", INPUTS)
def test_two_ranks_have_the_losses_and_gradients_of_one(results, inputs):
    one, two = (results[world][inputs] for world in (1, 2))
    for key in ("losses", "norms"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert one["losses"][0] != one["losses"][1]


def test_the_teacher_s_head_is_read_in_its_place_as_its_logits_are(results):
    # The top 100 of 128 tokens with a tail leave hardly anything out of the whole vocabulary.
    assert results[1]["hidden_states"]["losses"] == pytest.approx(results[1]["logits"]["losses"], rel=1e-3)
