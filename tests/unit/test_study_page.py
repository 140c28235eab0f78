"""The page of a study: what it shows, what it says of runs that are missing or cannot be compared, and its pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from recipe.intervals import over_seeds, over_seeds_and_items
from recipe.study import main
from recipe.study_curves import curves, curves_svg
from recipe.study_file import Study, parse_study
from recipe.study_items import pack_items, unpack_items
from recipe.study_rows import line, row_path, write_row

SHAPE = "{http://www.w3.org/2000/svg}"
DECLARED: dict[str, Any] = {
    "name": "pair",
    "seeds": [0, 1, 2],
    "base": ["run.steps=40"],
    "expected_seconds": 120,
    "grid": [
        {"name": "new", "overrides": ["method=sdpo", "chain.stages=[]"]},
        {"name": "old", "overrides": ["method=grpo"]},
        {"name": "never", "overrides": ["method=dr_grpo"]},
    ],
    "questions": [
        {"ask": "new | better", "first": "new", "second": "old", "source": "a paper: +3"},
        {"ask": "much better", "first": "new", "second": "old", "delta": 0.9, "step": 20},
        {"ask": "never?", "first": "never", "second": "old"},
    ],
}


SETTINGS: dict[str, Any] = {
    "start": "models/a", "train_files": ["data/train.parquet"], "evaluation": {"data.val_files": ["data/test.parquet"]},
    "learning_rates": {"training": 3e-4}, "rows_a_step": 128, "steps_by_source": {"student_rollouts": 40},
    "rate_samples": 0,
}  # fmt: skip


def finished(run_id: str, entry: str, seed: int, gain: float, steps: tuple[int, ...] = (0, 20, 40)) -> dict[str, Any]:
    rng = np.random.default_rng([seed, len(entry)])
    rate_P = np.random.default_rng(0).uniform(0.2, 0.5, 40)
    right = {step: rng.binomial(8, rate_P + gain * step / 40).tolist() for step in steps}
    items = [f"q{index}" for index in range(40)]
    validations = [
        {"step": step, "samples": 8, "items": items, "right": found, "judged": [8] * 40}
        for step, found in right.items()
    ]
    curve = {str(step): {"mean@8": sum(found) / 320, "maj@8": 0.5} for step, found in right.items()}
    values = [one["mean@8"] for one in curve.values()]
    return {
        "run_id": run_id, "entry": entry, "seed": seed, "method": entry, "overrides": ["method=x", "a.b=[1,2]"],
        "summary": {
            "metric": "val/mean@8", "before": values[0], "after": values[-1], "steps": max(steps),
            "seconds_per_step": 2.5,
        },
        "settings": SETTINGS,
        "curve": curve, "final": {"val/mean@8": values[-1]}, "items": pack_items(validations), "seconds": 200.0 + seed,
        "date": f"2026-01-0{seed + 1}T00:00:00+00:00", "versions": {"verl": "0.9.1", "torch": "2"},
        "machine": {"cpu": "CPU", "cores": 2 + (seed == 2), "memory_gib": 8.0, "gpus": []},
        "commit": "0123456789abcdef" + ("+changes" if seed == 1 else ""),
    }  # fmt: skip


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Three seeds of two entries have run, none of the third; the current folder is the repository's root."""
    monkeypatch.chdir(tmp_path)
    Path("pair.yaml").write_text(yaml.safe_dump(DECLARED))
    made = parse_study(DECLARED, "pair.yaml")
    for run in made.runs:
        if run.entry != "never":
            row = finished(run.run_id, run.entry, run.seed, 0.4 if run.entry == "new" else 0.1)
            write_row(row_path(Path("docs/results"), made, run), row)
    return made


def write(page: str = "docs/results/pair.md") -> str:
    assert main(["pair.yaml", "--results", "docs/results", "--page", page]) == 0
    return Path(page).read_text(encoding="utf-8")


def cells(page: str, first: str) -> list[str]:
    """The cells of the table row that begins with a text."""
    found = next(one for one in page.splitlines() if one.startswith(f"| {first}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)[1:-1]]


def test_the_page_says_what_was_found_and_how(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    page = write()
    printed = json.loads(capsys.readouterr().out)
    written = [f"docs/results/{name}" for name in ("pair.md", "pair.svg", "pair_curves.svg")]
    assert printed == {"study": "pair", "rows": 6, "written": written}
    assert "`python -m recipe.study pair.yaml --page docs/results/pair.md`" in page
    assert "(../evaluation.md)" in page and "![learning curves](pair_curves.svg)" in page
    assert "6 of 9 runs are finished (3 entries, 3 seeds)" in page
    entry = cells(page, "new")
    means = [finished("", "new", seed, 0.4)["summary"]["after"] for seed in range(3)]
    assert entry[1] == "3" and entry[3] == f"{np.mean(means):.3f}" and entry[-1] == "2.50"
    runs = [unpack_items(finished("", "new", seed, 0.4), 40).mean_P for seed in range(3)]
    for text, interval in zip(entry[4:6], (over_seeds_and_items(runs), over_seeds(runs)), strict=True):
        assert text == f"[{interval.low:.3f}, {interval.high:.3f}]"
    assert entry[6] == "0.500 [0.500, 0.500]" and entry[7] == "5,120"
    assert cells(page, "never") == ["never", "0 of 3", *["not run"] * 4, "", "", ""]


def test_questions_are_answered_with_interval_p_values_and_the_blind_size(study: Study) -> None:
    page = write()
    first = cells(page, "1. ")
    assert first[0] == r"1. new \| better" and first[1] == "**yes**" and first[4] == "seeds and questions"
    assert float(first[2]) > 0 and first[3].startswith("[+") and first[5] == "0.250" and 0 < float(first[7]) < 1
    assert cells(page, "2. ")[1] == "**no**" and "by more than 0.9, mean@8 at step 20" in page
    assert cells(page, "3. ")[1:] == ["**not run**", *[""] * 6] and "Note: no finished run of never." in page
    assert "1. `new` above `old`, mean@8, paired seeds 0, 1, 2. Claim: a paper: +3." in page


def test_unpaired_seeds_of_both_entries_are_listed(study: Study) -> None:
    asked = {**DECLARED["questions"][0], "pairing": "unpaired"}
    Path("pair.yaml").write_text(yaml.safe_dump({**DECLARED, "questions": [asked]}))
    page = write()
    assert "unpaired seeds 0, 1, 2. Claim" in page and "Interim" not in page
    gone = next(run for run in study.runs if run.entry == "old" and run.seed == 1)
    row_path(Path("docs/results"), study, gone).unlink()
    page = write()
    assert "unpaired seeds 0, 1, 2 against 0, 2. Claim" in page
    assert "Interim: 2 of 3 runs of `old` are finished." in page


def test_what_was_not_run_has_its_cost(study: Study) -> None:
    page = write()
    assert "| never | 0, 1, 2 | 3 × 2 min 00 s |" in page and "Together about 6 min 00 s" in page
    row_path(Path("docs/results"), study, study.runs[0]).unlink()
    # Measured on the entry's other runs.
    assert "| new | 0 | 1 × 3 min 22 s |" in write()


def test_every_run_has_its_command_commit_machine_and_versions(study: Study) -> None:
    page = write()
    assert "python -m recipe.train method=x 'a.b=[1,2]' run.seed=SEED   # new" in page
    run = next(run for run in study.runs if run.entry == "new" and run.seed == 1)
    assert cells(page, f"`{run.run_id}`")[3:] == ["3 min 21 s", "2026-01-02", "`0123456789+changes`", "A", "A"]
    assert "* machine A: CPU, 2 cores, 8.0 GiB, no GPU" in page and "* machine B: CPU, 3 cores" in page
    assert "* versions A: torch 2, verl 0.9.1" in page and "versions B" not in page


def test_rows_of_another_declaration_are_named_and_not_used(study: Study) -> None:
    stale = Path("docs/results/pair/new-seed0-00000000.json")
    stale.write_text("{}")
    assert "Not used above: `new-seed0-00000000`." in write()


def test_rows_that_cannot_be_compared_are_shown_as_such(study: Study) -> None:
    run = next(run for run in study.runs if run.entry == "new" and run.seed == 2)
    write_row(row_path(Path("docs/results"), study, run), finished(run.run_id, "new", 2, 0.4, steps=(0, 20)))
    page = write()
    assert cells(page, "new")[3] == "refused" and cells(page, "1. ")[1] == "**refused**"
    assert f"* new: run {run.run_id} is unfinished: it was validated last at step 20, others of its entry at 40" in page
    assert cells(page, "2. ")[1] == "**no**", "at step 20 all of them were validated"


def test_a_study_without_rows_has_a_page_that_says_so(study: Study) -> None:
    page = Path("elsewhere/pair.md")
    assert main(["pair.yaml", "--results", "none", "--page", str(page)]) == 0
    text = page.read_text()
    assert "0 of 9 runs are finished" in text and "## Runs" not in text and "![" not in text
    assert [one.name for one in page.parent.iterdir()] == ["pair.md"]


def test_no_path_of_this_machine_stands_on_the_page(study: Study, tmp_path: Path) -> None:
    assert main([str(tmp_path / "pair.yaml"), "--results", str(tmp_path / "docs/results"), "--page", "/".join([
        str(tmp_path), "docs", "results", "pair.md"])]) == 0  # fmt: skip
    assert str(tmp_path) not in Path("docs/results/pair.md").read_text()


def test_learning_curves_show_mean_and_range_and_need_common_steps(study: Study) -> None:
    rows = {run.run_id: finished(run.run_id, run.entry, run.seed, 0.4) for run in study.runs if run.entry != "never"}
    found = curves(study, rows)
    assert list(found) == ["new", "old"] and list(found["new"]) == [0, 20, 40] and len(found["new"][40]) == 3
    drawing = ElementTree.fromstring(curves_svg(study, rows))
    assert len(drawing.findall(f"{SHAPE}polygon")) == len(drawing.findall(f"{SHAPE}polyline")) == 2
    heights = [float(point.split(",")[1]) for point in drawing.find(f"{SHAPE}polyline").get("points").split()]
    assert heights == sorted(heights, reverse=True), "accuracy rises, so the line goes up"
    assert "new (3 seeds)" in [text.text for text in drawing.findall(f"{SHAPE}text")]
    longer = {name: finished(name, one["entry"], 0, 0.1, (0, 1, 2) if one["entry"] == "old" else (0, 20, 40))
              for name, one in rows.items()}  # fmt: skip
    assert curves_svg(study, longer) is None and curves_svg(study, {}) is None
    # Stages of a chain are no steps.
    staged = {name: {**one, "final": {**one["final"], "stage": "distil"}} for name, one in rows.items()}
    assert curves(study, staged) == {}
    short = {name: finished(name, one["entry"], 0, 0.1, (0, 40)) for name, one in rows.items()}
    assert curves_svg(study, short) is None, "two points are no curve"


def test_bars_in_a_cell_do_not_end_it() -> None:
    assert line(["a|b", "c"]) == r"| a\|b | c |"
