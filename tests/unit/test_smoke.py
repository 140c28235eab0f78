"""The smoke test's questions, what it asks of a run's files, its command line and the archive for bug reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from recipe import smoke, smoke_bundle, smoke_data, smoke_run
from recipe.checkpoints import newest_complete
from recipe.compose import ROOT
from recipe.run_files import RunFiles
from recipe.smoke_checks import data_written, doctor_found, trained
from recipe.smoke_run import SmokeFailure
from verl_ext.config import ConfigError
from verl_ext.verifiers.math_answer import compute_score

# --------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert smoke_data.main(["--out", str(folder)]) == 0
    return folder


def test_the_questions_are_right_different_and_judged_by_the_verifier_of_gsm8k(data: Path) -> None:
    prompts: list[str] = []
    for split, count in smoke_data.SIZES.items():
        rows = pq.read_table(data / "arithmetic" / f"{split}.parquet").to_pylist()
        assert len(rows) == count
        for row in rows:
            problem, truth = row["extra_info"]["problem"], row["reward_model"]["ground_truth"]
            assert re.fullmatch(r"[\d +*-]+", problem)
            assert int(truth) == sum_of_products(problem)
            prompts.append(row["prompt"][0]["content"])
            assert problem in prompts[-1] and "\\boxed{" in prompts[-1]
    assert len(set(prompts)) == sum(smoke_data.SIZES.values())
    assert compute_score("x", f"so \\boxed{{{truth}}}", truth, extract="boxed")["score"] == 1
    assert compute_score("x", f"so \\boxed{{{int(truth) + 1}}}", truth, extract="boxed")["score"] == 0
    assert data_written(data)(Path("log")).startswith("tiny_world/train.parquet")


def sum_of_products(problem: str) -> int:
    """By another way than the module: products first, minus signs into the numbers."""
    total = 0
    for term in problem.replace(" - ", " + -").split(" + "):
        product = 1
        for factor in term.split(" * "):
            product *= int(factor)
        total += product
    return total


def test_a_data_set_that_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SmokeFailure, match=r"lacks tiny_world/train\.parquet"):
        data_written(tmp_path)(Path("log"))


# ---------------------------------------------------------------------------------------------------- what a run leaves

WANTED = {"trainer.device": "cuda", "distill.method": "sc_sdpo"}


@pytest.fixture
def finished(tmp_path: Path, make_checkpoint: Callable[..., Any]) -> tuple[Path, Path]:
    """A run of three steps with a checkpoint of step 2, and its log."""
    folder, log = tmp_path / "run", tmp_path / "train.log"
    with RunFiles(folder, tensorboard=False) as files:
        files.write_config({"trainer": {"device": "cuda"}, "distill": {"method": "sc_sdpo"}})
        files.append_metrics(0, {"val/mean@1": 0.5})
        for step in (1, 2, 3):
            files.append_metrics(
                step, {"loss": 0.1 * step, "self_check/divergence_largest": 1e-7, "pass_rate/mean": 0.3}
            )
        files.write_summary({"steps": 3, "seconds_per_step": 2.5})
    make_checkpoint(folder / "checkpoints", 2)
    assert newest_complete(folder / "checkpoints") is not None
    log.write_text("  0.1 s  resuming after step 2 of 3 from somewhere\n", encoding="utf-8")
    return folder, log


def test_a_run_that_did_what_it_should(finished: tuple[Path, Path]) -> None:
    folder, log = finished
    line = trained(folder, 3, WANTED, saved=2, resumed=2)(log)
    assert line.startswith("went on after step 2, loss 0.1000 0.2000 0.3000, checkpoint of step 2 (0.0 MiB)")
    assert line.endswith("teacher without a context differs by 1.0e-07, 2.5 s a step")


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = folder / "metrics.jsonl"
    rows = change([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-1], r"has the steps \[1, 2\], wanted are 1 to 3"),
        (lambda rows: [*rows, rows[-1]], r"has the steps \[1, 2, 3, 3\]"),
        (lambda rows: [*rows[:2], {"step": 2, "pass_rate/mean": 0.0}, rows[3]], r"step 2 has no loss \(.* rate 0\)"),
        (lambda rows: [*rows[:3], {"step": 3, "loss": float("inf")}], "the loss of step 3 is inf"),
    ],
)  # fmt: skip
def test_a_run_with_wrong_rows(finished: tuple[Path, Path], change: Any, said: str) -> None:
    folder, log = finished
    rewrite(folder, change)
    with pytest.raises(SmokeFailure, match=said):
        trained(folder, 3, WANTED)(log)


def test_a_run_on_another_path_than_the_one_to_be_tested(finished: tuple[Path, Path]) -> None:
    folder, log = finished
    with pytest.raises(SmokeFailure, match=r"the run had trainer\.device='cuda', the test is for 'cpu'"):
        trained(folder, 3, {"trainer.device": "cpu"})(log)
    with pytest.raises(SmokeFailure, match=r"the run had trainer\.nothing=None"):
        trained(folder, 3, {"trainer.nothing": 1})(log)


def test_a_run_that_began_anew_in_place_of_resuming(finished: tuple[Path, Path]) -> None:
    folder, log = finished
    log.write_text("starting Ray\n", encoding="utf-8")
    with pytest.raises(SmokeFailure, match="did not say that it resumes after step 2"):
        trained(folder, 3, WANTED, resumed=2)(log)


def test_a_checkpoint_that_is_missing_or_damaged(finished: tuple[Path, Path]) -> None:
    folder, log = finished
    with pytest.raises(SmokeFailure, match=r"the newest complete checkpoint is that of step 2, wanted is step 3"):
        trained(folder, 3, WANTED, saved=3)(log)
    victim = next(path for path in (folder / "checkpoints" / "global_step_2").rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(SmokeFailure, match=rf"no checkpoint in .* is complete .*{victim.name}"):
        trained(folder, 3, WANTED, saved=2)(log)


def test_a_run_without_files(tmp_path: Path) -> None:
    with pytest.raises(SmokeFailure, match="the run left no results"):
        trained(tmp_path, 3, WANTED)(tmp_path / "log")


# ----------------------------------------------------------------------------------------------------------- the doctor


def test_the_doctors_findings_are_taken_out_of_what_ray_prints_around_them(tmp_path: Path) -> None:
    log, target = tmp_path / "doctor.log", tmp_path / "doctor.json"
    findings = [{"name": "disk", "status": "warn", "line": "little", "todo": ""},
                {"name": "memory", "status": "ok", "line": "fine", "todo": ""}]  # fmt: skip
    log.write_text(
        "{not json\nstarting\n" + json.dumps({"findings": findings}) + "\n{1}\n(raylet) bye\n", encoding="utf-8"
    )
    assert doctor_found(target)(log) == "2 checks; warns of disk"
    assert json.loads(target.read_text(encoding="utf-8"))["findings"] == findings
    findings[1]["status"] = "fail"
    log.write_text(json.dumps({"findings": findings}) + "\n", encoding="utf-8")
    with pytest.raises(SmokeFailure, match="^memory: fine$"):
        doctor_found(target)(log)
    log.write_text("Killed\n", encoding="utf-8")
    with pytest.raises(SmokeFailure, match=r"doctor\.log has no line"):
        doctor_found(target)(log)


# --------------------------------------------------------------------------------------------------------- command line


def test_the_steps_ask_for_what_they_say(tmp_path: Path) -> None:
    steps = {
        step.name: step for step in smoke.plan(tmp_path, cpu=False, gpus=4, model="/models/q", extra=["run.seed=3"])
    }
    assert list(steps) == list(smoke.LIMITS) == ["data", "doctor", "tiny", "train", "resume"]
    for name in ("tiny", "train", "resume"):
        command = steps[name].command
        assert command[:3] == (sys.executable, "-m", "recipe.train")
        assert {"method=sc_sdpo", "hardware=gpu", "trainer.n_gpus_per_node=4", "run.seed=3"} <= set(command)
    assert "actor_rollout_ref.model.path=/models/q" in steps["train"].command
    assert "model=tiny" in steps["tiny"].command and "model=tiny" not in steps["train"].command
    # Only the number of steps differs: the same run goes on.
    train, resume = set(steps["train"].command), set(steps["resume"].command)
    assert train ^ resume == {"run.steps=2", "run.steps=3"} and f"run.output_dir={tmp_path}/runs/train" in train
    assert (steps["resume"].continues, steps["resume"].folder) == ("train", None)
    with pytest.raises(SmokeFailure, match="left no results"):
        steps["tiny"].check(tmp_path / "log")
    cpu = {step.name: step for step in smoke.plan(tmp_path, cpu=True, gpus=1, model="x")}
    assert all("hardware=cpu" in cpu[name].command and "model=tiny" in cpu[name].command for name in ("tiny", "train"))


def test_a_key_that_is_asked_for_otherwise_is_not_held_against_a_run(finished: tuple[Path, Path]) -> None:
    folder, log = finished
    (folder.parent / "runs").mkdir()
    folder.rename(folder.parent / "runs" / "tiny")

    def tiny(*extra: str) -> smoke_run.Step:
        return smoke.plan(folder.parent, cpu=False, gpus=1, model="x", extra=extra)[2]

    others = [f"{key}=x" for key in smoke.GPU_PATH if key not in WANTED]
    assert "loss" in tiny(*others).check(log)
    with pytest.raises(SmokeFailure, match=r"actor\.strategy=None, the test is for 'fsdp2'"):
        tiny(*(one for one in others if "strategy" not in one)).check(log)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def there(count: int, visible: str | None = None) -> None:
        monkeypatch.setattr(smoke, "gpu_memory", lambda: [80 << 30] * count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return there


@pytest.mark.parametrize(
    ("count", "visible", "asked", "wanted"),
    [
        (1, None, None, 1),
        (8, None, None, 8),
        (6, None, None, 4),
        (16, None, None, 8),
        (8, "0,1", None, 2),
        (8, None, 2, 2),
    ],
)
def test_as_many_gpus_as_a_batch_can_be_shared_among(
    gpus: Callable[..., None], count: int, visible: str | None, asked: int | None, wanted: int
) -> None:
    gpus(count, visible)
    assert smoke.chosen_gpus(asked, cpu=False) == wanted


@pytest.mark.parametrize(
    ("count", "asked", "cpu", "said"),
    [
        (0, None, False, "no NVIDIA GPU was found"),
        (4, 8, False, "allowed: 4, 2, 1"),
        (4, 3, False, "allowed: 4, 2, 1"),
        (0, 2, True, "--cpu has one rank"),
    ],
)
def test_gpus_that_cannot_be_had(
    gpus: Callable[..., None], count: int, asked: int | None, cpu: bool, said: str
) -> None:
    gpus(count)
    with pytest.raises(ConfigError, match=re.escape(said)):
        smoke.chosen_gpus(asked, cpu=cpu)


def test_limits_are_put_in_or_refused() -> None:
    steps = smoke.plan(Path("x"), cpu=True, gpus=1, model="x")
    assert {step.name: step.limit for step in smoke.with_limits(steps, ["train=7"])} == smoke.LIMITS | {"train": 7.0}
    for text in ("train", "train=", "train=-1", "train=0", "nothing=5", "train=a"):
        with pytest.raises(ConfigError, match="--limit"):
            smoke.with_limits(steps, [text])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cpu", "run.no_such_key=1"], "run.no_such_key"),
        (["--cpu", "--limit", "x=1"], "--limit"),
        ([], "no NVIDIA GPU was found"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_nothing_else(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], gpus: Callable[..., None]
) -> None:
    gpus(0)
    assert smoke.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and not (tmp_path / "out").exists()


def test_the_children_get_a_ray_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("PYTHONPATH", "/before")
    found = smoke.child_environment()
    assert "RAY_ADDRESS" not in found and found["PYTHONPATH"] == f"{ROOT}:/before"
    assert found["PATH"].startswith(f"{Path(sys.executable).parent}:")


def test_the_script_says_what_is_missing_and_hands_its_arguments_over(tmp_path: Path) -> None:
    script = ROOT / "scripts/gpu_smoke.sh"
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit "${CODE:-0}"\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VENV": str(tmp_path / "none")}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, "--cpu", "a=b c"], env=environment | more, capture_output=True, text=True, timeout=60, cwd=tmp_path
        )

    assert run().stdout.splitlines() == ["-m", "recipe.smoke", "--cpu", "a=b c"]
    missing = run(CODE="1")
    assert missing.returncode == 2 and "run scripts/setup.sh first" in missing.stderr


# ------------------------------------------------------------------------------------------------------------ the whole


def small_plan(folder: Path, *, fails: bool) -> list[smoke_run.Step]:
    program = f"print('hf_{'a' * 30}')\nraise SystemExit({int(fails)})"
    return [
        smoke_run.Step("data", "a step", (sys.executable, "-S", "-c", program), 60.0, lambda log: "did it"),
        smoke_run.Step("train", "another", (sys.executable, "-S", "-c", ""), 60.0, lambda log: "too", needs=("data",)),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_it_ends_with_a_table_and_an_archive(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smoke_run, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(smoke, "plan", lambda folder, **_: small_plan(folder, fails=fails))
    monkeypatch.setattr(smoke, "compose_config", lambda _: SimpleNamespace())
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-this-test")
    (tmp_path / "runs/train").mkdir(parents=True)
    (tmp_path / "runs/train/run.log").write_text("key secret-of-this-test\n", encoding="utf-8")
    (tmp_path / "runs/train/completions.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "runs/train/checkpoints").mkdir()
    (tmp_path / "runs/train/checkpoints/weights.safetensors").write_bytes(b"x")
    assert smoke.main(["--cpu", "--out", str(tmp_path)]) == int(fails)
    out = capsys.readouterr().out
    assert f"data   {'failed' if fails else 'passed'}" in out and "smoke-report.tar.gz (" in out
    assert ("not everything passed" in out) == fails
    with tarfile.open(tmp_path / smoke_bundle.NAME) as archive:
        names = {name.removeprefix("smoke-report/") for name in archive.getnames()}
        texts = {name: archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]
    wanted = {"table.txt", "results.json", "versions.json", "machine.txt", "logs/data.log", "runs/train/run.log"}
    assert names == wanted | (set() if fails else {"logs/train.log"})
    assert not any("secret-of-this-test" in text or "hf_aaa" in text for text in texts.values())
    assert texts["smoke-report/runs/train/run.log"] == "key (hidden)\n"
    assert json.loads(texts["smoke-report/versions.json"])["packages"]["verl"] == "0.9.1"
    assert texts["smoke-report/table.txt"] in out


def test_of_a_long_log_the_beginning_and_the_end_are_kept() -> None:
    text = "a" * 500_000 + "b" * 900_000
    found = smoke_bundle.shortened(text)
    assert found.startswith("a" * 200_000) and found.endswith("b" * 800_000) and "400000 characters left out" in found
    assert smoke_bundle.shortened("short") == "short"


def test_what_the_archive_takes_exists_in_a_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    finished[0].rename(tmp_path / "runs" / "train")
    names = [str(path.relative_to(tmp_path)) for path in smoke_bundle.chosen(tmp_path)]
    assert names == ["runs/train/config.yaml", "runs/train/metrics.jsonl", "runs/train/summary.json"]
    assert yaml.safe_load((tmp_path / names[0]).read_text(encoding="utf-8"))["trainer"] == {"device": "cuda"}
