"""A model folder from shards: bit for bit what was sharded, whatever the number of ranks; nothing unsafe is read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.compose import ROOT
from recipe.export import export, main
from verl_ext import teacher
from verl_ext.checkpoint_manifest import seal_files
from verl_ext.checkpoint_saving import complete, partial_folder, rank_files, step_folder
from verl_ext.config import ConfigError
from verl_ext.digest import digest
from verl_ext.model_identity import checkpoint_weights

MODEL = ROOT / "models" / "tiny_world" / "plain"


@contextmanager
def process_group(rank: int, ranks: int) -> Iterator[None]:
    """As one rank of several sees it; nothing communicates."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def sharded(state: dict[str, torch.Tensor], rank: int, ranks: int, copies: int) -> dict[str, Any]:
    """One rank's part, as FSDP2 makes it: rows in equal parts, the last ones short or empty, the same in every copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    names = ("fsdp",) if copies == 1 else ("ddp", "fsdp")
    shape = (ranks,) if copies == 1 else (copies, ranks // copies)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    placements = [Shard(0)] if copies == 1 else [Replicate(), Shard(0)]
    made = {}
    for name, tensor in state.items():
        parts = list(tensor.chunk(shape[-1]))
        parts += [tensor[:0]] * (shape[-1] - len(parts))
        local = parts[rank % shape[-1]].clone()
        made[name] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return made


def save_run(
    folder: Path,
    student: dict[str, torch.Tensor],
    ema: dict[str, torch.Tensor] | None = None,
    *,
    ranks: int = 1,
    copies: int = 1,
    lora: dict[str, Any] | None = None,
    step: int = 20,
) -> Path:
    """A run's folder with the checkpoint of a step."""
    checkpoints = folder / "checkpoints"
    with patch("os.fsync"), partial_folder(checkpoints) as partial:
        saved = step_folder(partial, step)
        (saved / "actor").mkdir(parents=True)
        shutil.copytree(MODEL, saved / "actor" / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
        for rank in range(ranks):
            with process_group(rank, ranks):
                shards = sharded(student, rank, ranks, copies)
                torch.save(shards, saved / "actor" / f"model_world_size_{ranks}_rank_{rank}.pt")
                if ema is not None:
                    own = {name: t.to_local() for name, t in sharded(ema, rank, ranks, copies).items()}
                    teacher.save(own, saved / "teacher", rank, ranks)
        if lora is not None:
            (saved / "actor" / "lora_train_meta.json").write_text(json.dumps(lora))
        complete(checkpoints, partial, step, [seal_files(saved, rank_files(saved, rank)) for rank in range(ranks)])
    config = {
        "distill": {"teacher": {"kind": "ema" if ema else "frozen", "path": None}},
        "actor_rollout_ref": {"model": {"path": "THE_MODEL", "lora_adapter_path": None}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Names as verl saves them: both names of tied weights."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    made = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])
    return made


def ema_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as the teacher is saved: parameters, tied ones once."""
    return {name: tensor * 0.9 for name, tensor in state.items() if name != "lm_head.weight"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]) -> Path:
    return save_run(tmp_path_factory.mktemp("run"), state, ema_of(state), ranks=3)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (3, 1), (4, 2)])
def test_student_and_teacher_come_out_bit_for_bit(
    tmp_path: Path, state: dict[str, torch.Tensor], ranks: int, copies: int
) -> None:
    run = save_run(tmp_path / "run", state, ema_of(state), ranks=ranks, copies=copies)
    about = export(run, tmp_path / "student")
    assert (about["step"], about["of"], about["dtype"], about["run"]) == (20, "student", "float32", "run")
    export(run, tmp_path / "teacher", teacher=True)
    untied = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    assert digest(parameters(tmp_path / "student")) == digest(untied)
    assert digest(parameters(tmp_path / "teacher")) == digest(ema_of(state))
    assert "lm_head.weight" not in load_file(tmp_path / "student" / "model.safetensors")


def test_the_folder_holds_what_serving_needs_and_is_a_checkpoint_for_the_other_commands(
    run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a" / "model"
    export(run, output)
    assert {path.name for path in output.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "export.json", "manifest.json",
    }  # fmt: skip
    ours, theirs = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(MODEL)
    messages = [{"role": "user", "content": "3 + 4 ="}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert checkpoint_weights(str(output)) == output
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_large_models_are_split_with_an_index(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setattr("recipe.export.FILE_BYTES", 300_000)
    export(run, tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 320_000 for path in files)
    assert torch.equal(parameters(tmp_path / "model")["model.norm.weight"], state["model.norm.weight"])
    assert digest(parameters(tmp_path / "model")) == digest(
        {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    )


def test_another_dtype_is_written_where_it_is_asked_for_and_config_says_so(
    run: Path, tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    assert export(run, tmp_path / "model", dtype="bfloat16")["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in saved.items())


def lora_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as peft makes them, with an adapter on the query projections."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if not name.endswith("q_proj.weight"):
            made[f"base_model.model.{name}"] = tensor
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        made[f"{module}.base_layer.weight"] = tensor
        made[f"{module}.lora_A.default.weight"] = torch.randn(4, tensor.shape[1], generator=generator)
        made[f"{module}.lora_B.default.weight"] = torch.randn(tensor.shape[0], 4, generator=generator)
    return made


def test_lora_is_merged_as_peft_merges_the_adapter_that_is_exported(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    from peft import PeftModel

    meta = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    run = save_run(tmp_path / "run", lora_state(state), ranks=2, lora=meta)
    assert export(run, tmp_path / "merged")["adapter"] == "merged"
    assert export(run, tmp_path / "adapter", adapter=True)["adapter"] == "alone"
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    merged, expected = parameters(tmp_path / "merged"), dict(peft.named_parameters())
    assert set(merged) == set(expected)
    assert max(float((merged[name] - expected[name]).detach().abs().max()) for name in merged) < 1e-6
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float((merged[name] - state[name]).detach().abs().max()) > 0.1


def refusal(run: Path, output: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        export(run, output, **options)
    assert not output.with_name(f"{output.name}.partial").exists()
    return str(caught.value)


def test_what_exists_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("x")
    assert f"{tmp_path / 'model'} exists" in refusal(run, tmp_path / "model")
    assert f"{tmp_path / 'model' / 'mine.txt'} exists" in refusal(run, tmp_path / "model" / "mine.txt")
    assert (tmp_path / "model" / "mine.txt").read_text() == "x"


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    path = damaged / "checkpoints" / "global_step_20" / "actor" / "model_world_size_3_rank_1.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path.name} has changed" in refusal(damaged, tmp_path / "model", step=20)
    assert f"{path.name} has changed" in refusal(damaged, tmp_path / "model")
    assert "steps with a checkpoint: 20" in refusal(damaged, tmp_path / "model", step=7)
    assert not (tmp_path / "model").exists()


def test_folders_without_what_is_asked_for_are_refused(run: Path, tmp_path: Path) -> None:
    assert "holds no config.yaml" in refusal(tmp_path, tmp_path / "model")
    shutil.copy(run / "config.yaml", tmp_path)
    assert "holds no checkpoint" in refusal(tmp_path, tmp_path / "model")
    assert "the student has none" in refusal(run, tmp_path / "model", adapter=True)


@pytest.mark.parametrize("kind", ["frozen", "live", "external", "trust_region", "none"])
def test_a_teacher_that_is_not_in_the_checkpoint_is_named_where_it_is(
    tmp_path: Path, state: dict[str, torch.Tensor], kind: str
) -> None:
    run = save_run(tmp_path / "run", state)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["distill"]["teacher"] = {"kind": kind, "path": "ANOTHER"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    says = {"frozen": "THE_MODEL", "live": "it is the student", "external": "ANOTHER", "trust_region": "THE_MODEL"}
    assert says.get(kind, "the run has none") in refusal(run, tmp_path / "model", teacher=True)


def test_weights_that_do_not_fit_the_model_are_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    less = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    assert "does not hold model.norm.weight" in refusal(save_run(tmp_path / "less", less), tmp_path / "model")
    more = state | {"model.extra": torch.ones(2)}
    assert "holds model.extra" in refusal(save_run(tmp_path / "more", more), tmp_path / "model")
    untied = state | {"lm_head.weight": state["lm_head.weight"] + 1}
    message = refusal(save_run(tmp_path / "untied", untied), tmp_path / "model")
    assert "model.embed_tokens.weight" in message and "lm_head.weight" in message and "differ" in message
    short = ema_of(state)
    short["model.norm.weight"] = short["model.norm.weight"][:-1]
    message = refusal(save_run(tmp_path / "short", state, short), tmp_path / "model", teacher=True)
    assert "model.norm.weight make (127,), expected (128,)" in message


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_shard_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    proof = tmp_path / "proof"
    run = save_run(tmp_path / "run", state)
    saved = run / "checkpoints" / ".partial" / "global_step_30"
    shutil.copytree(run / "checkpoints" / "global_step_20", saved, ignore=shutil.ignore_patterns("complete.json"))
    torch.save({"x": Touch(proof)}, saved / "actor" / "model_world_size_1_rank_0.pt")
    complete(run / "checkpoints", saved.parent, 30, [seal_files(saved, rank_files(saved, 0))])
    message = refusal(run, tmp_path / "model")
    assert "holds more than tensors" in message and "--unpickle" in message and not proof.exists()
    assert pickle.loads(pickle.dumps(Touch(proof))) is None and proof.exists(), "unpickled, it would have"


def test_the_command_prints_what_it_made_and_refuses_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--output", str(tmp_path / "model"), "--step", "20", "--teacher"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "model" / "export.json").read_text()) | {"output": str(tmp_path / "model")}
    assert said["of"] == "teacher" and said["parameters"] == sum(
        p.numel() for p in parameters(tmp_path / "model").values()
    )
    assert main([str(run), "--output", str(tmp_path / "model")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1


def test_an_adapter_that_scales_otherwise_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    meta = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    run = save_run(tmp_path / "run", lora_state(state), lora=meta)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["actor_rollout_ref"]["model"]["lora_adapter_path"] = str(tmp_path / "first")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "it is gone" in refusal(run, tmp_path / "model")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "adapter_config.json").write_text(json.dumps({"use_rslora": True}))
    assert "use_rslora=True" in refusal(run, tmp_path / "model")
    dora = lora_state(state) | {"base_model.model.x.lora_magnitude_vector": torch.ones(1)}
    assert "no part of a plain LoRA" in refusal(save_run(tmp_path / "dora", dora, lora=meta), tmp_path / "model")


def test_a_teacher_of_a_kind_of_shards_that_is_not_known_is_refused(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    run = save_run(tmp_path / "run", state, ema_of(state))
    saved = run / "checkpoints" / ".partial" / "global_step_30"
    shutil.copytree(run / "checkpoints" / "global_step_20", saved, ignore=shutil.ignore_patterns("complete.json"))
    flat = {name: tensor.flatten() for name, tensor in ema_of(state).items()}
    save_file(flat, saved / "teacher" / "teacher_world_size_1_rank_0.safetensors")
    complete(run / "checkpoints", saved.parent, 30, [seal_files(saved, rank_files(saved, 0))])
    assert "actor.strategy=fsdp2" in refusal(run, tmp_path / "model", teacher=True)
