"""The page that compares runs: what is grouped, what is left out, what is refused, and the numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.compare import build_comparison, main
from recipe.compared_curves import curves, mean_and_band
from recipe.compared_groups import differences, group_runs
from recipe.compared_numbers import differences_to, final_numbers
from recipe.compared_runs import ComparedRun, read_folder, read_runs
from recipe.run_files import RunFileError, RunFiles
from recipe.study_file import StudyRun
from recipe.study_rows import keep_run
from verl_ext.config import ConfigError

T_2 = 4.302653  # 97.5% quantile of Student's t with 2 degrees of freedom, from a table
QUESTIONS = ["q0", "q1", "q2", "q3"]


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    method: str = "sdpo",
    right: list[int] | None = None,
    items: list[str] | None = None,
    planned: int = 4,
    steps: int = 4,
    accuracy: float | None = None,
    summary: bool = True,
    **settings: Any,
) -> Path:
    """A made-up run: ``right`` of 4 answers for each question at its end, or only their mean ``accuracy``."""
    files = RunFiles(folder, tensorboard=False)
    files.write_config(
        {
            "run": {
                "seed": seed,
                "steps": planned,
                "output_dir": str(folder.absolute()),
                "quiet": bool(seed % 2),
                "overrides": [f"run.seed={seed}"],
            },
            "data": {"seed": seed, "val_files": settings.pop("val_files", "test.parquet")},
            "distill": {"method": method},
            "trainer": {"default_local_dir": str(folder.absolute() / "checkpoints")},
            "dumps": str(folder.absolute() / "dumps"),
            **settings,
        }
    )
    end = sum(right) / (4 * len(right)) if right else 0.5 if accuracy is None else accuracy
    for step in range(steps + 1):
        metrics: dict[str, float] = {"val/mean@4": 0.25, "val/pass@4": 0.5} if step == 0 else {"reward/mean": step / 10}
        if step == steps:
            metrics |= {"val/mean@4": end, "val/maj@4": end, "val/pass@2": 0.6, "val/pass@4": 0.9}
        files.append_metrics(step, metrics)
    if right:
        counts = {"samples": 4, "items": items or QUESTIONS, "right": right, "judged": [4] * len(right)}
        files.append_validation(0, counts | {"right": [1] * len(right)})
        files.append_validation(steps, counts)
    if summary:
        files.write_summary({"method": method, "steps": steps})
    return folder


def two_methods(root: Path) -> list[Path]:
    """Three seeds each; sdpo has 10, 11 and 12 of 16 right, grpo 8 each."""
    last = ([4, 4, 2, 0], [4, 4, 3, 0], [4, 4, 4, 0])
    made = [write_run(root / f"sdpo-{seed}", seed=seed, right=last[seed], lr=0.1) for seed in range(3)]
    for seed in range(3):
        made.append(write_run(root / f"grpo-{seed}", seed=seed, method="grpo", right=[4, 2, 2, 0], lr=0.1))
    return made


# ------------------------------------------------------------------------------------------------------------- groups


def test_runs_that_differ_only_in_their_seed_are_one_group(tmp_path: Path) -> None:
    runs = read_runs([*two_methods(tmp_path), write_run(tmp_path / "other", seed=7, lr=0.3)])
    groups = group_runs(runs)
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [
        ("sdpo, lr 0.1", [0, 1, 2]), ("grpo", [0, 1, 2]), ("sdpo, lr 0.3", [7]),
    ]  # fmt: skip
    assert differences(groups) == [("distill.method", ["sdpo", "grpo", "sdpo"]), ("lr", ["0.1", "0.1", "0.3"])]
    assert not any(group.mixed for group in groups)


def test_the_same_checkout_in_another_place_is_the_same_setting(tmp_path: Path) -> None:
    def run(root: str, seed: int) -> Path:
        agent = {"rollout": {"agent": {"agent_loop_config_path": f"{root}/conf/agent_loops.yaml"}}}
        folder = tmp_path / str(seed)
        return write_run(folder, seed=seed, actor_rollout_ref=agent, val_files=f"{root}/data/test.parquet")

    assert len(group_runs(read_runs([run("/home/ann/distill", 0), run("/srv/bob", 1)]))) == 1


def test_groups_can_be_asked_for(tmp_path: Path) -> None:
    runs = read_runs([*two_methods(tmp_path), write_run(tmp_path / "sdpo-hot", seed=7, lr=0.3)])
    groups = group_runs(runs, [("ours", "sdpo-*")])
    assert [(group.name, len(group.runs), group.mixed) for group in groups] == [("ours", 4, ("lr",)), ("grpo", 3, ())]
    assert ("lr", ["0.1 / 0.3", "0.1"]) in differences(groups)
    assert [group.name for group in group_runs(runs, [("cold", str(tmp_path / "sdpo-?"))])] == ["cold", "grpo", "sdpo"]
    with pytest.raises(ConfigError, match=r"--group ours=ppo\* takes no run; the runs are sdpo-0"):
        group_runs(runs, [("ours", "ppo*")])


def test_one_seed_twice_and_too_many_groups_are_refused(tmp_path: Path) -> None:
    twice = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    with pytest.raises(ConfigError, match=r"group sdpo has seed 0 twice: .*a and .*b"):
        group_runs(twice)
    assert len(group_runs(twice, [("again", "b")])) == 2
    half = read_runs([tmp_path / "a", write_run(tmp_path / "half", steps=2)])
    assert len(group_runs(half)) == 1, "an unfinished run and its repetition are no clash"
    with pytest.raises(ConfigError, match=r"13 groups of runs, at most 12"):
        group_runs([run_in_memory("m", 0, {"lr": str(index)}) for index in range(13)])


def run_in_memory(label: str, seed: int, settings: dict[str, str], records: Any = ({"step": 1},)) -> ComparedRun:
    name = f"{label}-{seed}"
    return ComparedRun(name, Path(name), True, label, label, seed, settings, {}, records, "", None)


def test_values_that_follow_from_another_do_not_make_the_name_longer() -> None:
    runs = [run_in_memory("m", 0, {"run.steps": steps, "trainer.total_steps": steps}) for steps in ("40", "80")]
    assert [group.name for group in group_runs(runs)] == ["m, steps 40", "m, steps 80"]
    runs = [run_in_memory("m", seed, {str(key): f"a long value {seed}" for key in range(9)}) for seed in range(2)]
    assert [group.name for group in group_runs(runs)][0].startswith("m")
    assert len({group.name for group in group_runs(runs)}) == 2


# ------------------------------------------------------------------------------------------------------------ reading


def test_an_unfinished_run_is_known_by_its_summary_and_its_steps(tmp_path: Path) -> None:
    assert read_folder(write_run(tmp_path / "whole")).unfinished == ""
    assert read_folder(write_run(tmp_path / "going", steps=2, summary=False)).unfinished == "unfinished, at step 2 of 4"
    resumed = read_folder(write_run(tmp_path / "resumed", steps=4, planned=9))
    assert resumed.unfinished == "unfinished, at step 4 of 9", "the summary is that of its first part"
    chain = write_run(tmp_path / "chain", steps=2, planned=40, chain={"stages": ["sft", "distil"]})
    assert read_folder(chain).unfinished == ""


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match=r"nothing: no run to compare"):
        read_runs([tmp_path / "nothing"])
    (tmp_path / "x.json").write_text('{"run_id": 3}')
    with pytest.raises(RunFileError, match=r"x\.json: not the row of a study's run"):
        read_runs([tmp_path / "x.json"])
    run = write_run(tmp_path / "run", right=[1])
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([run, run])
    (run / "validation.jsonl").write_text('{"step": 4, "samples": 4, "items": ["a"], "right": [1, 2], "judged": [4]}\n')
    with pytest.raises(RunFileError, match=r"validation\.jsonl, step 4: not counts by question"):
        read_folder(run)
    (run / "config.yaml").unlink()
    with pytest.raises(RunFileError, match=r"config\.yaml: no such file"):
        read_folder(run)


def test_rows_of_a_study_give_the_numbers_of_their_runs(tmp_path: Path) -> None:
    folders = two_methods(tmp_path / "runs")
    results = tmp_path / "results" / "small"
    for folder in folders:
        name, seed = folder.name.split("-")
        run = StudyRun(name, int(seed), ("data=tiny_world", f"method={name}", "run.steps=4"))
        keep_run(results / f"{run.run_id}.json", run, {"method": name}, folder, 1.0, {"versions": {"verl": name}})
    of_folders, of_rows = group_runs(read_runs(folders)), group_runs(read_runs([results]))
    assert [group.name for group in of_rows] == ["grpo", "sdpo"]
    assert [run.settings["method"] for run in of_rows[0].runs] == ["grpo"] * 3
    by_name = {one.group: one for one in final_numbers(of_folders)}
    for one in final_numbers(of_rows):
        assert one.interval == by_name[one.group].interval and one.others == by_name[one.group].others
    ours, theirs = (differences_to(groups, groups[0])[0].comparison for groups in (of_folders[::-1], of_rows))
    assert ours is not None and theirs is not None
    assert (ours.difference, ours.p_items) == (theirs.difference, theirs.p_items)
    assert not of_rows[0].whole and of_folders[0].whole


# ------------------------------------------------------------------------------------------------------------ numbers


def test_numbers_question_by_question(tmp_path: Path) -> None:
    groups = group_runs(read_runs(two_methods(tmp_path)))
    ours, theirs = final_numbers(groups)
    assert (ours.metric, ours.steps, ours.seeds, ours.note) == ("mean@4", (4,), (0, 1, 2), "")
    assert ours.value == pytest.approx(11 / 16) and theirs.value == pytest.approx(0.5)
    assert ours.interval is not None and ours.interval.population == "seeds and items"
    assert (ours.interval.n_seeds, ours.interval.n_items) == (3, 4)
    assert ours.others == {"maj@4": pytest.approx(11 / 16), "pass@4": pytest.approx(0.9)}, "of pass@k the largest k"
    (found,) = differences_to(groups, groups[1])
    assert found.comparison is not None and found.note == ""
    assert found.comparison.difference.value == pytest.approx(3 / 16)
    assert found.comparison.difference.population == "seeds and items" and found.comparison.pairing == "paired"


def test_without_answers_by_question_the_interval_speaks_about_seeds(tmp_path: Path) -> None:
    values = {"sdpo": (0.5, 0.6, 0.7), "grpo": (0.5, 0.5, 0.5)}
    folders = [
        write_run(tmp_path / f"{method}-{seed}", seed=seed, method=method, accuracy=value)
        for method, found in values.items()
        for seed, value in enumerate(found)
    ]
    groups = group_runs(read_runs(folders))
    ours = final_numbers(groups)[0].interval
    assert ours is not None and ours.population == "seeds"
    assert (ours.low, ours.high) == pytest.approx(
        (0.6 - T_2 * 0.1 / math.sqrt(3), 0.6 + T_2 * 0.1 / math.sqrt(3)), abs=1e-6
    )
    (found,) = differences_to(groups, groups[1])
    assert found.comparison is not None and found.comparison.difference.population == "seeds"
    assert found.comparison.difference.low == pytest.approx(0.1 - T_2 * 0.1 / math.sqrt(3), abs=1e-6)
    assert found.comparison.p_items is None and found.comparison.verdict == "not resolved"


def test_single_runs_are_compared_over_questions_only(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", right=[4, 3, 3, 0]),
        write_run(tmp_path / "b", seed=3, method="grpo", right=[2, 2, 1, 0]),
    ]
    groups = group_runs(read_runs(paths))
    assert final_numbers(groups)[0].interval.population == "items"
    (found,) = differences_to(groups, groups[0])
    assert found.comparison.difference.population == "items" and found.comparison.pairing == "unpaired"
    assert found.comparison.difference.value == pytest.approx(-5 / 16)
    means = group_runs(read_runs([write_run(tmp_path / "c"), write_run(tmp_path / "d", method="grpo")]))
    assert final_numbers(means)[0].interval is None and "one run" in final_numbers(means)[0].note
    assert differences_to(means, means[0])[0].comparison is None


def test_runs_on_different_questions_are_refused_by_name(tmp_path: Path) -> None:
    paths = two_methods(tmp_path)
    other = [
        write_run(tmp_path / f"x-{seed}", seed=seed, method="x", right=[4, 4, 4, 4], items=[*QUESTIONS[:3], "new"])
        for seed in range(3)
    ]
    groups = group_runs(read_runs([*paths, *other]))
    refused = differences_to(groups, groups[0])[1]
    assert refused.comparison is None
    assert "different items: x has 'new', sdpo has not" in refused.note
    mixed = group_runs(read_runs([paths[0], other[1]]), [("both", "*-?")])
    assert "different questions: sdpo-0 has 'q3', x-1 has not" in final_numbers(mixed)[0].note


def test_without_answers_by_question_the_configuration_says_which_they_were(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{method}-{seed}", seed=seed, method=method, val_files=f"{method}.parquet")
        for method in ("sdpo", "grpo")
        for seed in range(2)
    ]
    groups = group_runs(read_runs(folders))
    assert "grpo-0 has data.val_files=grpo.parquet" in differences_to(groups, groups[1])[0].note


def test_other_seeds_are_not_paired_and_other_steps_are_said(tmp_path: Path) -> None:
    right = [4, 2, 2, 0]
    paths = [write_run(tmp_path / f"a-{seed}", seed=seed, right=right) for seed in (0, 1)]
    paths += [
        write_run(tmp_path / f"b-{seed}", seed=seed, right=[4, 4, 2, 0], steps=6, planned=6) for seed in (0, 1, 2)
    ]
    groups = group_runs(read_runs(paths))
    (found,) = differences_to(groups, groups[0])
    assert found.comparison is not None and found.comparison.pairing == "unpaired"
    assert found.note == "not at the same step: sdpo, steps 6 at 6, sdpo, steps 4 at 4"


def test_an_unfinished_run_is_named_and_part_of_no_number(tmp_path: Path) -> None:
    paths = [*two_methods(tmp_path), write_run(tmp_path / "sdpo-9", seed=9, right=[0, 0, 0, 0], steps=2, lr=0.1)]
    groups = group_runs(read_runs(paths))
    assert len(groups) == 2 and final_numbers(groups)[0].value == pytest.approx(11 / 16)
    page = tmp_path / "page.html"
    warnings = build_comparison(paths, page)
    assert warnings == [
        "sdpo-9 (sdpo): unfinished, at step 2 of 4; it is part of no band, number or difference",
    ]
    text = page.read_text()
    assert warnings[0] in text and "3 of 4 (seeds 0, 1, 2)" in text
    assert re.search(r"sdpo-9 \(unfinished\) 0%", text), "its own curve"
    alone = group_runs(read_runs([paths[-1]]))
    assert final_numbers(alone)[0].note == "no finished run"


# ------------------------------------------------------------------------------------------------------------- curves


def test_bands() -> None:
    values_ST = np.array([[0.1, 1.0], [0.2, 1.0], [0.6, 1.0]])
    mean_T, low_T, high_T = mean_and_band(values_ST, "range")
    assert (
        mean_T == pytest.approx([0.3, 1.0]) and low_T == pytest.approx([0.1, 1]) and high_T == pytest.approx([0.6, 1])
    )
    mean_T, low_T, high_T = mean_and_band(values_ST, "interval")
    half = T_2 * math.sqrt((0.04 + 0.01 + 0.09) / 2) / math.sqrt(3)
    assert low_T == pytest.approx([0.3 - half, 1.0]) and high_T == pytest.approx([0.3 + half, 1.0])
    assert mean_and_band(values_ST[:1], "interval")[1] == pytest.approx(values_ST[0]), "one run has no spread"


def test_a_line_has_a_point_only_where_all_runs_of_its_group_have_a_value() -> None:
    first = [{"step": step, "teacher/gap": step / 10, "reward/mean": 1.0} for step in range(1, 5)]
    second = [
        {"step": step, "teacher/gap": None if step == 2 else step / 5, "reward/mean": 0.0} for step in range(1, 5)
    ]
    groups = group_runs([run_in_memory("m", seed, {}, found) for seed, found in enumerate((first, second))])
    charts = {chart.title: chart for chart in curves(groups, "range")}
    assert list(charts) == ["Training reward", "Teacher gap"]
    texts = re.findall(r"<title>(.*?)</title>", charts["Teacher gap"].svg)
    assert texts == ["step 1: m 0.15 (0.1 to 0.2)", "step 3: m 0.45 (0.3 to 0.6)", "step 4: m 0.6 (0.4 to 0.8)"]


# --------------------------------------------------------------------------------------------------------------- page


def test_the_page_is_self_contained_small_and_escapes_what_runs_say(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    paths = [write_run(tmp_path / f"r{seed}", seed=seed, method=attack, right=[4, 2, 2, 0]) for seed in range(2)]
    paths.append(write_run(tmp_path / "r9", method="grpo", right=[4, 2, 2, 0], note=attack))
    page = tmp_path / "made" / "page.html"
    build_comparison(paths, page, band="interval", reference="grpo")
    text = page.read_text()
    assert attack not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    assert "95% t interval of the mean over seeds" in text and "default-src 'none'" in text


def test_the_largest_page_stays_under_five_megabytes() -> None:
    from recipe.compare import render
    from recipe.compared_curves import CURVES

    keys = [curve.keys[0] for curve in CURVES]
    records = [{"step": step, **{key: math.sin(step) + 2 for key in keys}} for step in range(1, 501)]
    runs = [
        run_in_memory(f"a method of some name {index}", seed, {}, records) for index in range(12) for seed in (0, 1)
    ]
    groups = group_runs(runs)
    page = render(groups, final_numbers(groups), differences_to(groups, groups[0]), [], groups[0].name, "range")
    assert page.count("<svg") == len(keys) and len(page.encode()) < 5_000_000
    assert re.search(r"Each point is the mean of \d+ steps", page)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in two_methods(tmp_path)]
    page = tmp_path / "page.html"
    assert main([*paths, "--output", str(page), "--reference", "grpo", "--group", "ours=sdpo*"]) == 0
    assert capsys.readouterr().out.strip() == str(page) and "Against grpo" in page.read_text()
    assert main([*paths, "--output", str(page), "--reference", "ppo"]) == 2
    assert "--reference 'ppo' is no group; the groups are 'sdpo', 'grpo'" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 2
    with pytest.raises(SystemExit) as refused:
        main([*paths, "--group", "sdpo"])
    assert refused.value.code == 2 and "expected NAME=PATTERN" in capsys.readouterr().err


def test_the_projects_own_rows_make_a_page(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "docs" / "results" / "methods"
    rows = [json.loads(path.read_text()) for path in folder.glob("grpo-*.json")]
    page = tmp_path / "page.html"
    build_comparison([folder], page, reference="grpo")
    mean = 100 * sum(row["summary"]["after"] for row in rows) / len(rows)
    assert f"<b>{mean:.1f}%</b>" in page.read_text()
