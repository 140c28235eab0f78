"""Forgetting: the block's refusals, and how many points a held-out set lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ext.config import ConfigError
from verl_ext.forgetting import Forgetting
from verl_ext.forgetting_config import ForgettingConfig, defaults, forgetting_config
from verl_ext.sample_store import SampleStore
from verl_ext.sampling import SampleRequest, SamplingSettings
from verl_ext.verifier_config import VerifierConfig

MARKS = {"1": (1.0, "ok"), "0": (0.0, "ok"), "e": (None, "error")}


@dataclass
class Sampling:
    """Stands for RunSampling: one mark a question and step; 1 right, 0 wrong, e verifier error."""

    answers: dict[int, str]
    asked: list[tuple[int, SamplingSettings, int]] = field(default_factory=list)
    verifiers: list[Any] = field(default_factory=list)

    def draw(
        self,
        requests: Sequence[SampleRequest],
        folder: Path,
        settings: SamplingSettings,
        *,
        step: int,
        what: str,
        config: DictConfig | None = None,
    ) -> None:
        self.verifiers.append(config)
        new = 0
        with SampleStore(folder, {"step": step}) as store:
            for request, mark in zip(requests, self.answers[step], strict=True):
                if (request.question_id, 0) in store:
                    continue
                score, status = MARKS[mark]
                row = {"question_id": request.question_id, "sample": 0, "prompt": "p", "score": score, "status": status}
                store.append(row | {"truncated": False, "tokens": 2})
                new += 1
        self.asked.append((step, settings, new))


def config(folder: Path, questions: int = 4, **block: Any) -> DictConfig:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+1"}],
            "data_source": "d",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": i, "question_id": f"q{i}"},
        }
        for i in range(questions)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "held_out.parquet")
    return OmegaConf.create(
        {
            "forgetting": defaults() | {"files": [str(folder / "held_out.parquet")]} | block,
            "data": {"max_response_length": 33, "prompt_key": "prompt"},
            "run": {"seed": 5},
            "verifier": vars(VerifierConfig(function="verl_ext.verifiers.tiny_world:compute_score")),
            "reward": {"custom_reward_function": {"path": None, "name": "compute_score"}},
        }
    )


def measured(tmp_path: Path, before: str, after: str) -> tuple[dict[str, float], dict[str, float]]:
    sampling = Sampling({0: before, 7: after})
    forgetting = Forgetting(config(tmp_path, len(before)), tmp_path / "forgetting", lambda text: None)
    return forgetting.measure(sampling, 0), forgetting.measure(sampling, 7)


# --------------------------------------------------------------------------------------------------------- the settings


def test_nothing_is_asked_by_default() -> None:
    assert forgetting_config(None).files == [] == forgetting_config(OmegaConf.create(defaults())).files
    assert ForgettingConfig(max_tokens=9).sampling(5, 3) == SamplingSettings(temperature=0.0, max_tokens=9, k=1, seed=3)
    assert ForgettingConfig().sampling(5).max_tokens == 5


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"samples": 0}, ["forgetting", "k is 0"]),
        ({"samples": 8}, ["forgetting", "k is 8", "1 with temperature 0"]),
        ({"temperature": -1.0}, ["forgetting", "temperature is -1.0"]),
        ({"max_tokens": 0}, ["forgetting", "max_tokens is 0", "from 1"]),
        ({"max_tokens": -3}, ["forgetting", "max_tokens is -3", "from 1"]),
        ({"files": "one.parquet"}, ["forgetting.files is 'one.parquet'", "list"]),
        ({"options": {"a": 1}}, ["forgetting.options", "forgetting.function"]),
        ({"file": []}, ["forgetting.file is not a key", "files"]),
        ({"samples": "many"}, ["forgetting.samples is 'many'", "int"]),
    ],
)
def test_bad_settings_are_refused_by_their_key(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        forgetting_config(values)
    for part in parts:
        assert part in str(caught.value), caught.value


# ---------------------------------------------------------------------------------------------------------- the measure


@pytest.mark.parametrize(
    ("before", "after", "accuracy", "lost"),
    [
        ("1110", "1100", 0.5, 25.0),
        ("0001", "1111", 1.0, -75.0),
        ("1010", "1010", 0.5, 0.0),
        ("1111", "0000", 0.0, 100.0),
    ],
)
def test_the_points_lost_are_the_difference_of_two_accuracies(
    tmp_path: Path, before: str, after: str, accuracy: float, lost: float
) -> None:
    first, last = measured(tmp_path, before, after)
    assert first == {"forgetting/accuracy": before.count("1") / 4}, "nothing can be lost yet"
    assert last == {"forgetting/accuracy": accuracy, "forgetting/points_lost": lost}


def test_a_verdict_that_failed_is_no_wrong_answer(tmp_path: Path) -> None:
    first, last = measured(tmp_path, "11e0", "1110")
    assert first["forgetting/accuracy"] == pytest.approx(2 / 3)
    assert last["forgetting/accuracy"] == 0.75


def test_the_loss_is_over_questions_that_were_judged_both_times(tmp_path: Path) -> None:
    # Nothing was forgotten: only the verifier failed on an easy question before, on a hard one after.
    _, last = measured(tmp_path, "e110", "111e")
    assert last["forgetting/points_lost"] == 0.0


def test_no_verdict_at_all_is_not_a_number(tmp_path: Path) -> None:
    first, last = measured(tmp_path, "eeee", "1111")
    assert math.isnan(first["forgetting/accuracy"]) and math.isnan(last["forgetting/points_lost"])


def test_a_resumed_run_compares_with_the_samples_from_before_the_first_step(tmp_path: Path) -> None:
    sampling = Sampling({0: "1111", 7: "1000"})
    Forgetting(config(tmp_path), tmp_path / "f", lambda text: None).measure(sampling, 0)
    warnings: list[str] = []
    resumed = Forgetting(config(tmp_path), tmp_path / "f", warnings.append)
    assert resumed.measure(sampling, 7)["forgetting/points_lost"] == 75.0
    assert [(step, new) for step, _, new in sampling.asked] == [(0, 4), (7, 4)] and warnings == []


def test_without_samples_from_before_no_loss_is_given_and_it_is_said(tmp_path: Path) -> None:
    warnings: list[str] = []
    forgetting = Forgetting(config(tmp_path), tmp_path / "f", warnings.append)
    assert forgetting.measure(Sampling({7: "1100"}), 7) == {"forgetting/accuracy": 0.5}
    assert len(warnings) == 1 and "no samples from before its first step" in warnings[0]


def test_how_and_what_is_asked(tmp_path: Path) -> None:
    sampling = Sampling({0: "10"})
    made = config(tmp_path, 2, samples=4, temperature=0.7)
    Forgetting(made, tmp_path / "f", lambda text: None).measure(sampling, 0)
    assert sampling.asked[0][1] == SamplingSettings(temperature=0.7, max_tokens=33, k=4, seed=5)
    assert sampling.verifiers[0] is made, "the run's own verifier"


def test_the_files_may_have_a_verifier_of_their_own(tmp_path: Path) -> None:
    sampling = Sampling({0: "10"})
    made = config(tmp_path, 2, function="verl_ext.verifiers.multiple_choice:compute_score")
    before = OmegaConf.to_container(made)
    Forgetting(made, tmp_path / "f", lambda text: None).measure(sampling, 0)
    used = sampling.verifiers[0]
    assert used.verifier.function == "verl_ext.verifiers.multiple_choice:compute_score"
    assert used.reward.custom_reward_function.reward_kwargs.verifier.function == used.verifier.function
    assert OmegaConf.to_container(made) == before, "training keeps its own"


def test_a_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    made = config(tmp_path, files=[str(tmp_path / "gone.parquet")])
    with pytest.raises(ConfigError, match=r"forgetting\.files: .*gone\.parquet does not exist"):
        Forgetting(made, tmp_path / "f", lambda text: None).measure(Sampling({0: ""}), 0)


def test_samples_of_steps_that_a_resumed_run_has_lost_are_drawn_again(tmp_path: Path) -> None:
    made = Forgetting(config(tmp_path), tmp_path / "f", lambda text: None)
    for step in (0, 7):
        made.measure(Sampling({0: "1111", 7: "0000"}), step)
    made.resume(5)
    again = Sampling({7: "1110"})
    assert made.measure(again, 7)["forgetting/points_lost"] == 25.0 and again.asked[0][2] == 4
    made.resume(7)
    assert (tmp_path / "f" / "step_7").is_dir(), "the weights of the checkpoint itself"
