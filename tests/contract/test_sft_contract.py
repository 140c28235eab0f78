"""Fine-tuning on verl's engine: loss and gradient against float64, and what we rely on in verl's SFT trainer."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import random
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from recipe.compose import ROOT, compose_config
from recipe.sft_settings import sft_config, verl_sft_config
from verl_ext.sft_rows import TokenRows, write_sft_rows

pytestmark = pytest.mark.contract

MODEL = ROOT / "models" / "tiny_world" / "plain"
SAME_WEIGHTS = 1e-30
"""A learning rate that changes no fp32 weight."""

PROGRAM = """
import json, sys
from recipe.cluster import prepare_environment
prepare_environment("cpu")
from functools import partial
from pathlib import Path
from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu
from verl.workers.config import TrainingWorkerConfig
from verl_ext.sft_trainer import SftTrainer, SftWorker, sft_loss, spread

folder = Path(sys.argv[1])
found = {}
for name in ("padded", "packed"):
    trainer = SftTrainer.__new__(SftTrainer)
    trainer.config, trainer.seed = OmegaConf.load(folder / f"{name}.yaml"), 0
    trainer._build_config(); trainer._build_dataset(); trainer._build_dataloader()
    worker = SftWorker(TrainingWorkerConfig(
        model_type="language_model", model_config=trainer.model_config, engine_config=trainer.engine_config,
        optimizer_config=trainer.optimizer_config, checkpoint_config=trainer.checkpoint_config,
        profiler_config=trainer.profiler_config))
    worker.set_loss_fn(partial(sft_loss, config=None))
    worker.reset()
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    silent = spread(rows, 4)
    assert len(silent) == 8 and sum(not row["loss_mask"].any() for row in silent) == 3
    for case, chosen, tokens in (("one", rows, 4096), ("many", rows, 64), ("silent", silent, 96)):
        trainer.config.data.max_token_len_per_gpu = tokens
        metrics = tu.get(worker.train_batch(trainer._tensordict(chosen)), "metrics")
        found[f"{name} {case}"] = {key: metrics[key] for key in ("loss", "grad_norm", "lr")}
    found[f"{name} next lr"] = worker.engine.lr_scheduler.get_last_lr()[0]
before = worker.engine.checkpoint_manager.checkpoint_save_contents
worker.save_model(str(folder / "model"))
manager = worker.engine.checkpoint_manager
assert manager.checkpoint_save_contents is before and manager.previous_saved_paths == []
(folder / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Five sequences; masks with holes, one that begins at the second token and ones that reach the last."""
    draw = random.Random(7)
    made = []
    for length in (9, 33, 2, 61, 20):
        mask = [0, 1, *(draw.randint(0, 1) for _ in range(length - 3)), 1][:length]
        ids = [draw.randrange(3, 115) for _ in range(length)]
        made.append({"input_ids": ids, "loss_mask": mask, "kind": "test", "question_id": "q"})
    return made


@pytest.fixture(scope="module")
def folder(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What verl's worker made of them, on one rank without Ray: found.json and the model folder."""
    folder = tmp_path_factory.mktemp("sft")
    write_sft_rows(folder / "x.parquet", rows)
    for name, packed in (("padded", "false"), ("packed", "true")):
        config = compose_config(
            [f"sft.files=[{folder}/x.parquet]", f"sft.out={folder}", f"sft.lr={SAME_WEIGHTS}", "sft.warmup=0.5",
             "sft.max_length=64", "sft.steps=4", "sft.clip=1e9", f"actor_rollout_ref.model.use_remove_padding={packed}"]
        )  # fmt: skip
        asked = verl_sft_config(
            config, sft_config(config), files=[str(folder / "x.parquet")], checkpoints=folder / "checkpoints", steps=4
        )
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(_plain(asked)))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VERL_", "RAY_"))}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (folder / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, folder / "program.py", folder], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def float64(rows: list[dict[str, Any]], shift: int = 0) -> tuple[float, float]:
    """Mean cross entropy over the tokens with mask 1, each predicted from those before it, and its gradient's norm."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64, attn_implementation="eager")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for place, token in enumerate(row["input_ids"]):
            if place and row["loss_mask"][(place + shift) % len(row["loss_mask"])]:
                total = total + torch.logsumexp(logits[place - 1], dim=0) - logits[place - 1, token]
                count += 1
    loss = total / count
    loss.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
    return loss.item(), norm


CASES = [f"{layout} {case}" for layout in ("padded", "packed") for case in ("one", "many", "silent")]


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_tokens_with_mask_1_are_trained_on_whatever_the_micro_batches(
    case: str, folder: Path, rows: list[dict[str, Any]]
) -> None:
    found = json.loads((folder / "found.json").read_text())[case]
    loss, norm = float64(rows)
    assert found["loss"] == pytest.approx(loss, rel=2e-6)
    assert found["grad_norm"] == pytest.approx(norm, rel=2e-5)


def test_a_mask_that_is_off_by_one_would_have_been_seen(rows: list[dict[str, Any]]) -> None:
    loss = float64(rows)[0]
    assert all(float64(rows, shift)[0] != pytest.approx(loss, rel=1e-4) for shift in (-1, 1))


def test_the_learning_rate_is_the_step_s_own(folder: Path) -> None:
    """Two of four steps warm up from 0, then half a cosine; verl's own figure is the next step's."""
    found = json.loads((folder / "found.json").read_text())
    rates = [found[f"packed {case}"]["lr"] / SAME_WEIGHTS for case in ("one", "many", "silent")]
    assert rates == pytest.approx([0.0, 0.5, 1.0]) and found["packed next lr"] / SAME_WEIGHTS == pytest.approx(0.5)


def test_a_model_folder_holds_weights_and_no_shards(folder: Path) -> None:
    from safetensors.torch import load_file

    made = folder / "model" / "huggingface"
    assert not list(folder.glob("model/*.pt")) and (made / "tokenizer.json").exists()
    before, after = load_file(MODEL / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # What SftTrainer.save_model corrects.
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"
    assert {weight.dtype for weight in after.values()} == {torch.float32}


# --------------------------------------------------------------------------------------------- verl's trainer, as it is


def calls(function: Any) -> list[str]:
    """The calls on ``self`` that a function makes, in the order of its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset))
    return [name for name in (ast.unparse(node.func) for node in nodes) if name.startswith("self.")]


def test_the_base_constructor_builds_what_ours_builds_in_the_same_order() -> None:
    from verl.trainer.sft_trainer_ray import SFTTrainer

    from verl_ext.sft_trainer import SftTrainer

    order = ["self._build_config", "self._build_dataset", "self._build_dataloader", "self._build_engine",
             "self._build_ckpt_handler", "self.ckpt_handler.load_checkpoint"]  # fmt: skip
    assert calls(SFTTrainer.__init__) == order
    assert [name for name in calls(SftTrainer.__init__) if name != "self.end"] == order
    for name in ("_build_dataloader", "_build_engine", "fit"):
        assert set(inspect.signature(getattr(SFTTrainer, name)).parameters) == {"self"}


def test_a_step_of_the_base_trainer_gives_the_worker_what_ours_gives() -> None:
    """verl's ``fit`` puts these beside the rows; more of them after an upgrade would be missed here."""
    from verl.trainer.sft_trainer_ray import SFTTrainer

    from verl_ext.sft_trainer import SftTrainer

    def keys(function: Any, name: str) -> set[str]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
        return next(k for k in ({key.value for key in node.keys if key is not None} for node in found) if name in k)

    assert keys(SftTrainer._tensordict, "pad_mode") == keys(SFTTrainer.fit, "pad_mode")


def test_verl_s_yaml_has_every_key_that_we_set() -> None:
    from verl import trainer

    known = yaml.safe_load((Path(trainer.__file__).parent / "config" / "sft_trainer_engine.yaml").read_text())
    config = compose_config(["sft.files=[x]", "sft.out=y"])
    asked = _plain(verl_sft_config(config, sft_config(config), files=["x"], checkpoints=Path("c"), steps=1))
    for block in ("data", "trainer"):
        assert set(asked[block]) <= set(known[block])
    assert set(asked) == set(known) - {"defaults"} | {"model", "engine", "optim", "profiler"}


def test_verl_makes_its_data_set_from_our_class(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.sft_trainer_ray import create_sft_dataset

    write_sft_rows(tmp_path / "x.parquet", rows)
    config = compose_config(["sft.files=[x]", "sft.out=y"])
    data = verl_sft_config(config, sft_config(config), files=["x"], checkpoints=Path("c"), steps=1).data
    made = create_sft_dataset(OmegaConf.create([str(tmp_path / "x.parquet")]), data, None, None)
    assert isinstance(made, TokenRows) and len(made) == len(rows)


def test_what_a_checkpoint_holds_can_be_changed_for_one_save() -> None:
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

    from verl_ext.compat import saving_only

    source = inspect.getsource(BaseCheckpointManager)
    assert "self.checkpoint_save_contents = checkpoint_save_contents" in source
    assert '"hf_model" in self.checkpoint_save_contents' in source and "self.previous_saved_paths = []" in source
    manager = SimpleNamespace(checkpoint_save_contents=["model"], previous_saved_paths=["a"])
    with pytest.raises(RuntimeError), saving_only(manager, ["hf_model"]):
        assert manager.checkpoint_save_contents == ["hf_model"]
        manager.previous_saved_paths.append("b")
        raise RuntimeError
    assert (manager.checkpoint_save_contents, manager.previous_saved_paths) == (["model"], ["a"])


def test_the_tracker_is_written_last_of_a_checkpoint() -> None:
    from verl.utils.checkpoint import CheckpointHandler

    source = inspect.getsource(CheckpointHandler.save_checkpoint)
    order = [source.index(text) for text in ("self.engine.save_checkpoint(", "torch.save(", "os.rename(")]
    assert order == sorted(order)


# ------------------------------------------------------------------------------------------------------- order of rows


def test_every_epoch_reads_every_row_once_in_an_order_of_its_own() -> None:
    from verl_ext.sft_trainer import SeededBatches

    batches = SeededBatches(10, 4, seed=3)
    epochs = [[batches.batch(step) for step in range(first, first + 3)] for first in (1, 4, 7)]
    assert all([len(batch) for batch in epoch] == [4, 4, 2] for epoch in epochs)
    assert all(sorted(sum(epoch, [])) == list(range(10)) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3 and [batches.epoch(step) for step in (1, 3, 4)] == [1, 1, 2]
    again = SeededBatches(10, 4, seed=3)
    assert again.batch(5) == epochs[1][1], "no earlier step is needed"
    assert SeededBatches(10, 4, seed=4).batch(1) != epochs[0][0] != SeededBatches(10, 4, seed=2).batch(4)
    again.load_state_dict(batches.state_dict())
    with pytest.raises(ValueError, match="'seed': 4"):
        again.load_state_dict(SeededBatches(10, 4, seed=4).state_dict())
