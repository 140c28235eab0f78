"""The study runner: grid, cost, skipping, failures, rows and table. The training itself is an injected function."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from recipe import study as study_module
from recipe.compose import ROOT
from recipe.environment import commit, machine, versions
from recipe.output_folder import unused_folder
from recipe.run_files import RunFiles
from recipe.study import configurations, main, run_study
from recipe.study_chart import study_svg
from recipe.study_file import Study, parse_study, read_study
from recipe.study_rows import cost_lines, expected_seconds, read_rows, row_path, table
from verl_ext.config import ConfigError

DECLARED: dict[str, Any] = {
    "name": "small",
    "seeds": [0, 1],
    "base": ["run.steps=2"],
    "grid": [{"name": "grpo", "overrides": ["method=grpo"]}, {"name": "sdpo", "overrides": ["method=sdpo"]}],
}


def declared(**changes: Any) -> Study:
    found = {**DECLARED, **changes}
    return parse_study({key: value for key, value in found.items() if value is not None}, "study.yaml")


def training(accuracy: Callable[[DictConfig], float], failing: str = "") -> Callable[[DictConfig], Mapping[str, Any]]:
    """Stands for ``recipe.train.run``: writes the metrics of a run and returns its summary."""
    calls: list[str] = []

    def run(config: DictConfig) -> Mapping[str, Any]:
        calls.append(Path(config.run.output_dir).name)
        files = RunFiles(config.run.output_dir, tensorboard=False)
        files.append_metrics(0, {"val/mean@8": 0.25, "val/maj@8": 0.3, "val/pass@8": 0.9, "val/missing_samples": 0})
        if failing and failing in config.run.output_dir:
            raise RuntimeError("Traceback (most recent call last)\n  somewhere\nOutOfMemory: no room")
        value = accuracy(config)
        files.append_metrics(1, {"distill/loss": 0.5, "time/step": 2.0})
        files.append_metrics(2, {"distill/loss": 0.4, "val/mean@8": value, "val/maj@8": value + 0.1})
        for step, right in ((0, [2, 2]), (2, [round(16 * value) - 8, 8])):
            counts = {"samples": 8, "items": ["a", "b"], "right": right, "judged": [8, 8]}
            files.append_validation(step, counts)
        validated = {"metric": "val/mean@8", "before": 0.25, "after": value}
        return validated | {
            "method": config.distill.method, "steps": 2, "seconds_per_step": 2.0,
            "report": "/x/report.html", "stages": {"sft": {"model": "/x"}},
        }  # fmt: skip

    run.calls = calls  # type: ignore[attr-defined]
    return run


def go(study: Study, tmp_path: Path, run: Callable[[DictConfig], Mapping[str, Any]]) -> Any:
    # As `configurations` makes them, but for the keys that nothing here reads: composing takes half a second a run.
    configs = {
        one.run_id: OmegaConf.create(
            {
                "run": {
                    "seed": one.seed,
                    "output_dir": str(unused_folder(tmp_path / "outputs" / study.name / one.run_id)),
                },
                "distill": {"method": one.entry},
            }
        )
        for one in study.runs
    }
    return run_study(study, configs, tmp_path / "results", run, where={"commit": "abc"}, say=lambda _: None)


# --- the grid --------------------------------------------------------------------------------------------------------


def test_all_entries_of_a_seed_come_before_the_next_seed() -> None:
    study = declared()
    assert [(run.entry, run.seed) for run in study.runs] == [("grpo", 0), ("sdpo", 0), ("grpo", 1), ("sdpo", 1)]
    assert study.runs[1].overrides == ("run.steps=2", "method=sdpo")
    assert len({run.run_id for run in study.runs}) == 4


def test_axes_are_a_product_and_multiply_the_grid() -> None:
    axes = {"method": ["grpo", "sdpo"], "run.steps": [1, 2]}
    study = declared(grid=None, axes=axes, seeds=[3])
    assert study.entries == ["method_grpo-steps_1", "method_grpo-steps_2", "method_sdpo-steps_1", "method_sdpo-steps_2"]
    assert study.runs[1].overrides == ("run.steps=2", "method=grpo", "run.steps=2") and study.runs[1].seed == 3
    both = declared(axes={"distill.weighting.cap": [None, 2.5]}, seeds=[0])
    assert both.entries == ["grpo-cap_null", "grpo-cap_2.5", "sdpo-cap_null", "sdpo-cap_2.5"]
    assert both.runs[0].overrides[-1] == "distill.weighting.cap=null"
    assert declared(grid=None, axes={"run.val_before": [True]}).runs[0].overrides[-1] == "run.val_before=true"


def test_other_overrides_are_another_run() -> None:
    before, after = declared(), declared(base=["run.steps=3"])
    assert before.entries == after.entries
    assert not {run.run_id for run in before.runs} & {run.run_id for run in after.runs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": [1]}, "unknown key 'sede'; allowed: name, seeds, base, grid, axes, expected_seconds"),
        ({"grid": [{"name": "a", "override": []}]}, r"unknown key 'override' in grid\[0\]"),
        ({"name": None}, "name is None"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"seeds": []}, r"seeds is \[\]"),
        ({"seeds": [0, 0]}, r"seeds is \[0, 0\]"),
        ({"seeds": [True]}, r"seeds is \[True\]"),
        ({"base": ["run.steps"]}, "base is 'run.steps'; allowed: key=value"),
        ({"base": ["run.seed=1"]}, "base sets run.seed"),
        ({"grid": [{"name": "a"}, {"name": "a"}]}, r"grid is \['a'\]"),
        ({"grid": None}, "grid is None; allowed: grid or axes"),
        ({"axes": {"run.steps": 3}}, "axes is"),
        ({"expected_seconds": 0}, "expected_seconds is 0"),
    ],
)
def test_a_wrong_declaration_is_one_clear_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"study.yaml: {message}") as error:
        declared(**changes)
    assert "\n" not in str(error.value)


def test_a_preset_that_does_not_exist_is_named_before_anything_starts(tmp_path: Path) -> None:
    study = declared(grid=[{"name": "a", "overrides": ["method=nothing"]}])
    with pytest.raises(ConfigError, match="run a-seed0-.*method=nothing does not exist"):
        configurations(study, tmp_path)


def test_every_run_gets_its_seed_and_its_folder(tmp_path: Path) -> None:
    study = declared()
    configs = configurations(study, tmp_path)
    assert [config.run.seed for config in configs.values()] == [0, 0, 1, 1]
    assert [config.distill.method for config in configs.values()] == ["grpo", "sdpo", "grpo", "sdpo"]
    assert len({config.run.output_dir for config in configs.values()}) == 4


def test_the_shipped_study_composes(tmp_path: Path) -> None:
    study = read_study(ROOT / "conf" / "study" / "methods.yaml")
    assert study.entries == ["grpo", "dr_grpo", "sdpo", "sc_sdpo"] and len(study.runs) == 12
    configs = configurations(study, tmp_path)
    assert {config.run.steps for config in configs.values()} == {40}
    # Validated at least before and after training.
    assert all(config.run.val_before and 40 % config.run.val_every == 0 for config in configs.values())
    assert {config.actor_rollout_ref.actor.optim.lr for config in configs.values()} == {3e-4}


# --- running ---------------------------------------------------------------------------------------------------------


def test_one_row_per_finished_run_and_none_is_run_twice(tmp_path: Path) -> None:
    study, run = declared(), training(lambda config: 0.5 + config.run.seed / 10)
    outcome = go(study, tmp_path, run)
    assert len(outcome.done) == 4 and not outcome.failed and len(run.calls) == 4
    row = json.loads(row_path(tmp_path / "results", study, study.runs[2]).read_text())
    assert (row["entry"], row["seed"], row["method"], row["commit"]) == ("grpo", 1, "grpo", "abc")
    assert row["overrides"] == ["run.steps=2", "method=grpo"]
    assert row["curve"] == {"0": {"mean@8": 0.25, "maj@8": 0.3, "pass@8": 0.9}, "2": {"mean@8": 0.6, "maj@8": 0.7}}
    assert row["final"]["val/mean@8"] == 0.6 and row["final"]["distill/loss"] == 0.4
    assert row["items"]["right"] == {"0": "2 2", "2": "2 8"} and row["items"]["samples"] == 8
    kept = tmp_path / "results" / "small" / f"questions-{row['items']['questions']}.txt"
    assert kept.read_text() == "a\nb\n"
    assert row["seconds"] >= 0 and row["date"] and "/x" not in json.dumps(row)
    assert str(tmp_path) not in json.dumps(row)
    again = go(study, tmp_path, run)
    assert len(again.skipped) == 4 and not again.done and len(run.calls) == 4
    row_path(tmp_path / "results", study, study.runs[3]).unlink()
    assert go(study, tmp_path, run).done == [study.runs[3].run_id]


def test_a_row_keeps_its_settings_and_what_its_steps_trained_on(tmp_path: Path) -> None:
    study = declared(seeds=[3])
    configs = {
        run.run_id: OmegaConf.create(
            {"run": {"seed": 3, "output_dir": str(tmp_path / run.run_id)}, "distill": {"method": run.entry}}
        )
        for run in study.runs
    }

    def run(config: DictConfig) -> Mapping[str, Any]:
        files = RunFiles(config.run.output_dir, tensorboard=False)
        for step, rows in ((1, 128), (2, 120)):
            files.append_metrics(step, {"training/global_step": step, "context/rows": rows})
        return {"method": config.distill.method, "steps": 2}

    def settings(config: DictConfig) -> Mapping[str, Any]:
        if config.distill.method == "sdpo":
            raise ConfigError("nothing is known of it")
        return {"start": "models/a"}

    outcome = run_study(study, configs, tmp_path / "results", run, settings=settings, say=lambda _: None)
    row = json.loads(row_path(tmp_path / "results", study, study.runs[0]).read_text())
    assert row["settings"] == {"start": "models/a"} and row["sequences"] == 248
    # Not after a training that would then be lost.
    assert [error for _, _, error in outcome.failed] == ["ConfigError: nothing is known of it"]
    assert not (tmp_path / study.runs[1].run_id).exists()


def test_a_failed_run_leaves_no_row_and_the_others_go_on(tmp_path: Path) -> None:
    study = declared()
    outcome = go(study, tmp_path, training(lambda _: 0.5, failing="grpo-seed1"))
    assert len(outcome.done) == 3
    (run_id, log, error), *rest = outcome.failed
    assert not rest and run_id == study.runs[2].run_id and error == "RuntimeError: OutOfMemory: no room"
    assert log == tmp_path / "outputs" / "small" / run_id / "run.log"
    assert not row_path(tmp_path / "results", study, study.runs[2]).exists()
    # The second attempt does not write into the folder of the first.
    second = training(lambda _: 0.5)
    assert go(study, tmp_path, second).done == [run_id] and second.calls == [f"{run_id}.2"]


def test_an_interrupt_ends_the_study_and_keeps_its_rows(tmp_path: Path) -> None:
    study = declared()

    def run(config: DictConfig) -> Mapping[str, Any]:
        if config.run.seed == 1:
            raise KeyboardInterrupt
        return training(lambda _: 0.5)(config)

    with pytest.raises(KeyboardInterrupt):
        go(study, tmp_path, run)
    assert list(read_rows(tmp_path / "results", study)) == [run.run_id for run in study.runs[:2]]


def test_a_run_with_a_checkpoint_goes_on_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    assert unused_folder(folder) == tmp_path / "run.2"
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    assert unused_folder(folder) == folder


def test_a_file_that_is_no_row_is_named(tmp_path: Path) -> None:
    study = declared()
    path = row_path(tmp_path, study, study.runs[0])
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=f"{study.runs[0].run_id}.json is not the row of a finished run"):
        read_rows(tmp_path, study)


# --- cost and table --------------------------------------------------------------------------------------------------


def test_the_cost_is_declared_then_measured() -> None:
    study = declared(expected_seconds=100)
    text = "\n".join(cost_lines(study, {}))
    assert "4 runs, 0 done, 4 to do" in text and "cost of what is left: about 6 min 40 s" in text
    row = {"entry": "grpo", "seconds": 10.0}
    rows = {study.runs[0].run_id: row}
    assert expected_seconds(study.runs[2], rows) == 10.0 and expected_seconds(study.runs[1], rows) == 100.0
    text = "\n".join(cost_lines(study, rows))
    assert "1 done, 3 to do" in text and "about 3 min 30 s" in text
    assert "every run: run.steps=2" in text and text.count("run.steps=2") == 1


def test_an_unknown_cost_is_said_and_other_entries_stand_in() -> None:
    study = declared()
    assert "4 runs of unknown time (set expected_seconds)" in cost_lines(study, {})[-1]
    rows = {study.runs[0].run_id: {"entry": "grpo", "seconds": 10.0}}
    assert expected_seconds(study.runs[1], rows) == 10.0


def test_the_table_averages_over_seeds(tmp_path: Path) -> None:
    study = declared(seeds=[0, 1, 2])
    values = {0: 0.4, 1: 0.5, 2: 0.6}
    go(study, tmp_path, training(lambda config: values[config.run.seed], failing="sdpo-seed2"))
    lines = table(study, read_rows(tmp_path / "results", study)).splitlines()
    assert lines[0] == "|  | mean@8 | maj@8 | seeds | s/step |"
    assert lines[2] == "| grpo | 0.500 (0.400–0.600, std 0.100) | 0.600 (0.500–0.700, std 0.100) | 3 | 2.00 |"
    assert lines[3] == "| sdpo | 0.450 (0.400–0.500, std 0.071) | 0.550 (0.500–0.600, std 0.071) | 2 of 3 | 2.00 |"
    assert table(study, {}).splitlines()[2] == "| grpo | — | — | 0 of 3 | — |"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(DECLARED))
    return path


def call(study_file: Path, tmp_path: Path, *more: str) -> int:
    results, outputs = str(tmp_path / "results"), str(tmp_path / "outputs")
    return main([str(study_file), "--results", results, "--outputs", outputs, *more])


def test_dry_run_and_table_start_nothing(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("started")

    monkeypatch.setattr(study_module, "_run_all", never)
    assert call(study_file, tmp_path, "--dry-run") == 0
    assert "cost of what is left" in capsys.readouterr().out
    assert call(study_file, tmp_path, "--table") == 0
    assert capsys.readouterr().out.startswith("|  | mean@8")
    assert not (tmp_path / "results").exists() and not (tmp_path / "outputs").exists()


def test_a_failure_is_reported_at_the_end_with_its_log(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = training(lambda _: 0.5, failing="sdpo-seed0")
    monkeypatch.setattr(
        study_module, "_run_all", lambda study, configs, results: run_study(study, configs, results, run)
    )
    assert call(study_file, tmp_path) == 1
    shown = capsys.readouterr()
    summary = json.loads(shown.out.splitlines()[-1])
    assert (summary["runs"], summary["done"], summary["failed"], summary["skipped"]) == (4, 3, 1, 0)
    assert shown.err.startswith("failed: sdpo-seed0-") and "run.log" in shown.err
    assert shown.out.index("cost of what is left") < shown.out.index("run grpo-seed0")
    run = training(lambda _: 0.5)
    assert call(study_file, tmp_path) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"] == 3


def test_a_wrong_file_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.yaml'}: no such file\n"
    (tmp_path / "broken.yaml").write_text("name: [\n")
    assert main([str(tmp_path / "broken.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in text for word in ("--dry-run", "--table", "--results", "seeds", "expected_seconds", "axes"))


def test_where_a_number_was_measured(tmp_path: Path) -> None:
    found = versions()
    assert set(found) == {"torch", "vllm", "verl", "transformers", "ray"} and found["verl"]
    described = machine()
    assert described["cpu"] and described["cores"] >= 1 and described["memory_gib"] > 0
    assert commit(tmp_path) is None


def test_a_study_is_drawn_with_a_dot_per_run_and_nothing_without_rows(tmp_path: Path) -> None:
    study, run = declared(), training(lambda config: 0.5 + config.run.seed / 10)
    go(study, tmp_path, run)
    rows = read_rows(tmp_path / "results", study)
    drawing = ElementTree.fromstring(study_svg(study, rows))
    shape = "{http://www.w3.org/2000/svg}"
    dots = drawing.findall(f"{shape}circle")
    assert len(dots) == len(rows) == 4
    places = {float(dot.get("cx")) for dot in dots}
    assert len(places) == 2, "two seeds, two values"
    texts = [text.text for text in drawing.findall(f"{shape}text")]
    assert {"grpo", "sdpo"} <= set(texts) and any(text.startswith("before training 0.25") for text in texts)
    with pytest.raises(ConfigError, match="no finished run"):
        study_svg(study, {})
