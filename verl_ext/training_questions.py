"""Which questions a run takes and what they weigh, where that does not follow from the batch alone.

With weights from a store (PACED, single pass) questions of weight 0 are not sampled; where reference texts are
replayed, neither are questions whose texts are all longer than a response may be. Both are counted.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_ext.config import DistillConfig
from verl_ext.pass_rate_store import PassRateTable, read_pass_rates
from verl_ext.question_stream import QuestionStream
from verl_ext.question_weights import BatchWeigher, RunningWeigher, StoredWeigher, Weigher
from verl_ext.reference_text import reference_responses
from verl_ext.run_sampling import RunSampling, rollout_settings
from verl_ext.running_rates import RunningPassRates
from verl_ext.sample_store import StoreError
from verl_ext.sampling import SampleRequest
from verl_ext.stages import rates_due, rates_from, stage_after, stages

STATE_FILE = "questions.json"


class TrainingQuestions:
    """The training set's questions over a run.

    Args:
        rows: ``extra_info`` of every row of the training set, in its order.
        requests: makes the sampler's requests of all questions; called when the run takes pass rates itself.
        folder: of the pass rates that the run takes.
    """

    def __init__(
        self,
        config: DictConfig,
        distill: DistillConfig,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        folder: Path,
        requests: Callable[[], list[SampleRequest]],
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._distill, self._tokenizer = config, distill, tokenizer
        self._rows, self._folder, self._requests, self._warn = rows, folder, requests, warn
        self.ids = [str(row["question_id"]) for row in rows]
        self.steps = int(config.run.steps)
        self._table: PassRateTable | None = None
        self._table_from: int | str | None = None
        self._running: RunningPassRates | None = None
        self._now: tuple[DistillConfig, int | str | None] | None = None
        self._fitting: dict[tuple[str, str], int] = {}
        self.stream: QuestionStream | None = None
        self.weigher: Weigher = BatchWeigher(distill.weighting)
        self.dropped: dict[str, int] = {}
        # For the whole run: a stream that began half way could not be told from one that was lost.
        self._choosing = any(_chooses(stage) for stage in stages(distill))

    # -------------------------------------------------------------------------------------------------- pass rates

    def due(self, done: int) -> bool:
        """Whether pass rates must be taken before the step that follows ``done`` steps."""
        return done in rates_due(self._distill, self.steps)

    def take(self, sampling: RunSampling, done: int) -> None:
        """Takes the pass rates of all questions with the present weights; what was drawn before is not drawn again."""
        samples = stage_after(self._distill, done, self.steps).weighting.samples
        settings = rollout_settings(self._config, samples)
        sampling.draw(self._requests(), self._of_step(done), settings, step=done, what="pass rates")
        self._table_from = self._now = None

    def resume(self, done: int) -> None:
        """Makes ready to go on after ``done`` steps: pass rates of later steps, which are lost, are removed."""
        for folder in self._folder.glob("step_*"):
            if int(folder.name.removeprefix("step_")) > done:
                shutil.rmtree(folder)

    def _of_step(self, done: int) -> Path:
        return self._folder / f"step_{done}"

    def _read(self, source: int | str, stage: DistillConfig) -> PassRateTable:
        folder = self._of_step(source) if isinstance(source, int) else Path(source)
        table = read_pass_rates(folder, threshold=stage.context.success_threshold)
        missing = table.missing(self.ids)
        if missing:
            raise StoreError(
                f"{folder} has no samples of {len(missing)} of the {len(self.ids)} training questions, the first is "
                f"{missing[0]}; run recipe.pass_rates on the same data again, it draws what is missing"
            )
        return table

    # ----------------------------------------------------------------------------------------------------- a stage

    def begin(self, done: int) -> DistillConfig:
        """Makes ready for the step that follows ``done`` steps; returns the block that holds for it.

        Raises:
            StoreError: the store of pass rates lacks questions.
            ValueError: no question is left to train on.
        """
        stage = stage_after(self._distill, done, self.steps)
        source = rates_from(self._distill, done, self.steps)
        if (stage, source) != self._now:
            self._now = stage, source
            self._set(stage, source)
        return stage

    def _set(self, stage: DistillConfig, source: int | str | None) -> None:
        weighting = stage.weighting
        if weighting.rates == "running":
            self._running = RunningPassRates(
                weighting.decay, None if self._running is None else self._running.evidence()
            )
            self.weigher = RunningWeigher(self._running, weighting)
        elif source is not None:
            if source != self._table_from:
                self._table, self._table_from = self._read(source, stage), source
            rates = {name: self._table.rate(name) for name in self.ids}
            self.weigher = StoredWeigher(rates, weighting)
        else:
            self.weigher = BatchWeigher(weighting)
        self._choose(stage)

    def _choose(self, stage: DistillConfig) -> None:
        stored = isinstance(self.weigher, StoredWeigher)
        replayed = stage.enabled and stage.sequences.replays
        if not self._choosing:
            return
        kept, self.dropped = [], {}
        for i, (name, row) in enumerate(zip(self.ids, self._rows, strict=True)):
            if stored and math.isnan(self._table.rate(name)):
                reason = "no_verdict"
            elif stored and not self.weigher.keeps(name):
                reason = "weight_zero"
            elif replayed and not self._fits(row, stage.sequences.reference_key):
                reason = "reference_too_long"
            else:
                kept.append(i)
                continue
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if not kept:
            reasons = ", ".join(f"{count} for {reason}" for reason, count in self.dropped.items())
            raise ValueError(f"no training question is left: of {len(self.ids)}, {reasons} are left out")
        if self.stream is None:
            shuffle = bool(self._config.data.shuffle)
            self.stream = QuestionStream(kept, seed=int(self._config.data.seed or 0), shuffle=shuffle)
        else:
            self.stream.keep(kept)
        if len(kept) < self._config.data.train_batch_size:
            self._warn(
                f"only {len(kept)} training questions are left, fewer than data.train_batch_size="
                f"{self._config.data.train_batch_size}: some stand several times in a batch"
            )
        for reason, count in self.dropped.items():
            self._warn(f"{count} of {len(self.ids)} training questions are left out: {reason.replace('_', ' ')}")

    def _fits(self, row: Mapping[str, Any], key: str) -> bool:
        name = str(row["question_id"])
        if (name, key) not in self._fitting:
            try:
                responses = reference_responses(
                    row,
                    key,
                    self._tokenizer,
                    template_kwargs=dict(self._config.data.get("apply_chat_template_kwargs") or {}),
                    limit=int(self._config.data.max_response_length),
                )
            except ValueError as error:
                raise ValueError(f"question {name}, extra_info.{key}: {error}") from error
            self._fitting[name, key] = len(responses)
        return self._fitting[name, key] > 0

    def metrics(self) -> dict[str, float]:
        """How many questions take part, and why others do not."""
        counts = {f"questions/dropped_{reason}": float(count) for reason, count in sorted(self.dropped.items())}
        if self.stream is not None:
            counts["questions/kept"] = float(len(self.stream))
        if self._distill.schedule.switch is not None:
            counts["schedule/stage"] = 1.0 + (self._now is not None and self._now[0] != self._distill)
        return counts

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path) -> None:
        """Writes what a checkpoint must hold; nothing where the batch alone decides."""
        state: dict[str, Any] = {}
        if self.stream is not None:
            state["stream"] = self.stream.state_dict()
        if isinstance(self.weigher, RunningWeigher):
            state["running"] = self.weigher.estimate.state_dict()
        if state:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{STATE_FILE}.tmp"
            temporary.write_text(json.dumps(state))
            temporary.replace(folder / STATE_FILE)

    def load(self, folder: Path, done: int) -> None:
        """Reads what :meth:`save` wrote after ``done`` steps.

        Raises:
            StoreError: the pass rates of the last step are gone.
            ValueError: the state is missing, or does not fit the questions kept now.
        """
        # As it stood in the last step; what changes at this one happens again when the next step begins.
        self.begin(done - 1)
        path = folder / STATE_FILE
        running = self.weigher.estimate if isinstance(self.weigher, RunningWeigher) else None
        if self.stream is None and running is None:
            return
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint does not say where the order of questions stood")
        state = json.loads(path.read_text())
        try:
            if running is not None:
                running.load_state_dict(state["running"])
            if self.stream is not None:
                self.stream.load_state_dict(state["stream"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} does not fit this run: {error}") from error


def _chooses(stage: DistillConfig) -> bool:
    """Whether the stage leaves questions out."""
    return stage.enabled and (stage.weighting.rates == "store" or stage.sequences.replays)
