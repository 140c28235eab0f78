"""A study that shows rows of other studies: which they are, who runs them, and how they are compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from recipe.compose import ROOT
from recipe.detectable import VarianceComponents, power_of
from recipe.study import main, run_study
from recipe.study_file import Study, read_study
from recipe.study_rows import cost_lines, read_rows, row_path, write_row
from verl_ext.config import ConfigError

SETTINGS: dict[str, Any] = {
    "start": "models/a",
    "train_files": ["data/train.parquet"],
    "evaluation": {"data.val_files": ["data/test.parquet"], "data.max_response_length": 48},
    "learning_rates": {"training": 3e-4},
    "rows_a_step": 128,
    "steps_by_source": {"student_rollouts": 40},
    "rate_samples": 0,
}
FILES: dict[str, dict[str, Any]] = {
    "left": {
        "name": "left",
        "seeds": [0, 1, 2],
        "expected_seconds": 60,
        "grid": [{"name": "new", "overrides": ["method=sdpo"]}, {"name": "other", "overrides": ["method=opsd"]}],
    },
    "right": {"name": "right", "seeds": [0, 1, 2], "grid": [{"name": "old", "overrides": ["method=grpo"]}]},
    "both": {
        "name": "both",
        "about": "Two studies side by side.",
        "remarks": ["The right one is older."],
        "seeds": [0],
        "base": ["run.steps=40"],
        "grid": [
            {"name": "new", "group": "Main", "rows": {"study": "left"}},
            {"name": "baseline", "group": "Main", "rows": {"study": "right", "name": "old"}},
            {"name": "own", "group": "Beside", "overrides": ["method=dr_grpo"], "expected_seconds": 30},
        ],
        "questions": [
            {
                "ask": "better?",
                "first": "new",
                "second": "baseline",
                "pairing": "unpaired",
                "claimed": 0.05,
                "group": "A",
            },
            {"ask": "learns?", "first": "new", "second": "new", "second_step": 0, "group": "A"},
            {"ask": "own?", "first": "own", "second": "new", "group": "B"},
        ],
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, declared in FILES.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(declared))
    return tmp_path


def read(**changes: Any) -> Study:
    Path("both.yaml").write_text(yaml.safe_dump({**FILES["both"], **changes}))
    return read_study(Path("both.yaml"))


def grid(**entry: Any) -> dict[str, Any]:
    return {"grid": [{"name": "new", **entry}], "questions": []}


def write_rows(**settings: Any) -> None:
    """Rows of both studies; those of the right one were made with other ``settings``."""
    for name, after, own in (("left", 0.7, {}), ("right", 0.5, settings)):
        study = read_study(Path(f"{name}.yaml"))
        for run in study.runs:
            value = after + run.seed / 100
            row = {
                "run_id": run.run_id, "entry": run.entry, "seed": run.seed, "overrides": list(run.overrides),
                "summary": {"steps": 40, "metric": "val/mean@8", "before": 0.4, "after": value},
                "curve": {"0": {"mean@8": 0.4, "maj@8": 0.4}, "40": {"mean@8": value, "maj@8": value}},
                "final": {"context/rows": 128.0, "actor/lr": 3e-4, "val/mean@8": value}, "seconds": 100.0,
                "settings": {**copy.deepcopy(SETTINGS), **own}, "versions": {"verl": "0.9.1"}, "commit": "abc",
            }  # fmt: skip
            write_row(row_path(Path("results"), study, run), row)


def page() -> str:
    assert main(["both.yaml", "--results", "results", "--page", "both.md"]) == 0
    return Path("both.md").read_text(encoding="utf-8")


def test_an_entry_s_runs_are_those_of_the_other_study_under_this_one_s_name(folder: Path) -> None:
    study = read()
    assert study.entries == ["new", "baseline", "own"] and [run.entry for run in study.own_runs] == ["own"]
    theirs = [run for run in read_study(Path("right.yaml")).runs]
    ours = [run for run in study.runs if run.entry == "baseline"]
    assert [run.run_id for run in ours] == [run.run_id for run in theirs]
    results = Path("results")
    assert [row_path(results, study, run) for run in ours] == [
        row_path(results, read_study(Path("right.yaml")), run) for run in theirs
    ]
    assert study.groups == {"new": "Main", "baseline": "Main", "own": "Beside"}


def test_rows_are_read_where_they_lie_and_called_as_here(folder: Path) -> None:
    write_rows()
    rows = read_rows(Path("results"), read())
    assert sorted(row["entry"] for row in rows.values()) == ["baseline"] * 3 + ["new"] * 3
    # The file keeps its own name for it.
    run = next(run for run in read().runs if run.entry == "baseline")
    assert json.loads(row_path(Path("results"), read(), run).read_text())["entry"] == "old"


def test_only_the_study_s_own_runs_are_run_and_cost(folder: Path) -> None:
    write_rows()
    study, started = read(), []
    lines = cost_lines(study, read_rows(Path("results"), study))
    assert lines[0] == "study both: 1 runs, 0 done, 1 to do" and "cost of what is left: about 30 s" in lines
    assert lines[-1] == "rows of study right: 3 of 3; its own file runs what is missing"

    def run_one(config: Any) -> dict[str, Any]:
        started.append(config.run.output_dir)
        raise RuntimeError("enough")

    configs = {one.run_id: OmegaConf.create({"run": {"output_dir": one.run_id}}) for one in study.own_runs}
    row = next(run for run in study.runs if run.entry == "new")
    row_path(Path("results"), study, row).unlink()
    outcome = run_study(study, configs, Path("results"), run_one, say=lambda _: None)
    assert started == [study.own_runs[0].run_id] and not outcome.skipped and len(outcome.failed) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (grid(rows={"study": "none"}), "none.yaml: no such file"),
        (grid(rows={"study": "left", "name": "x"}), "both.yaml: rows of entry new is 'x'; allowed: one of new, other"),
        (grid(rows={"name": "x"}), r"grid\[0\].rows is {'name': 'x'}; allowed: {study: NAME"),
        (grid(rows={"study": "left"}, overrides=["a=1"]), "without overrides, which that study declares"),
        ({**grid(rows={"study": "left"}), "axes": {"a": [1]}}, "axes is .* allowed: no axes beside rows"),
        (grid(group=3), r"grid\[0\].group is 3"),
        ({"remarks": "x"}, "remarks is 'x'; allowed: a list of sentences"),
        ({"about": 3}, "about is 3"),
    ],
)
def test_wrong_rows_are_one_clear_message(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read(**changes)
    assert "\n" not in str(error.value)


def test_the_same_rows_under_two_names_are_refused(folder: Path) -> None:
    twice = [{"name": name, "rows": {"study": "right", "name": "old"}} for name in ("a", "b")]
    with pytest.raises(ConfigError, match="entry b is 'old-seed0-.*allowed: rows that a does not have"):
        read(grid=twice, questions=[])


def test_rows_are_taken_from_the_study_that_made_them(folder: Path) -> None:
    read()
    Path("more.yaml").write_text(yaml.safe_dump({"name": "more", **grid(rows={"study": "both"})}))
    with pytest.raises(ConfigError, match="entry new shows rows of study left; name the study that made them"):
        read_study(Path("more.yaml"))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"second": "new"}, "allowed: another entry than first, or another second_step"),
        ({"second": "new", "step": 0, "second_step": 0}, "or another second_step"),
        ({"second": "new", "second_step": 0, "pairing": "unpaired"}, "pairing is 'unpaired'; allowed: paired, for one"),
        ({"second_step": -1}, r"second_step is -1; allowed: a whole number"),
        ({"claimed": 3}, r"claimed is 3; allowed: a share above 0"),
        ({"group": 1}, r"group is 1"),
    ],
)
def test_a_wrong_question_is_one_clear_message(folder: Path, question: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(questions=[{"ask": "?", "first": "new", "second": "baseline", **question}])


def test_the_page_puts_the_studies_side_by_side(folder: Path) -> None:
    write_rows()
    text = page()
    assert "Two studies side by side." in text and "* The right one is older." in text
    assert "from the rows in `results/both/`, `results/left/`, `results/right/`" in text
    assert (
        text.index("### Main")
        < text.index("| baseline | 3 |")
        < text.index("### Beside")
        < text.index("| own | 0 of 1 |")
    )
    assert "| own | 0 | 1 × 30 s | `both` |" in text
    # Both entries' runs lie .01 apart.
    power = power_of(0.05, VarianceComponents(2e-4, 0.0, 0.0), 3, 2, pairing="unpaired")
    assert "| 1. better? | **yes** | +0.200 |" in text and f"+0.050, {power:.0%} |" in text
    # Against itself before training, paired by its runs.
    assert "| 2. learns? | **yes** | +0.310 |" in text and "mean@8 against step 0, paired seeds 0, 1, 2" in text
    assert "3 questions: 2 yes, 1 not run. Blind below a true difference of" in text
    line = next(one for one in text.splitlines() if one.startswith("| baseline | 0, 1, 2 |"))
    assert "| 40 | 5,120 | rows of the last step × steps | 0.0003 | `models/a` | `data/train.parquet` | A |" in line
    assert "not run" in Path("both.svg").read_text() and "mean@8 held out" in Path("both.svg").read_text()
    assert "Note a." in text and text.count("taken from the declaration") == 1


def test_unequal_budgets_are_marked_and_another_evaluation_is_refused(folder: Path) -> None:
    write_rows(steps_by_source={"reference": 40})
    text = page()
    assert "| 1. better? | **yes**, unequal |" in text
    assert "Compared at different budgets (5,120 against 5,120 replayed samples)." in text
    assert "1 of the answers compare runs at unequal conditions" in text
    write_rows(evaluation={**SETTINGS["evaluation"], "data.max_response_length": 96})
    text = page()
    assert (
        "| 1. better? | **refused** |" in text
        and "was evaluated with data.max_response_length=48, run old-seed0" in text
    )


def test_conditions_that_are_not_known_are_said(folder: Path) -> None:
    write_rows(rate_samples=8)  # its last step does not name the questions
    text = page()
    assert "| 1. better? | **yes** |" in text and "could not be checked: run old-seed0" in text
    assert "took pass rates, and its last step does not say of how many questions" in text


def test_the_shipped_rows_are_still_those_of_their_declarations() -> None:
    """A row's name is the digest of its overrides: were the digest changed, every row would count as not run."""
    for study in ("methods", "pbsd", "sd_zero", "paced", "sc_sdpo"):
        declared = read_study(ROOT / "conf" / "study" / f"{study}.yaml")
        assert read_rows(ROOT / "docs" / "results", declared)
        for run_id, row in read_rows(ROOT / "docs" / "results", declared).items():
            run = next(one for one in declared.runs if one.run_id == run_id)
            assert row["overrides"] == list(run.overrides) and row["seed"] == run.seed


def test_all_ten_methods_stand_in_one_study_with_three_seeds_and_more() -> None:
    study = read_study(ROOT / "conf" / "study" / "all_methods.yaml")
    methods = [entry for entry, group in study.groups.items() if group == "The ten methods"]
    wanted = {"sdpo", "sc_sdpo", "grpo", "dr_grpo", "paced", "sd_zero", "pbsd", "opsd", "sdft", "rft"}
    assert set(methods) == wanted and len(methods) == 10
    rows = read_rows(ROOT / "docs" / "results", study)
    for entry in methods:
        assert sum(run.entry == entry and run.run_id in rows for run in study.runs) >= 3
    papers = ("2601.20802", "2605.27765", "2603.11178", "2604.12002", "2605.05040", "2601.18734", "2601.19897")
    assert all(any(paper in question.group for question in study.questions) for paper in papers)
    assert all(question.source for question in study.questions)
