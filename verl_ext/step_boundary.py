"""The part of the trainer that can be stopped between two steps, says where it is, and takes whole groups only."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_ext import heartbeat
from verl_ext.compat import buffer_class
from verl_ext.group_buffer import WholeGroupBuffer
from verl_ext.preemption import PREEMPTION, Preempted
from verl_ext.step_sink import StepSink

SECONDS_TO_ANSWER = 10.0


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; names the step, the folder and the last whole one."""


class BoundaryTrainer(PPOTrainerSync):
    """verl's synchronous trainer, preemptible.

    A signal that arrives in a step is answered when the step is done and its row is written. Validation is cut short
    for it (except after the last step) and made up for on resume.
    """

    sink: StepSink
    saved_step = 0
    """Step of the last checkpoint; 0: none."""
    _stepping = False
    _validation_cut = False
    _batch: tuple[KVBatchMeta, dict[str, Any]] | None = None

    def fit(self, agent_loop_manager: Any) -> None:
        """As verl's. Raises :class:`Preempted` where a signal asked for it; the last step is then in a checkpoint."""
        with PREEMPTION.deferring():
            super().fit(agent_loop_manager)
        heartbeat.beat(heartbeat.END)

    def _build_replay_buffer(self) -> ReplayBuffer:
        with buffer_class(WholeGroupBuffer):
            buffer = super()._build_replay_buffer()
        if isinstance(buffer, WholeGroupBuffer):  # not a sampler of the user's own
            buffer.rollouts = self.config.actor_rollout_ref.rollout.n
            buffer.share_allowed = self.config.distill.lost_groups
            buffer.diagnose = self._dead_servers
            buffer.cut = self._cut_validation
        return buffer

    @property
    def lost_groups(self) -> dict[str, int]:
        """Groups left out of the last batch: ``short`` ones, and ``lost`` ones without any rollout."""
        return dict(getattr(self.replay_buffer, "counts", {"short": 0, "lost": 0}))

    # ------------------------------------------------------------------------------------------------------- the steps

    def on_step_begin(self) -> None:
        super().on_step_begin()
        if PREEMPTION.requested:
            self._stop()
        self._stepping, self._validation_cut = True, False
        heartbeat.beat(heartbeat.ROLLOUT, self.global_steps)

    def on_sample_end(self) -> None:
        super().on_sample_end()
        heartbeat.beat(heartbeat.UPDATE)

    def on_step_end(self) -> None:
        heartbeat.beat(heartbeat.SYNC)
        super().on_step_end()

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        self._step_began = time.perf_counter()
        batch = super().step(metrics, timing_raw)
        self._batch = (batch, metrics)
        return batch

    def _stop(self) -> None:
        """Between two steps: ``global_steps`` is already that of the next one."""
        if self.global_steps - 1 > self.saved_step:
            self.global_steps -= 1
            self._batch = None  # its row is written
            if not self._validation_cut:  # else requests may be running
                self.checkpoint_manager.sleep_replicas()
            self._save_checkpoint()
        self.sink.phase(
            f"{PREEMPTION.signal_name}: stopped, "
            + (f"checkpoint of step {self.saved_step}" if self.saved_step else "no step was made")
        )
        PREEMPTION.check()

    # ------------------------------------------------------------------------------------------------------ validation

    def _validate(self) -> dict[str, float]:
        heartbeat.beat(heartbeat.VALIDATE)
        try:
            self._cut_validation()
            return super()._validate()
        except Preempted:
            if not self._stepping:
                raise
            self._validation_cut = True
            self.sink.warning(f"validation after step {self.global_steps} was cut; it is made up for on resume")
            return {}

    def _cut_validation(self) -> None:
        # The last one is the run's result: nothing comes after it.
        if not self._stepping or self.global_steps < self.total_training_steps:
            PREEMPTION.check()

    # ----------------------------------------------------------------------------------------------------- checkpoints

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of a checkpoint, until it is complete. Raises :class:`CheckpointError` where it fails."""
        heartbeat.beat(heartbeat.SAVE)
        folder = self.config.trainer.default_local_dir
        if self._batch is not None:
            self.sink.pending(self.global_steps, self._row_so_far(*self._batch))
        try:
            yield
        except Exception as error:
            free = shutil.disk_usage(folder).free / 1e9
            last = f"that of step {self.saved_step}" if self.saved_step else "there is none before it"
            raise CheckpointError(
                f"the checkpoint of step {self.global_steps} could not be written to {folder} ({free:.1f} GB free "
                f"there); the last whole one: {last}. {_last_line(error)}"
            ) from error
        self.saved_step = self.global_steps
        heartbeat.beat(heartbeat.SAVE, saved=self.saved_step)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self.saved_step = self.global_steps

    def _row_so_far(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> dict[str, Any]:
        """The step's row but for weight sync and validation: a run that is killed before it writes the row has it."""
        values = dict(metrics)
        timing = dict(self.timing_raw) | {"step": time.perf_counter() - self._step_began}
        epoch = (self.global_steps - 1) // self.steps_per_epoch
        self._compute_metrics(batch, values, timing, global_steps=self.global_steps, epoch=epoch)
        return values

    # ---------------------------------------------------------------------------------------------------------- faults

    def _dead_servers(self) -> str:
        """The rollout servers that do not answer, for a message."""
        dead = []
        for replica in self.llm_server_manager.get_replicas():
            for number, server in enumerate(replica.servers):
                try:
                    ray.get(server.__ray_ready__.remote(), timeout=SECONDS_TO_ANSWER)
                except ray.exceptions.RayError as error:
                    dead.append(f"rollout server {replica.replica_rank}.{number} is dead: {_last_line(error)}")
        return "; ".join(dead)


def _last_line(error: BaseException) -> str:
    """Of a remote error, whose message is a whole traceback, what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
