"""One Ray cluster and one recorded run for all end-to-end tests: starting costs more than training here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tiny_world import main as make_tiny_world
from recipe.cluster import prepare_environment, ray_cluster
from recipe.compose import ROOT, compose_config
from recipe.train import run

SMALL = ["run.quiet=true", "run.val_every=-1", "run.val_before=false", "data.train_batch_size=6"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny-world parquet files."""
    folder = tmp_path_factory.mktemp("tiny_world")
    # Easy questions: a batch of six without any success, which trains nothing, is then out of the question.
    arguments = ["--out", str(folder), "--train-size", "48", "--test-size", "12", "--levels", "1-3"]
    assert make_tiny_world(arguments) in (0, None)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster with two logical GPUs."""
    # Worker processes must not inherit the test's thread settings for BLAS from a shell.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    prepare_environment("cpu")
    with ray_cluster(compose_config(["trainer.n_gpus_per_node=2", "run.ray_num_cpus=24"])):
        yield


class Runs:
    """Runs on the shared cluster that replay the same rollouts."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def overrides(self, steps: int, *, replay: bool = True) -> list[str]:
        """What all runs share."""
        replayed = [
            "trainer.experiment_name=replay",
            "skip.rollout_tq.enable=true",
            f"skip.rollout_tq.dump_dir={self.folder}/rollouts",
            f"skip.rollout_tq.steps={list(range(1, steps + 1))}".replace(" ", ""),
        ]
        return [
            *SMALL,
            f"run.steps={steps}",
            f"data.train_files={self.data}/train.parquet",
            f"data.val_files={self.data}/test.parquet",
            "distill.fingerprints=true",
            *(replayed if replay else []),
        ]

    def __call__(self, name: str, *overrides: str, steps: int, replay: bool = True) -> tuple[dict[str, Any], Path]:
        """Trains and returns the summary and the output folder."""
        output = self.folder / name
        config = compose_config([*self.overrides(steps, replay=replay), f"run.output_dir={output}", *overrides])
        return run(config), output


@pytest.fixture(scope="session")
def runs(cluster: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The factory of runs."""
    return Runs(tmp_path_factory.mktemp("runs"), data)


@pytest.fixture(scope="session")
def recorded(runs: Runs) -> tuple[dict[str, Any], Path]:
    """SDPO, four steps, a checkpoint every second, validated before; its rollouts are what others replay."""
    return runs("sdpo", "method=sdpo", "run.save_every=2", "run.val_before=true", "run.val_samples=2", steps=4)


@pytest.fixture(scope="session")
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the training steps of a run."""

    def read(output: Path) -> list[dict[str, Any]]:
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["step"] > 0]

    return read


SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def _random_model(family: str, folder: Path) -> Path:
    """A model with the tiny world's tokenizer and random weights."""
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        Olmo3Config,
        Olmo3ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(0)
    if family == "qwen3":
        shape = {**SHAPE, "hidden_size": 48, "head_dim": 16, "tie_word_embeddings": True}
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    else:
        model = Olmo3ForCausalLM(Olmo3Config(**SHAPE, sliding_window=64, tie_word_embeddings=False))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "models" / "tiny_world" / "plain").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_model() -> Callable[[str, Path], Path]:
    """Makes a tiny model of a family (llama, olmo3: own head; qwen3: tied) in a folder."""
    return _random_model
