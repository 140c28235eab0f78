"""verl's SFT trainer on a machine without an accelerator, with our platform and engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pandas
import pytest

from recipe.cluster import prepare_environment
from recipe.compose import ROOT

pytestmark = pytest.mark.e2e


def test_sft_trains_on_a_cpu(data, tmp_path):
    rows = pandas.read_parquet(data / "train.parquet")
    messages = [
        [*list(prompt), {"role": "assistant", "content": info["solution"]}]
        for prompt, info in zip(rows["prompt"], rows["extra_info"], strict=True)
    ]
    pandas.DataFrame({"messages": messages[:32]}).to_parquet(tmp_path / "sft.parquet")
    environment = os.environ | prepare_environment("cpu")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
        "-m", "verl.trainer.sft_trainer",
        f"data.train_files={tmp_path}/sft.parquet", "data.train_batch_size=8", "data.micro_batch_size_per_gpu=8",
        "data.max_length=128", "data.num_workers=0", "data.ignore_input_ids_mismatch=true",
        f"model.path={ROOT}/models/tiny_world/plain", "model.use_remove_padding=false",
        "model.enable_gradient_checkpointing=false", "model.external_lib=verl_ext.engine",
        "+model.override_config.attn_implementation=sdpa",
        "engine.strategy=fsdp2", "engine.use_torch_compile=false",
        "+engine.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        "optim.lr=1e-3", "trainer.device=cpu", "trainer.logger=[console]", "trainer.total_training_steps=4",
        f"trainer.default_local_dir={tmp_path}/checkpoints", "trainer.save_freq=4",
    ]  # fmt: skip
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"train/loss:([0-9.]+)", result.stdout)]
    assert len(losses) == 4 and 0 < losses[-1] < 2
    assert list((tmp_path / "checkpoints").glob("global_step_4/**/*.pt"))
