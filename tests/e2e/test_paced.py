"""PACED on the real stack: two stages with pass rates taken again, resumed around the switch; question gradients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from recipe import snr
from recipe.compose import ROOT
from verl_ext.pass_rate_store import read_pass_rates

STEPS, SWITCH = 4, 2
PACED = [
    "method=paced_two_stage",
    f"distill.teacher.path={ROOT}/models/tiny_world/teacher",
    "distill.weighting.samples=4",
    "actor_rollout_ref.rollout.n=2",
    "run.save_every=1",
    # So that two steps change what the student answers.
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
]


@pytest.fixture(scope="module")
def whole(runs: Any) -> Path:
    """An uninterrupted run; its rollouts are what the resumed ones replay."""
    validated = ["run.val_before=true", "run.val_every=4", "run.val_samples=1"]
    forgetting = f"forgetting.files=[{runs.data}/test.parquet]"
    return runs("paced_two_stage", *PACED, own_rollouts(runs), *validated, forgetting, steps=STEPS)[1]


def own_rollouts(runs: Any) -> str:
    """Not those that the other files record and replay."""
    return f"skip.rollout_tq.dump_dir={runs.folder}/paced_rollouts"


def test_two_stages_run_and_say_so(whole: Path, records: Any, data: Path) -> None:
    steps = records(whole)
    assert [record["schedule/stage"] for record in steps] == [1, 1, 2, 2]
    questions = parquet.read_metadata(data / "train.parquet").num_rows
    for record in steps:
        assert record["questions/kept"] + record.get("questions/dropped_weight_zero", 0) == questions
        assert record["questions/dropped_weight_zero"] > 0
        assert record["distill/loss"] > 0 and record["compaction/rows_left_out"] == 0
    assert all(record["reward/mean"] == 1 for record in steps[:SWITCH]), "replayed solutions are right"
    assert {path.name for path in (whole / "pass_rates").iterdir()} == {"step_0", f"step_{SWITCH}"}
    first, second = (read_pass_rates(whole / "pass_rates" / f"step_{at}") for at in (0, SWITCH))
    assert set(first.rates) == set(second.rates) and len(first.rates) == questions
    assert any(first.rate(name) != second.rate(name) for name in first.rates)
    last = steps[-1]
    assert 0 <= last["forgetting/accuracy"] <= 1 and abs(last["forgetting/points_lost"]) <= 100
    # A replayed response is the data's own text, to the last character.
    infos = parquet.read_table(data / "train.parquet")["extra_info"].to_pylist()
    solutions = {info["question_id"]: info["solution"] for info in infos}
    rows = [json.loads(line) for line in (whole / "completions.jsonl").read_text().splitlines()]
    assert rows and all(row["response"] == solutions[row["question_id"]] for row in rows if row["step"] <= SWITCH)


def test_a_run_stopped_at_the_switch_ends_with_the_same_weights(whole: Path, runs: Any, records: Any) -> None:
    # Every other step, and other shapes of runs, without the stack: tests/unit/test_training_questions.py.
    done, folder = SWITCH, runs.folder / "paced_resumed"
    shutil.copytree(whole, folder)
    for checkpoint in (folder / "checkpoints").glob("global_step_*"):
        if int(checkpoint.name.rsplit("_", 1)[1]) > done:
            shutil.rmtree(checkpoint)
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(done))
    runs(folder.name, *PACED, own_rollouts(runs), steps=STEPS)
    again, before = records(folder), records(whole)
    assert [record["step"] for record in again] == [1, 2, 3, 4]
    for ours, theirs in zip(again[done:], before[done:], strict=True):
        for key in ("fingerprint/student_0", "questions/kept", "weight/mean", "distill/loss", "schedule/stage"):
            assert ours[key] == theirs[key], (ours["step"], key)


def test_a_teacher_on_workers_of_its_own_teaches_the_same(whole: Path, runs: Any, records: Any) -> None:
    apart = records(runs("paced_apart", *PACED, own_rollouts(runs), "distill.teacher.workers=1", steps=STEPS)[1])
    beside = records(whole)
    for ours, theirs in zip(apart[:SWITCH], beside[:SWITCH], strict=True):
        assert ours["distill/loss"] == pytest.approx(theirs["distill/loss"], rel=2e-5)
        assert ours["actor/grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=2e-5)
    # Rates taken again with weights that differ by rounding may differ, so the second stage need only run.
    assert [record["schedule/stage"] for record in apart] == [1, 1, 2, 2]
    assert all(record["distill/loss"] > 0 for record in apart)


def test_gradients_of_single_questions_become_a_report_and_are_not_measured_twice(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    asked = [
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/test.parquet",
        "run.quiet=true",
        "method=paced_self",
        # Those that the other run took before its first step: of the same model, as recipe.pass_rates would take them.
        f"distill.weighting.store={whole}/pass_rates/step_0",
        f"snr.out={tmp_path / 'snr'}",
        "snr.questions=12",
        "snr.dimensions=64",
        "snr.bins=4",
        "actor_rollout_ref.rollout.n=2",
        "data.train_batch_size=6",
    ]
    first = snr.run(snr.compose(asked))
    assert first["questions"] == 12 and first["verdict"] in ("bell", "no bell", "undecided")
    report = json.loads((tmp_path / "snr" / "snr.json").read_text())
    assert sum(one["n"] for one in report["bins"]) == 12
    files_before = sorted(path.name for path in (tmp_path / "snr").glob("*.npz"))
    again = snr.run(snr.compose(asked))
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert again["seconds"] < first["seconds"] / 2
    assert sorted(path.name for path in (tmp_path / "snr").glob("*.npz")) == files_before
