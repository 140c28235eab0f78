"""Forgetting: accuracy on a fixed held-out set before and after training (PACED, arXiv 2603.11178: 2,000 of MMLU)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_ext.forgetting_config import forgetting_config
from verl_ext.pass_rate_store import read_pass_rates
from verl_ext.question_data import read_questions
from verl_ext.run_sampling import RunSampling
from verl_ext.verifier_config import route_through_pool


class Forgetting:
    """Asks the held-out questions, and remembers the first answers over restarts of the run.

    Args:
        folder: of the samples.
    """

    def __init__(self, config: DictConfig, folder: Path, warn: Callable[[str], None]) -> None:
        self.settings = forgetting_config(config.forgetting)
        self._folder, self._warn = folder, warn
        self._config = config
        if self.settings.function is not None:
            self._config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
            with open_dict(self._config):
                self._config.verifier.function = self.settings.function
                self._config.verifier.options = dict(self.settings.options)
                self._config.reward.custom_reward_function = {"path": None, "name": "compute_score"}
            route_through_pool(self._config)

    def measure(self, sampling: RunSampling, step: int) -> dict[str, float]:
        """Accuracy with the present weights; after the start also how many points were lost since.

        Raises:
            ConfigError, PromptError, StoreError: a file, a prompt or the store does not fit.
        """
        prompt_key = self._config.data.get("prompt_key", "prompt")
        requests, _ = read_questions(self.settings.files, "forgetting.files", prompt_key=prompt_key)
        settings = self.settings.sampling(int(self._config.data.max_response_length), int(self._config.run.seed))
        sampling.draw(requests, self._of_step(step), settings, step=step, what="forgetting", config=self._config)
        after = self._rates(step)
        metrics = {"forgetting/accuracy": _mean(list(after.values()))}
        if step == 0:
            return metrics
        if not self._of_step(0).is_dir():
            self._warn("forgetting: this run has no samples from before its first step, so no loss can be given")
            return metrics
        # Of questions that were judged both times: another set has another accuracy, without anything being lost.
        lost = [100.0 * (rate - after[name]) for name, rate in self._rates(0).items() if name in after]
        return metrics | {"forgetting/points_lost": _mean(lost)}

    def resume(self, done: int) -> None:
        """Removes the samples of steps that a run which goes on after ``done`` steps has lost."""
        for folder in self._folder.glob("step_*"):
            if int(folder.name.removeprefix("step_")) > done:
                shutil.rmtree(folder)

    def _rates(self, step: int) -> dict[str, float]:
        """The share of right answers by question; unjudged ones are left out."""
        table = read_pass_rates(self._of_step(step))
        return {name: rate.rate for name, rate in table.rates.items() if not math.isnan(rate.rate)}

    def _of_step(self, step: int) -> Path:
        return self._folder / f"step_{step}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
