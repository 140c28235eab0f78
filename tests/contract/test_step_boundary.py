"""The part of the trainer between two steps, on verl's own classes; workers, queue and servers are stand-ins."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.contract

verl = pytest.importorskip("verl.trainer.ppo.v1.trainer_sync")

from verl.trainer.ppo.v1 import replay_buffer as verl_buffer  # noqa: E402

from verl_ext import step_boundary  # noqa: E402
from verl_ext.group_buffer import LostGroups, WholeGroupBuffer  # noqa: E402
from verl_ext.heartbeat import FILE, beating, read_beat  # noqa: E402
from verl_ext.preemption import Preempted, Preemption  # noqa: E402
from verl_ext.step_boundary import BoundaryTrainer, CheckpointError  # noqa: E402


class Sink:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def phase(self, text: str) -> None:
        self.told.append(text)

    warning = phase

    def pending(self, step: int, values: dict[str, Any]) -> None:
        self.rows.append((step, values))


class Trainer(BoundaryTrainer):
    """Without verl's constructor, which starts workers."""

    def __init__(self, folder: Path, steps: int = 9) -> None:
        self.config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(folder)))
        self.sink = Sink()
        self.slept = 0
        self.checkpoint_manager = SimpleNamespace(sleep_replicas=self._sleep, update_weights=lambda *_: None)
        self.curr_step_profile = False
        self.global_steps, self.total_training_steps, self.steps_per_epoch = 1, steps, 3
        self.timing_raw: dict[str, float] = {}

    def _sleep(self) -> None:
        self.slept += 1

    def _save_checkpoint(self) -> None:
        with self.saving():
            super()._save_checkpoint()

    def _compute_metrics(self, batch: Any, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        metrics["seconds"], metrics["epoch"] = timing_raw["step"], epoch


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Preemption:
    made = Preemption()
    made.tell = lambda text: None
    monkeypatch.setattr(step_boundary, "PREEMPTION", made)
    return made


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    steps: list[int] = []
    monkeypatch.setattr(verl.PPOTrainerSync, "_save_checkpoint", lambda self: steps.append(self.global_steps))
    return steps


def stop_at(trainer: Trainer, signals: Preemption, next_step: int) -> None:
    trainer.global_steps = next_step
    with signals.deferring():
        signals.handle(signal.SIGUSR1)
        with pytest.raises(Preempted, match="SIGUSR1"):
            trainer.on_step_begin()


def test_a_signal_saves_the_step_that_is_done(tmp_path: Path, signals: Preemption, saved: list[int]) -> None:
    trainer = Trainer(tmp_path)
    with beating(tmp_path):
        trainer.on_step_begin()
        stop_at(trainer, signals, 5)
    assert saved == [4] and trainer.slept == 1
    assert trainer.sink.told == ["SIGUSR1: stopped, checkpoint of step 4"]
    assert read_beat(tmp_path / FILE).saved == 4
    assert not trainer.sink.rows  # the row of step 4 was written before


def test_no_step_is_saved_twice_and_nothing_before_the_first(
    tmp_path: Path, signals: Preemption, saved: list[int]
) -> None:
    trainer = Trainer(tmp_path)
    trainer.global_steps = 4
    trainer._save_checkpoint()
    stop_at(trainer, signals, 5)
    assert saved == [4]
    saved.clear()
    fresh = Trainer(tmp_path)
    fresh.global_steps = 1
    with pytest.raises(Preempted):
        fresh.on_step_begin()
    assert saved == [] and fresh.sink.told == ["SIGUSR1: stopped, no step was made"]


def test_a_resumed_run_has_its_checkpoint_already(
    tmp_path: Path, signals: Preemption, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verl.PPOTrainerSync, "_load_checkpoint", lambda self: setattr(self, "global_steps", 6))
    trainer = Trainer(tmp_path)
    trainer._load_checkpoint()
    stop_at(trainer, signals, 7)
    assert saved == []


def test_the_row_is_kept_before_the_checkpoint_counts(
    tmp_path: Path, signals: Preemption, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verl.PPOTrainerSync, "step", lambda self, metrics, timing: metrics.update(loss=0.5) or "batch")
    trainer = Trainer(tmp_path)
    trainer.global_steps = 5
    monkeypatch.setattr(verl.PPOTrainerSync, "_save_checkpoint", lambda self: saved.append(len(self.sink.rows)) or None)
    trainer.step({}, {})
    trainer._save_checkpoint()
    ((step, row),) = trainer.sink.rows
    assert saved == [1]
    assert step == 5 and row["loss"] == 0.5 and row["epoch"] == 1 and row["seconds"] >= 0


def test_a_checkpoint_that_cannot_be_written_is_one_message(
    tmp_path: Path, signals: Preemption, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = Trainer(tmp_path)
    trainer.saved_step, trainer.global_steps = 4, 8
    monkeypatch.setattr(verl.PPOTrainerSync, "_save_checkpoint", full)
    with pytest.raises(CheckpointError) as caught:
        trainer._save_checkpoint()
    for part in ("checkpoint of step 8", str(tmp_path), "GB free", "that of step 4", "No space left on device"):
        assert part in str(caught.value)
    assert trainer.saved_step == 4


@pytest.mark.parametrize("last", (False, True))
def test_validation_is_cut_but_not_the_last_one(
    tmp_path: Path, signals: Preemption, saved: list[int], monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    trainer = Trainer(tmp_path, steps=3)

    def validate(self: Trainer) -> dict[str, float]:
        signals.handle(signal.SIGTERM)
        self._cut_validation()  # what the buffer calls while it waits
        return {"val": 1.0}

    monkeypatch.setattr(verl.PPOTrainerSync, "_validate", validate)
    with signals.deferring():
        trainer.global_steps = 2
        trainer.on_step_begin()
        trainer.global_steps = 3 if last else 2
        assert trainer._validate() == ({"val": 1.0} if last else {})
        if not last:
            trainer.global_steps = 3
            with pytest.raises(Preempted):
                trainer.on_step_begin()
            # Requests of the validation may be running: the servers are not put to sleep.
            assert saved == [2] and trainer.slept == 0


def test_validation_before_training_is_cut_too(
    tmp_path: Path, signals: Preemption, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path)
    monkeypatch.setattr(verl.PPOTrainerSync, "_validate", lambda self: {"val": 1.0})
    assert trainer._validate() == {"val": 1.0}
    with signals.deferring():
        signals.handle(signal.SIGTERM)
        with pytest.raises(Preempted):
            trainer._validate()


# ----------------------------------------------------------------------------------------------------- the whole groups


class Store:
    """TransferQueue's part that the buffer uses."""

    def __init__(self, tags: dict[str, dict[str, dict]]) -> None:
        self.tags = tags

    def kv_list(self) -> dict[str, dict[str, dict]]:
        return {name: dict(items) for name, items in self.tags.items()}

    def kv_clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            self.tags[partition_id].pop(key, None)


def prompts(**groups: tuple[str, int]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for uid, (status, rows) in groups.items():
        found[uid] = {"is_prompt": True, "status": status, "global_steps": 1}
        found |= {f"{uid}_{number}_0": {"status": "success"} for number in range(rows)}
    return found


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> Iterator[WholeGroupBuffer]:
    made = WholeGroupBuffer("sync", {}, None, "drop", {}, poll_interval=0.0)
    made.rollouts, made.share_allowed = 2, 0.5
    store = Store({"train": {}, "val": {}})
    made.store = store
    monkeypatch.setattr(verl_buffer, "tq", store)
    return made


def test_short_and_lost_groups_leave_the_batch_and_the_queue(buffer: WholeGroupBuffer) -> None:
    buffer.store.tags["train"] = prompts(a=("finished", 2), b=("failure", 1), c=("finished", 2), d=("failure", 0))
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
    assert sorted(batch.keys) == ["a_0_0", "a_1_0", "c_0_0", "c_1_0"] and len(batch.tags) == 4
    assert buffer.counts == {"short": 1, "lost": 1}
    # Only the rows of the batch are left; the trainer clears them after the step.
    assert sorted(buffer.store.tags["train"]) == sorted(batch.keys)


def test_verl_itself_would_train_on_the_short_group(buffer: WholeGroupBuffer) -> None:
    """The hazard that the buffer is there for; when this fails, verl has changed."""
    buffer.store.tags["train"] = prompts(a=("finished", 2), b=("failure", 1))
    buffer.__class__ = verl_buffer.ReplayBuffer
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    assert sorted(batch.keys) == ["a_0_0", "a_1_0", "b_0_0"]


@pytest.mark.parametrize(
    "groups", ({"a": ("finished", 2), "b": ("failure", 1), "c": ("failure", 0)}, {"a": ("failure", 0)})
)
def test_too_many_lost_groups_end_the_run_and_name_what_is_dead(buffer: WholeGroupBuffer, groups: dict) -> None:
    buffer.diagnose = lambda: "rollout server 1.0 is dead: the actor died"
    buffer.store.tags["train"] = prompts(**groups)
    with pytest.raises(
        LostGroups, match=f"of {len(groups)} groups lost rollouts.*distill.lost_groups.*server 1.0 is dead"
    ):
        buffer.sample(global_steps=1, partition_id="train", batch_size=len(groups))


def test_validation_takes_what_there_is_and_its_wait_can_be_cut(buffer: WholeGroupBuffer) -> None:
    buffer.store.tags["val"] = prompts(a=("failure", 1))
    batch, _ = buffer.sample(global_steps=1, partition_id="val", batch_size=1)
    assert batch.keys == ["a_0_0"]

    def cut() -> None:
        raise Preempted("SIGTERM")

    buffer.cut = cut
    buffer.store.tags["val"] = prompts(a=("running", 0))
    with pytest.raises(Preempted):
        buffer.sample(global_steps=1, partition_id="val", batch_size=1)
