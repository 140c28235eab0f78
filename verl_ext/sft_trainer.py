"""verl's SFT trainer inside a Ray cluster that is there already, on prepared token sequences.

The loss is verl's ``sft_loss``: the negative log-likelihood summed over the trained tokens of all rows of a step,
divided by their number over all ranks (``batch_num_tokens``) and multiplied by the number of data-parallel ranks, over
which FSDP then averages gradients. So it is the mean over the step's trained tokens, and depends neither on
micro-batches nor on the number of ranks. A long row weighs more than a short one.

verl drops the rows of an epoch that do not fill a batch. Here they are a batch of their own, a smaller one, whose mean
is over its own tokens. Where a batch is no multiple of the ranks, it is filled up with rows of two tokens of which none
is trained on; they add nothing to the loss and nothing to its denominator.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import ray
import torch
from omegaconf import DictConfig, OmegaConf
from ray.util.placement_group import remove_placement_group
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.sft_trainer_ray import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import sft_loss

from verl_ext import engine  # noqa: F401  (registers our engine, here and in every worker that unpickles SftWorker)
from verl_ext.compat import saving_only
from verl_ext.heartbeat import END, SAVE, UPDATE, beat
from verl_ext.preemption import PREEMPTION
from verl_ext.rollout_servers import wait_for_resources

MODEL_FOLDER = "huggingface"
"""Where, inside a checkpoint, verl writes the Hugging Face folder."""


class SftSink(Protocol):
    """What is told of every step."""

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """``step`` counts from 1. ``values``: ``loss`` (mean over trained tokens), ``grad_norm`` (before clipping; not
        finite where the step was skipped), ``lr`` (the step's own), ``tokens`` (trained on), ``tokens/read``, ``rows``,
        ``epoch`` (from 1), ``time/step`` (seconds)."""


class SeededBatches:
    """The rows of every step, as a function of seed and step: a run that resumes needs no other state.

    Every epoch is a permutation of its own, cut into batches of ``size`` rows; the last one holds what remains.
    """

    def __init__(self, rows: int, size: int, seed: int) -> None:
        if rows < 1 or size < 1:
            raise ValueError(f"{rows} rows in batches of {size}; both must be at least 1")
        self.rows, self.size, self.seed = rows, size, seed
        self.per_epoch = math.ceil(rows / size)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def epoch(self, step: int) -> int:
        """The epoch of a step; both from 1."""
        return (step - 1) // self.per_epoch + 1

    def batch(self, step: int) -> list[int]:
        """Row numbers of a step, from 1."""
        epoch, place = divmod(step - 1, self.per_epoch)
        if epoch != self._epoch:
            # Not seed + epoch: the second epoch of seed 0 would be the first one of seed 1.
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return self._order[place * self.size : (place + 1) * self.size].tolist()

    def state_dict(self) -> dict[str, int]:
        """What verl's checkpoint handler keeps as the data loader's state."""
        return {"rows": self.rows, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError where the checkpoint was made with other batches."""
        if state != self.state_dict():
            raise ValueError(f"the checkpoint's batches were made from {state}, these from {self.state_dict()}")


class SftWorker(TrainingWorker):
    """verl's training worker, which also says the learning rate a step was made with, and writes a model folder."""

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict | None:
        """As verl's; ``lr`` of the metrics is this step's, where verl's is the next one's."""
        lr = self.engine.lr_scheduler.get_last_lr()[0]
        output = super().train_batch(data)
        if output is not None:
            tu.get(output, "metrics")["lr"] = lr
        return output

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_model(self, folder: str) -> None:
        """Writes the weights, gathered on rank 0, with config and tokenizer into ``folder``/huggingface."""
        with saving_only(self.engine.checkpoint_manager, ["hf_model"]):
            self.engine.save_checkpoint(local_path=folder)


class SftTrainer(SFTTrainer):
    """Fine-tunes on the row files of ``data.train_files``.

    Ray must be initialised. :meth:`end` gives the devices back; a constructor that fails does so itself.
    """

    def __init__(self, config: DictConfig, sink: SftSink, *, seed: int = 0) -> None:
        """``config`` has the blocks of verl's ``sft_trainer_engine`` (model, engine, optim, checkpoint, profiler, data,
        trainer), with ``data.custom_cls`` naming :class:`verl_ext.sft_rows.TokenRows` and ``data.pad_mode=no_padding``.
        ``trainer.total_training_steps`` is given and ends the training, ``trainer.save_freq`` is a number of steps or
        -1. A checkpoint in ``trainer.default_local_dir`` is resumed.

        Raises:
            ConfigError: the rows cannot be used.
            ValueError: the checkpoint to resume from was made with other batches.
        """
        self.config, self.sink, self.seed = config, sink, seed
        self.resource_pool: RayResourcePool | None = None
        self.training_client: RayWorkerGroup | None = None
        self._free = ray.available_resources()
        try:
            # verl's own constructor, without its prints.
            self._build_config()
            self._build_dataset()
            self._build_dataloader()
            self._build_engine()
            self._build_ckpt_handler()
            self.resume_global_step = self.ckpt_handler.load_checkpoint()
        except BaseException:
            self.end()
            raise

    def _build_dataloader(self) -> None:
        """No worker processes and no loader: the rows are in memory and small."""
        data, trainer = self.config.data, self.config.trainer
        self.train_dataloader = SeededBatches(len(self.train_dataset), data.train_batch_size, self.seed)
        self.steps_per_epoch = self.train_dataloader.per_epoch
        self.total_training_steps = trainer.total_training_steps
        self.optimizer_config.total_training_steps = self.total_training_steps
        self._collate = SFTTensorCollator(data.pad_mode)

    def _build_engine(self) -> None:
        trainer = self.config.trainer
        # verl reserves ten CPUs a rank here; one process a rank needs one.
        self.resource_pool = RayResourcePool([trainer.n_gpus_per_node] * trainer.nnodes, max_colocate_count=1)
        settings = TrainingWorkerConfig(
            model_type="language_model",
            model_config=self.model_config,
            engine_config=self.engine_config,
            optimizer_config=self.optimizer_config,
            checkpoint_config=self.checkpoint_config,
            profiler_config=self.profiler_config,
        )
        self.training_client = RayWorkerGroup(
            resource_pool=self.resource_pool,
            ray_cls_with_init=RayClassWithInitArgs(ray.remote(SftWorker), config=settings),
            device_name=trainer.device,
        )
        self.training_client.set_loss_fn(loss_fn=partial(sft_loss, config=None))
        self.training_client.reset()

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return self.training_client.world_size // self.engine_config.ulysses_sequence_parallel_size

    def fit(self) -> None:
        """Trains from the resumed step to the last one, and saves a checkpoint every ``trainer.save_freq`` steps.

        Raises Preempted between two steps where a signal asked for it; the last step is then in a checkpoint.
        """
        save_every, saved = self.config.trainer.save_freq, self.resume_global_step
        with PREEMPTION.deferring():
            for step in range(self.resume_global_step + 1, self.total_training_steps + 1):
                if PREEMPTION.requested:
                    if step - 1 > saved:
                        self._save(step - 1)
                    PREEMPTION.check()
                beat(UPDATE, step)
                started = time.perf_counter()
                values = self._train(step)
                values["time/step"] = time.perf_counter() - started
                self.sink(step, values)
                if save_every > 0 and step % save_every == 0:
                    self._save(step)
                    saved = step
        beat(END)

    def _save(self, step: int) -> None:
        beat(SAVE)
        self.ckpt_handler.save_checkpoint(step=step)
        beat(SAVE, saved=step)

    def _train(self, step: int) -> dict[str, float]:
        rows = [self.train_dataset[index] for index in self.train_dataloader.batch(step)]
        values = {
            "tokens": sum(int(row["loss_mask"].sum()) for row in rows),
            "tokens/read": sum(len(row["input_ids"]) for row in rows),
            "rows": len(rows),
            "epoch": self.train_dataloader.epoch(step),
        }
        batch = self._tensordict(spread(rows, self.ranks))
        metrics = tu.get(self.training_client.train_batch(batch).get(), "metrics")
        return {**{name: float(metrics[name]) for name in ("loss", "grad_norm", "lr")}, **values}

    def _tensordict(self, rows: list[dict[str, torch.Tensor]]) -> TensorDict:
        data = self.config.data
        batch = tu.get_tensordict(
            tensor_dict=self._collate(rows),
            non_tensor_dict={
                "use_remove_padding": self.config.model.use_remove_padding,
                "use_dynamic_bsz": data.use_dynamic_bsz,
                "max_token_len_per_gpu": data.max_token_len_per_gpu,
                "micro_batch_size_per_gpu": data.micro_batch_size_per_gpu,
                "temperature": 1.0,
                "global_batch_size": len(rows),
                "pad_mode": data.pad_mode,
                "pad_token_id": self.model_config.tokenizer.pad_token_id,
            },
        )
        # Wrapped, because a plain list would be taken for one value per row.
        lengths = NonTensorData([len(row["input_ids"]) for row in rows])
        tu.assign_non_tensor(batch, update_lr_scheduler=True, global_token_num=lengths)
        return batch

    def save_model(self, folder: Path) -> Path:
        """Writes the model into ``folder``, which all nodes see; returns the Hugging Face folder in it."""
        self.training_client.save_model(str(folder))
        made = folder / MODEL_FOLDER
        # verl writes the weights as they were trained, and bfloat16 beside them: whoever loads them would round them.
        # Its override of the attention is for its own engine.
        config = json.loads((made / "config.json").read_text(encoding="utf-8"))
        config.pop("attn_implementation", None)
        config["dtype"] = str(PrecisionType.to_dtype(self.engine_config.model_dtype)).removeprefix("torch.")
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return made

    def end(self) -> None:
        """Ends the workers and waits until their devices are free. May be called again."""
        client, self.training_client = self.training_client, None
        pool, self.resource_pool = self.resource_pool, None
        for worker in client.workers if client is not None else []:
            ray.kill(worker)
        for group in (pool.pgs if pool is not None else None) or []:
            remove_placement_group(group)
        if pool is not None:
            wait_for_resources(self._free)


def spread(rows: list[dict[str, torch.Tensor]], ranks: int) -> list[dict[str, torch.Tensor]]:
    """The rows in the order in which equal parts go to the ranks, with parts of about equal work.

    Filled up to a multiple of ``ranks`` with rows that train nothing.
    """
    if ranks == 1:
        return rows
    shortest = min(rows, key=lambda row: len(row["input_ids"]))
    silent = {name: values[:2] for name, values in shortest.items()} | {"loss_mask": torch.zeros(2, dtype=torch.int64)}
    rows = rows + [silent] * (-len(rows) % ranks)
    work = calculate_workload(torch.tensor([len(row["input_ids"]) for row in rows]))
    parts = get_seqlen_balanced_partitions(work, k_partitions=ranks, equal_size=True)
    return [rows[index] for part in parts for index in part]


def fine_tune(
    config: DictConfig, sink: SftSink, *, seed: int, folder: Path, phase: Callable[[str], None] = lambda _: None
) -> Path:
    """Trains to the last step and writes the model into ``folder``; returns the Hugging Face folder in it.

    Args:
        config, sink, seed: of :class:`SftTrainer`.
        phase: told what begins.

    Everything that was started is ended when it returns or raises; the cluster stays.
    """
    OmegaConf.resolve(config)
    trainer = SftTrainer(config, sink, seed=seed)
    try:
        phase("training")
        trainer.fit()
        phase("saving the model")
        return trainer.save_model(folder)
    finally:
        trainer.end()
