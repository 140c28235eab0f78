"""The list of studies: finished and left, and that the shipped one names the studies and pages that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from recipe.compose import ROOT
from recipe.study import main
from recipe.study_file import read_study
from recipe.study_rows import read_rows, row_path, write_row


def cells(text: str) -> dict[str, list[str]]:
    """The lines of the table, by study."""
    lines = [line for line in text.splitlines() if line.startswith("| [`")]
    found = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {re.fullmatch(r"\[`(.+)`\]\(.+\)", line[0])[1]: line for line in found}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two studies, one of which shows rows of the other; one run of two is finished."""
    monkeypatch.chdir(tmp_path)
    folder = Path("conf/study")
    folder.mkdir(parents=True)
    grid = [{"name": "a", "overrides": ["x=1"], "expected_seconds": 90}, {"name": "b", "overrides": ["x=2"]}]
    (folder / "one.yaml").write_text(yaml.safe_dump({"name": "one", "about": "Asks | this.", "grid": grid}))
    shown = [{"name": "a", "rows": {"study": "one"}}]
    (folder / "view.yaml").write_text(yaml.safe_dump({"name": "view", "about": "Shows.", "grid": shown}))
    study = read_study(folder / "one.yaml")
    row = {"run_id": study.runs[1].run_id, "entry": "b", "seed": 0, "final": {}, "seconds": 40.0}
    write_row(row_path(Path("docs/results"), study, study.runs[1]), row)
    Path("docs/results/one.md").write_text("page")
    return Path("docs/results/README.md")


def make(index: Path) -> str:
    assert main(["conf/study/one.yaml", "--results", "docs/results", "--index", str(index)]) == 0
    return index.read_text(encoding="utf-8")


def test_every_study_has_a_line_with_what_is_finished_and_what_the_rest_costs(index: Path) -> None:
    text = make(index)
    assert "1 of 2 declared runs are finished. What was not run would take about 1 min 30 s" in text
    found = cells(text)
    assert list(found) == ["view", "one"], "overviews first"
    assert found["one"][0] == "[`one`](../../conf/study/one.yaml)"
    assert found["one"][1:] == [r"Asks \| this.", "2", "2", "1", "1 × 1 min 30 s: about 1 min 30 s", "[page](one.md)"]
    # Runs of other studies are counted there, and once.
    assert found["view"][2:] == ["1", "0", "0, and 0 of 1 of other studies", "", "not made"]


def test_a_file_or_an_index_must_be_asked_for_and_a_folder_without_studies_is_refused(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "FILE (or --index MD)" in capsys.readouterr().err
    assert main(["docs/none.yaml", "--index", str(index)]) == 2
    assert "docs holds no study" in capsys.readouterr().err


def test_the_shipped_index_lists_the_declared_studies() -> None:
    """It may lag behind rows that have come since, but not behind a declaration, and never claim what is not there."""
    results, folder = ROOT / "docs" / "results", ROOT / "conf" / "study"
    listed = cells((results / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.yaml")), (
        "make it again: python -m recipe.study --index docs/results/README.md"
    )
    for name, (_, asks, entries, runs, finished, _, page) in listed.items():
        study = read_study(folder / f"{name}.yaml")
        assert study.name == name and study.about and asks == study.about.replace("|", "\\|")
        assert (int(entries), int(runs)) == (len(study.entries), len(study.own_runs)), name
        rows = read_rows(results, study)
        assert int(finished.split(",")[0]) <= sum(run.run_id in rows for run in study.own_runs), name
        assert (page == f"[page]({name}.md)") == (results / f"{name}.md").exists(), name
