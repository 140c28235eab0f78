"""The smoke test's commands compose, into the path that they are to test; its questions pass the checks of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe import smoke, smoke_data
from recipe.compose import compose_config
from recipe.doctor import Examination
from recipe.findings import FAIL, OK
from recipe.preflight import check_data
from recipe.question_checks import check_questions

pytestmark = pytest.mark.contract


def overrides_of(step: str, folder: Path, *, cpu: bool) -> list[str]:
    steps = {one.name: one for one in smoke.plan(folder, cpu=cpu, gpus=1, model=smoke.MODEL)}
    command = steps[step].command
    return [word for word in command[3:] if not word.startswith("--")]


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("step", ["tiny", "train", "doctor"])
def test_a_step_runs_the_path_that_it_is_for(step: str, cpu: bool, tmp_path: Path) -> None:
    config = compose_config(overrides_of(step, tmp_path, cpu=cpu))
    for key, value in (smoke.CPU_PATH if cpu else smoke.GPU_PATH).items():
        assert OmegaConf.select(config, key) == value, key
    rows = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    assert all(rows % ranks == 0 for ranks in smoke.RANKS)
    assert config.data.train_batch_size <= smoke_data.SIZES["train"]
    tiny = cpu or step == "tiny"
    assert str(config.actor_rollout_ref.model.path).endswith("tiny_world/plain" if tiny else smoke.MODEL)
    assert config.data.train_files == f"{tmp_path}/data/{'tiny_world' if tiny else 'arithmetic'}/train.parquet"


def test_the_real_models_step_passes_the_offline_doctor_on_a_small_gpu(tmp_path: Path) -> None:
    config = compose_config(overrides_of("doctor", tmp_path, cpu=False))
    examination = Examination(config, offline=True, device_bytes=40 << 30)
    found = {one.name: one for one in examination.run()}
    assert not [one.line for one in found.values() if one.status == FAIL]
    assert found["memory"].status == OK


def test_the_questions_are_a_data_set_as_runs_want_it(tmp_path: Path) -> None:
    assert smoke_data.main(["--out", str(tmp_path / "data")]) == 0
    config = compose_config(overrides_of("train", tmp_path, cpu=False))
    check_data(config)
    check_questions(config)
