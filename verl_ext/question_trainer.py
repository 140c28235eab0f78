"""The part of the trainer that decides which questions a step takes, with which block, and from what text.

Pass rates that the run takes itself, questions left out, the replay of reference texts, the switch of stages, and what
is asked about forgetting. The step itself is in :mod:`verl_ext.trainer`.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.single_controller.ray.base import RayWorkerGroup
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.debug import marked_timer

from verl_ext import heartbeat
from verl_ext.batch_plan import teacher_prompts
from verl_ext.config import distill_config
from verl_ext.forgetting import Forgetting
from verl_ext.pair_loop import PAIR_AGENT, TEACHER_IDS
from verl_ext.preemption import PREEMPTION
from verl_ext.question_data import file_list, read_questions
from verl_ext.replay_loop import REFERENCE_KEY, REPLAY_AGENT
from verl_ext.run_sampling import RunSampling
from verl_ext.sampling import SampleRequest
from verl_ext.step_boundary import BoundaryTrainer
from verl_ext.step_sink import StepSink
from verl_ext.training_questions import TrainingQuestions
from verl_ext.validation_items import NamingLoader


class QuestionTrainer(BoundaryTrainer):
    """verl's trainer over questions that may change while the run goes on."""

    teacher_wg: RayWorkerGroup | None = None
    """Workers of a teacher that does not stand beside the student."""

    def __init__(self, config: DictConfig, sink: StepSink) -> None:
        self.distill = distill_config(config.distill)
        self.sink = sink
        self._folder = Path(config.trainer.default_local_dir).absolute().parent
        self._forgetting = Forgetting(config, self._folder / "forgetting", sink.warning)
        self._run_sampling: RunSampling | None = None
        super().__init__(config)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        data, batch = self.config.data, self.config.data.train_batch_size
        for key, dataset in (("train_files", self.train_dataset), ("val_files", self.val_dataset)):
            files = [data[key]] if isinstance(data[key], str) else list(data[key])
            rows = sum(parquet.read_metadata(file).num_rows for file in files)
            limit = data.get("train_max_samples" if key == "train_files" else "val_max_samples", -1)
            rows = min(rows, limit) if limit and limit > 0 else rows
            if len(dataset) < rows:
                self.sink.warning(
                    f"data.{key}: {rows - len(dataset)} of {rows} prompts are longer than data.max_prompt_length="
                    f"{data.max_prompt_length} tokens and are left out"
                )
        if len(self.train_dataset) < batch:
            raise ValueError(
                f"data.train_files has {len(self.train_dataset)} prompts of at most {data.max_prompt_length} tokens, "
                f"fewer than data.train_batch_size={batch}: raise data.max_prompt_length or lower the batch"
            )
        if len(self.val_dataset) == 0:
            raise ValueError(
                f"data.val_files has no prompt of at most data.max_prompt_length={data.max_prompt_length} tokens"
            )
        self.val_dataloader = NamingLoader(self.val_dataloader)
        self.questions = TrainingQuestions(
            self.config,
            self.distill,
            list(self.train_dataset.dataframe["extra_info"]),
            self.tokenizer,
            folder=self._folder / "pass_rates",
            requests=self._training_requests,
            warn=self.sink.warning,
        )

    def _training_requests(self) -> list[SampleRequest]:
        """All questions of the training set that the loader did not leave out, for the sampler."""
        data, there = self.config.data, set(self.questions.ids)
        files = file_list(data.train_files)
        requests, _ = read_questions(files, "data.train_files", prompt_key=data.get("prompt_key", "prompt"))
        return [request for request in requests if request.question_id in there]

    def _sampling(self) -> RunSampling:
        if self._run_sampling is None:
            client = self.get_llm_client()
            warn, working = self.sink.warning, self.sink.working
            self._run_sampling = RunSampling(self.config, client, self.tokenizer, warn, working)
        return self._run_sampling

    def on_step_begin(self) -> None:
        """Before the rollout of a step: pass rates where they are due, and another stage where one begins."""
        super().on_step_begin()
        done = self.global_steps - 1
        if self.questions.due(done):
            heartbeat.beat(heartbeat.SAMPLE)
            with marked_timer("pass_rates", self.timing_raw):
                self.questions.take(self._sampling(), done)
            if PREEMPTION.requested:
                self._stop()
            heartbeat.beat(heartbeat.ROLLOUT)
        stage = self.questions.begin(done)
        if stage != self.distill:
            self.distill = stage
            for group in (self.actor_rollout_wg, self.teacher_wg):
                if group is not None:
                    group.enter_stage(asdict(stage))

    def _fetch_one_gen_batch(self) -> TensorDict:
        if self.questions.stream is None:
            batch = super()._fetch_one_gen_batch()
        else:
            size = self.config.data.get("gen_batch_size", None) or self.config.data.train_batch_size
            rows = collate_fn([self.train_dataset[i] for i in self.questions.stream.take(size)])
            rows["uid"] = np.array([str(uuid.uuid4()) for _ in range(size)], dtype=object)
            batch = tu.get_tensordict(rows)
        sequences = self.distill.sequences
        if self.distill.enabled and sequences.source == "reference":
            tu.assign_non_tensor(batch, agent_name=REPLAY_AGENT, **{REFERENCE_KEY: sequences.reference_key})
        if self.distill.pairs:
            self._ask_for_pairs(batch)
        return batch

    def _ask_for_pairs(self, batch: TensorDict) -> None:
        """Names the agent loop of the pairs and gives it the teacher's prompt of each question."""
        prompts = teacher_prompts(
            [list(messages) for messages in batch["raw_prompt"]],
            [dict(info) for info in batch["extra_info"]],
            context=self.distill.context,
            tokenizer=self.tokenizer,
            template_kwargs=dict(self.config.data.get("apply_chat_template_kwargs") or {}),
        )
        tu.assign_non_tensor_stack(batch, TEACHER_IDS, [ids or [] for ids in prompts])
        tu.assign_non_tensor(batch, agent_name=PAIR_AGENT)
        if self.distill.sequences.positive == "reference":
            tu.assign_non_tensor(batch, **{REFERENCE_KEY: self.distill.sequences.reference_key})

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()
        if self._forgetting.settings.files and self.global_steps in (0, self.total_training_steps):
            metrics |= self._forgetting.measure(self._sampling(), self.global_steps)
        return metrics
