"""The block ``sft``, the configuration that verl gets of it, and `python -m recipe.sft` without a cluster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from recipe import preflight, sft
from recipe.compose import compose_config
from recipe.sft import MANIFEST, compose, main, run
from recipe.sft_settings import SftConfig, sft_config, verl_sft_config
from verl_ext.config import ConfigError
from verl_ext.sft_rows import write_sft_rows

GIVEN = ["sft.files=[x.parquet]", "sft.out=out"]
ROW = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1], "kind": "revision", "question_id": "q"}


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """Composed once: Hydra takes longer than a test."""
    return compose(GIVEN)


def changed(config: DictConfig, *overrides: str) -> DictConfig:
    return OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))


def test_the_defaults_are_those_of_sd_zero_s_code(composed: DictConfig) -> None:
    block = sft_config(composed)
    assert (block.lr, block.epochs, block.schedule, block.warmup, block.weight_decay) == (5e-6, 3, "cosine", 0.05, 1e-4)
    assert (block.betas, block.max_length) == ([0.9, 0.95], 32768)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": None}, "sft.files has no value"),
        ({"files": "x.parquet"}, "sft.files is 'x.parquet'; allowed: a list"),
        ({"out": None}, "sft.out has no value"),
        ({"lr": 0}, "sft.lr is 0; allowed: a number above 0"),
        ({"lr": float("nan")}, "sft.lr is nan; allowed: a number above 0"),
        ({"lr": "1e-5"}, "sft.lr is '1e-5'; allowed: a number above 0"),
        ({"epochs": 0}, "sft.epochs is 0; allowed: a whole number from 1"),
        ({"epochs": None}, "sft.epochs is None; allowed: a whole number from 1"),
        ({"steps": 0}, "sft.steps is 0; allowed: a whole number from 1"),
        ({"batch_size": True}, "sft.batch_size is True; allowed: a whole number from 1"),
        ({"max_length": 1}, "sft.max_length is 1; allowed: a whole number from 2"),
        ({"schedule": "linear"}, "sft.schedule is 'linear'; allowed: cosine, constant"),
        ({"warmup": 1.0}, "sft.warmup is 1.0; allowed: a share from 0 to below 1"),
        ({"min_lr_ratio": 1.5}, "sft.min_lr_ratio is 1.5; allowed: a share from 0 to 1"),
        ({"weight_decay": -0.1}, "sft.weight_decay is -0.1; allowed: a number from 0"),
        ({"betas": [0.9]}, r"sft.betas is \[0.9\]; allowed: two numbers"),
        ({"betas": [0.9, 1.0]}, "allowed: two numbers from 0 to below 1"),
        ({"clip": 0.0}, "sft.clip is 0.0; allowed: a number above 0"),
        ({"save_every": 0}, "sft.save_every is 0; allowed: a whole number from 1, or -1"),
        ({"max_tokens_per_gpu": 0}, "sft.max_tokens_per_gpu is 0; allowed: a whole number from 1"),
    ],
)
def test_a_wrong_value_is_refused_with_the_key_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SftConfig(**{"files": ["x.parquet"], "out": "out", **change}).validate()


def test_a_micro_batch_holds_the_longest_sequence(composed: DictConfig) -> None:
    with pytest.raises(ConfigError, match="sft.max_tokens_per_gpu is 100; allowed: at least sft.max_length = 101 over"):
        sft_config(changed(composed, "sft.max_tokens_per_gpu=100", "sft.max_length=101"))
    with pytest.raises(ConfigError, match="actor_rollout_ref.model.lora_rank is 8; allowed: 0"):
        sft_config(changed(composed, "actor_rollout_ref.model.lora_rank=8"))


def test_steps_count_the_rest_of_an_epoch() -> None:
    block = SftConfig(epochs=3, batch_size=10)
    assert [block.total_steps(rows) for rows in (1, 10, 11, 25)] == [3, 3, 6, 9]
    assert SftConfig(epochs=3, batch_size=10, steps=4).total_steps(25) == 4


def test_only_what_decides_the_result_tells_runs_apart() -> None:
    same = SftConfig(out="a").deciding()
    assert same == SftConfig(out="b", files=["x"], save_every=5, max_tokens_per_gpu=9).deciding()
    for change in ({"lr": 1e-5}, {"epochs": 2}, {"betas": [0.9, 0.9]}):
        assert same != SftConfig(**change).deciding()
    assert SftConfig(steps=4, epochs=1).deciding() == SftConfig(steps=4, epochs=2).deciding()


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_verl_gets_model_precision_and_ranks_of_the_run_and_the_optimiser_of_the_block(hardware: str) -> None:
    config = compose([*GIVEN, f"hardware={hardware}", "model=qwen3_8b", "sft.lr=1e-5", "trainer.nnodes=2"])
    made = verl_sft_config(config, sft_config(config), files=["x"], checkpoints=Path("c"), steps=7)
    whole: dict[str, Any] = OmegaConf.to_container(config, resolve=True)["actor_rollout_ref"]
    assert OmegaConf.to_container(made.model) == whole["model"]
    own = {"strategy", "use_dynamic_bsz", "max_token_len_per_gpu"}
    engine = OmegaConf.to_container(made.engine)
    assert {k: v for k, v in engine.items() if k not in own} == {
        k: v for k, v in whole["actor"]["fsdp_config"].items() if k not in own
    }
    assert made.engine.strategy == "fsdp2" and made.engine.max_token_len_per_gpu == 32768
    assert (made.trainer.nnodes, made.trainer.device) == (2, {"cpu": "cpu", "gpu": "cuda"}[hardware])
    assert (made.optim.lr, made.optim.betas, made.optim.clip_grad) == (1e-5, [0.9, 0.95], 1.0)
    # The preset's own warm-up steps would win over the share.
    assert (made.optim.lr_warmup_steps, made.optim.lr_warmup_steps_ratio) == (-1, 0.05)
    assert made.trainer.total_training_steps == 7 and made.checkpoint.save_contents == ["model", "optimizer", "extra"]


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def asked(composed: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    """A run over one row that must not get as far as training."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a run that is refused or skipped trains nothing")

    monkeypatch.setattr(sft, "_train", refuse)
    write_sft_rows(tmp_path / "x.parquet", [ROW])
    return changed(composed, f"sft.files=[{tmp_path}/x.parquet]", f"sft.out={tmp_path}/out")


def test_a_wrong_call_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument, message in (("sft.lrr=1", "sft.lrr=1"), ("sft.files=[/no.parquet]", "/no.parquet does not exist")):
        assert main(["sft.files=[x]", f"sft.out={tmp_path}/out", argument]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.max_length=2", "x.parquet, row 0, column input_ids: 3 tokens; allowed: up to 2"),
        ("actor_rollout_ref.model.path=/missing", "/missing"),
        ("actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2", "flash-attn is not"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    override: str, message: str, asked: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=message):
        run(changed(asked, override))
    assert not Path(asked.sft.out).exists()


def test_rows_that_do_not_fit_the_model_are_refused(asked: DictConfig, tmp_path: Path) -> None:
    write_sft_rows(tmp_path / "x.parquet", [ROW, {**ROW, "input_ids": [5, 6, 128]}])
    with pytest.raises(ConfigError, match="row 1, column input_ids: token 128; the model has 128 tokens"):
        run(asked)
    write_sft_rows(tmp_path / "x.parquet", [{**ROW, "input_ids": [5] * 513, "loss_mask": [0] * 512 + [1]}])
    with pytest.raises(ConfigError, match="row 0: 513 tokens; allowed: up to the model's 512 positions"):
        run(asked)


def test_a_folder_of_something_else_is_left_alone(asked: DictConfig) -> None:
    (Path(asked.sft.out) / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds model but no sft.json; choose another folder"):
        run(asked)


def write_manifest(asked: DictConfig, **change: Any) -> Path:
    """That of a run with these settings."""
    path = Path(asked.sft.out) / MANIFEST
    path.parent.mkdir()
    path.write_text(json.dumps({"settings": sft._settings(asked, sft_config(asked)), "finished": False, **change}))
    return path


def test_another_run_is_refused_with_the_difference(asked: DictConfig, tmp_path: Path) -> None:
    path = write_manifest(asked)
    with pytest.raises(ConfigError, match="holds a run with sft.epochs=3, this one has 4"):
        run(changed(asked, "sft.epochs=4"))
    write_sft_rows(tmp_path / "x.parquet", [ROW, ROW])
    with pytest.raises(ConfigError, match="holds a run with contents of sft.files="):
        run(asked)
    path.write_text("{")
    with pytest.raises(ConfigError, match="sft.json cannot be read"):
        run(asked)


def test_a_finished_run_comes_back_without_ray(asked: DictConfig, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(asked.actor_rollout_ref.model.path)
    path = write_manifest(asked, finished=True, summary={"steps": 3, "skipped": False, "model": "moved since"})
    with pytest.raises(AssertionError, match="trains nothing"):
        run(asked)  # its model is gone: it is made again
    shutil.copytree(model, path.parent / "model")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": True, "summary": {"steps": 3}}))
    summary = run(asked)
    assert summary == {"steps": 3, "skipped": True, "model": str(path.parent / "model")}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary


def test_a_checkpoint_of_another_number_of_ranks_is_refused(asked: DictConfig) -> None:
    checkpoint = write_manifest(asked).parent / "checkpoints" / "global_step_3"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("3")
    (checkpoint / "model_world_size_2_rank_0.pt").touch()
    with pytest.raises(ConfigError, match=r"was written by \[2\] ranks, this run has 1"):
        run(asked)


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"sft.{key}=" in text for key in SftConfig.__dataclass_fields__)


def test_training_composes_with_the_block_left_empty() -> None:
    assert compose_config([]).sft.files is None
