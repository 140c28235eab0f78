"""Every script's help names what it reads, and the run scripts ask for settings that compose."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.compose import ROOT, compose_config

pytestmark = pytest.mark.contract

SCRIPTS = sorted(path for path in (ROOT / "scripts").rglob("*") if path.is_file())
RUNS = {
    "qwen3_8b_sdpo": ("sdpo", "Qwen/Qwen3-8B", 0),
    "qwen3_8b_sc_sdpo": ("sc_sdpo", "Qwen/Qwen3-8B", 0),
    "olmo3_7b_sdpo": ("sdpo", "allenai/Olmo-3-7B-Instruct", 0),
    "qwen3_1_7b_opsd": ("opsd", "Qwen/Qwen3-1.7B", 64),
    "qwen3_8b_pbsd": ("pbsd", "Qwen/Qwen3-8B", 64),
    "qwen3_4b_instruct_sd_zero": ("sd_zero", "Qwen/Qwen3-4B-Instruct-2507", 0),
    "qwen3_8b_to_qwen3_1_7b_paced_two_stage": ("paced_two_stage", "Qwen/Qwen3-1.7B", 0),
    "qwen3_8b_grpo": ("grpo", "Qwen/Qwen3-8B", 0),
}
"""Script, its method, its model, rank of its adapter."""

LAUNCHERS = ["scripts/slurm/train.sbatch", "scripts/slurm/node.sh", "scripts/ray_submit.sh"]
READ = re.compile(r"\$\{([A-Z][A-Z0-9_]*):[-?]")


def executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Nothing of the caller's own settings, and the folder's executables first."""
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), **more}


def recorded(script: str, folder: Path, program: str, *arguments: str, **variables: str) -> list[str]:
    """The arguments that a script gives to ``program``."""
    executable(folder / program, f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"{folder}/arguments"\n')
    result = subprocess.run(
        [ROOT / script, *arguments],
        env=environment(folder, **variables), cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return (folder / "arguments").read_text(encoding="utf-8").split("\0")[:-1]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_works_anywhere_and_names_every_variable_that_is_read(script: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [ROOT / script, "--help"], env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    text = (ROOT / script).read_text(encoding="utf-8")
    read = {name for name in READ.findall(text) if not name.startswith("SLURM_")}
    # Set by other programs; a default of ours where they are not.
    read -= {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "RAY_USAGE_STATS_ENABLED", "PYTHONPATH"}
    read -= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"}
    assert len(read) > 5
    assert {name for name in read if not re.search(rf"\b{name}\b", result.stdout)} == set()


def test_every_run_script_is_in_the_table() -> None:
    assert {path.stem.removeprefix("run_") for path in SCRIPTS if path.stem.startswith("run_")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_script_composes_into_the_published_settings(name: str, tmp_path: Path) -> None:
    arguments = recorded(f"scripts/run_{name}.sh", tmp_path, "python")
    assert arguments[:2] == ["-m", "recipe.train"]
    config = compose_config(arguments[2:])
    assert OmegaConf.to_container(config, resolve=True)
    method, model, rank = RUNS[name]
    assert config.distill.method == method
    assert config.actor_rollout_ref.model.path == model
    assert config.actor_rollout_ref.model.lora_rank == rank
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node, config.trainer.device) == (1, 8, "cuda")
    assert config.run.output_dir == f"outputs/{name}"


def test_variables_and_arguments_win_over_a_run_scripts_own(tmp_path: Path) -> None:
    arguments = recorded(
        "scripts/run_qwen3_8b_sdpo.sh", tmp_path, "python", "run.seed=5", "trainer.project_name='a b'",
        NODES="2", GPUS="4", DATA="sciknoweval_physics", OUTPUT="elsewhere", EXTRA="run.seed=4 run.steps=7",
    )  # fmt: skip
    config = compose_config(arguments[2:])
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (2, 4)
    assert config.data.train_files.endswith("sciknoweval/physics/train.parquet")
    assert (config.run.output_dir, config.run.steps, config.run.seed) == ("elsewhere", 7, 5)
    assert config.trainer.project_name == "a b"


@pytest.mark.parametrize("name", RUNS)
def test_the_head_of_a_run_script_says_how_its_data_is_made(name: str, tmp_path: Path) -> None:
    text = (ROOT / f"scripts/run_{name}.sh").read_text(encoding="utf-8")
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    config = compose_config(recorded(f"scripts/run_{name}.sh", tmp_path, "python")[2:])
    folder = Path(str(config.data.train_files)).parts
    assert f"data/{folder[folder.index('data') + 1]}" in comment
    for module in re.findall(r"python -m ((?:data_prep|recipe)\.[a-z0-9_]+)", comment):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_ray_submit_hands_over_a_command_whose_overrides_compose(tmp_path: Path) -> None:
    arguments = recorded(
        "scripts/ray_submit.sh", tmp_path, "ray", "method=sdpo", "model=qwen3_8b", "trainer.project_name='a b'",
        ADDRESS="http://head:8265", NODES="2", VENV=".venv", OUTPUT="out", SUBMIT_ARGS="--no-wait",
    )  # fmt: skip
    entry = arguments.index("--")
    assert arguments[:entry] == ["job", "submit", "--address", "http://head:8265", "--no-wait"]
    command = arguments[entry + 1 :]
    executable(tmp_path / "python", f'#!/usr/bin/env bash\nprintf "%s\\0" "$PWD" "$PATH" "$@" >"{tmp_path}/driver"\n')
    # .venv/bin would be found first: another folder that has none.
    command[command.index(f"{ROOT}/.venv")] = str(tmp_path / "none")
    subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, check=True, timeout=60)
    where, path, *driver = (tmp_path / "driver").read_text(encoding="utf-8").split("\0")[:-1]
    assert (where, path.split(":")[0], driver[:2]) == (str(ROOT), f"{tmp_path}/none/bin", ["-m", "recipe.train"])
    config = compose_config(driver[2:])
    assert (config.trainer.nnodes, config.run.output_dir) == (2, f"{ROOT}/out")
    assert config.trainer.project_name == "a b"
