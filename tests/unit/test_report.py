"""The report is one safe, self-contained page, made from the run's files, and says what is wrong with them."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import yaml

from recipe.report import build_report, main
from recipe.report_bars import grouped_bars
from recipe.report_charts import Chart, Series, heat_map, line_chart, nice_ticks, percent, short, step_ticks, thin
from recipe.report_completions import (
    LEVELS,
    MAX_TOKENS,
    choose_completions,
    completions_view,
    divergence_scale,
    level_of,
)
from recipe.report_content import key_numbers
from recipe.report_curves import chart_groups
from recipe.run_files import RunFileError, RunFiles

ROLLOUTS, QUESTIONS = 8, 32


def write_run(folder: Path, steps: int = 40, completions_a_step: int = 8) -> RunFiles:
    """A made-up run whose pass rates rise, with validation every ten steps."""
    rng = random.Random(7)
    files = RunFiles(folder, tensorboard=False)
    files.write_config(
        {
            "method": "sc_sdpo",
            "trainer": {"total_training_steps": steps, "test_freq": 10},
            "actor_rollout_ref": {"model": {"path": "Qwen/Qwen3-8B"}, "rollout": {"n": ROLLOUTS, "temperature": 1.0}},
            "data": {"train_files": ["sciknoweval_physics.parquet"]},
            "environment": {"versions": {"verl": "0.9.1", "vllm": "0.11"}, "machine": "8 GPUs, 2 nodes"},
        }
    )
    for step in range(steps + 1):
        skill = 1 - math.exp(-2 * step / steps)
        metrics: dict[str, object] = {}
        if step % 10 == 0:
            metrics["val/mean@8"] = 0.31 + 0.24 * skill + rng.gauss(0, 0.01)
            metrics["val/maj@8"] = 0.38 + 0.22 * skill + rng.gauss(0, 0.01)
        if step > 0:
            rates = [min(1, max(0, rng.gauss(0.3 + 0.35 * skill, 0.3))) for _ in range(QUESTIONS)]
            wins = [sum(rng.random() < rate for _ in range(ROLLOUTS)) for rate in rates]
            observed = [win / ROLLOUTS for win in wins]
            mean = sum(observed) / QUESTIONS
            weights = [math.sqrt(rate * (1 - rate)) for rate in observed]
            metrics |= {
                "distill/loss": 0.08 * math.exp(-step / 25) + rng.gauss(0.01, 0.003),
                "reward/mean": mean,
                "pass_rate/mean": mean,
                "pass_rate/std": math.sqrt(sum((rate - mean) ** 2 for rate in observed) / QUESTIONS),
                "pass_rate/histogram": [wins.count(count) for count in range(ROLLOUTS + 1)],
                "weight/effective_sample_size": sum(weights) ** 2 / sum(weight**2 for weight in weights),
                "rows/train_share": sum(weight > 0 for weight in weights) / QUESTIONS,
                "weight/largest": 1.9,
                "weight/mean": 1.0,
                "weight/active_share": sum(weight > 0 for weight in weights) / QUESTIONS,
                "pass_rate/questions": QUESTIONS,
                "context/rows": QUESTIONS * ROLLOUTS,
                "context/with_demonstration": QUESTIONS * ROLLOUTS * 0.8,
                "teacher/gap_wrong": -0.3 + rng.gauss(0, 0.05),
                "teacher/entropy": 0.2,
                "teacher/distance": 0.01 * step,
                "student/nll": 0.35 - 0.1 * skill,
                "response/truncated": 0.02,
                "distill/divergence_right": 0.04,
                "distill/divergence_wrong": 0.06,
                **{
                    f"by_pass_rate/{name}/{bin_name}": rng.gauss(0.1, 0.02)
                    for name in ("gap", "divergence")
                    for bin_name in ("p0_25", "p25_50", "p50_75", "p75_100")
                },
                "teacher/gap": 0.2 * math.exp(-step / 30) + rng.gauss(0, 0.015),
                "time/rollout": 12 + 3 * skill + rng.random(),
                "time/student_pass": 1.2 + 0.1 * rng.random(),
                "time/teacher_pass": 2.1 + 0.2 * rng.random(),
                "time/update": 4.5 + 0.4 * rng.random(),
                "time/weight_sync": 1.4 + 0.1 * rng.random(),
                "time/step": 24.0 + 3 * skill + (9 if step % 10 == 0 else 0),
                "response/length": 420 + 160 * skill + rng.gauss(0, 12),
                "actor/grad_norm": math.nan if step == 17 else 0.6 * math.exp(-step / 40) + 0.1 * rng.random(),
            }
        files.append_metrics(step, metrics)
        rows = []
        for index in range(completions_a_step if step else 0):
            mass = 2 + (step + index) % 9
            reward = float((step + index) % 3 == 0)
            rows.append(
                {
                    "step": step,
                    "question_id": f"q{index:03d}",
                    "prompt": f"A cart of {mass} kg moves at 3 m/s and hits a wall. Which impulse?\nA) 3 B) {3 * mass}",
                    "response": f"<think>p = m·v = {mass} · 3</think>\nThe impulse is {3 * mass} N·s: B.",
                    "teacher_context": "A correct solution: J = Δp = m·v." if index % 4 else None,
                    "reward": reward,
                    "pass_rate": 0.375,
                    "weight": 1.21,
                    "has_demonstration": bool(index % 4),
                }
            )
        files.append_completions(rows)
    files.write_summary(
        {
            "method": "sc_sdpo",
            "steps": steps,
            "metric": "val/mean@8",
            "before": 0.31,
            "after": 0.52,
            "seconds_to_first_step": 94.2,
            "seconds_per_step": 26.3,
        }
    )
    return files


def page_of(files: RunFiles) -> str:
    return build_report(files.output_dir).read_text(encoding="utf-8")


def all_charts(records: list, completions: list | tuple = ()) -> dict[str, Chart]:
    return {chart.title: chart for _, charts in chart_groups(records, completions) for chart in charts}


def test_report_shows_every_part(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    titles = (
        "Validation accuracy",
        "Training reward",
        "Pass rate",
        "Pass rates over time",
        "Loss",
        "Gradient norm",
        "Rows that train",
        "Effective sample size",
        "Question weights",
        "Teacher gap",
        "Teacher gap on wrong answers",
        "Rows with a demonstration",
        "Gap by pass rate",
        "Divergence by pass rate",
        "Divergence by outcome",
        "Teacher against student weights",
        "Response length",
        "Responses cut",
        "Entropy",
        "Seconds by phase",
    )
    for title in titles:
        assert f"<h3>{title}</h3>" in page
    assert page.count("<svg") == len(titles)
    for text in ("sc_sdpo", "Qwen/Qwen3-8B", "sciknoweval_physics.parquet", "verl 0.9.1", "2 nodes", "1 min 34 s"):
        assert text in page
    assert "total_training_steps: 40" in page
    assert "<strong>loss or gradient was not finite</strong>: step 17; actor/grad_norm" in page
    assert "Threshold: every value finite." in page and "checks quiet" in page
    assert re.search(r"<title>step 12: \d+ of 32 questions", page)
    assert "changes.json is written when a run ends" in page


def test_changes_against_the_presets_are_shown(tmp_path: Path) -> None:
    files = write_run(tmp_path / "run", steps=2)
    change = {"key": "run.steps", "preset": 40, "run": "<b>7", "set": True}
    files.write_changes({"presets": ["method=sdpo"], "changes": [change, change | {"key": "trainer.x", "set": False}]})
    page = page_of(files)
    assert "Presets chosen: method=sdpo." in page and "1 more keys" in page
    row = '<td class="key set">run.steps</td><td class="was">40</td><td class="is">&lt;b&gt;7</td>'
    assert row in page and '<td class="key">trainer.x</td>' in page
    files.write_changes({"error": "method=gone does not exist"})
    assert "Not known: method=gone does not exist" in page_of(files)


def test_report_is_self_contained(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert not re.search(r"https?://", page)
    assert not re.search(r"""\b(?:src|href|data|action)\s*=|@import|url\(|<link|<iframe""", page)
    assert "NaN" not in page and ">nan<" not in page and "Infinity" not in page
    assert page.count("<script") == 1


def test_model_text_is_escaped(tmp_path: Path) -> None:
    files = write_run(tmp_path / "run", steps=2)
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\ud800"
    row = {"step": 2, "question_id": attack, "prompt": attack, "response": attack, "teacher_context": [attack]}
    files.append_completions([row, row | {"tokens": [attack, "'\"><b>"], "divergence": [0.1, 0.2]}])
    files.append_completions([{key: attack for key in ("step", "reward", "weight", "has_demonstration")}])
    files.append_metrics(3, {f"val/{'<b>'}/mean@8": 0.5})
    page = page_of(files)
    assert page.count("<script") == 1 and page.count("</script>") == 1
    assert "<img" not in page and "<b>" not in page and "\x1b" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_two_hundred_steps_stay_small(tmp_path: Path) -> None:
    files = write_run(tmp_path / "run", steps=200, completions_a_step=0)
    files.append_completions([{"step": 201, "prompt": "p" * 3_000_000, "response": "r"}])
    # As long as responses may get, and every character five in HTML.
    tokens = ["<&>"] * 4000
    rows = [
        {"step": step, "prompt": "<" * 8000, "response": "".join(tokens), "teacher_context": "&" * 20000}
        | {"tokens": tokens, "divergence": [0.01 * (i % 40) for i in range(4000)]}
        for step in range(1, 201, 40)
        for _ in range(4)
    ]
    files.append_completions(rows)
    path = build_report(files.output_dir)
    assert 1_000_000 < path.stat().st_size < 5_000_000
    page = path.read_text(encoding="utf-8")
    assert "more characters in completions.jsonl" in page and "more tokens in completions.jsonl" in page


def test_long_runs_are_averaged_and_say_so(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, tensorboard=False)
    lines = [json.dumps({"step": step, "distill/loss": 0.1, "pass_rate/histogram": [1, 2]}) for step in range(5000)]
    files.metrics_path.write_text("\n".join(lines) + "\n")
    page = page_of(files)
    assert len(page) < 2_000_000
    assert "Each point is the mean of 13 steps." in page


def test_a_run_with_one_step_and_few_metrics(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, tensorboard=False)
    files.append_metrics(0, {"val/mean@8": 0.25})
    page = page_of(files)
    assert page.count("<svg") == 1 and "measured once" in page and "None were written by this run" in page


def test_metrics_without_any_known_key(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, tensorboard=False)
    files.append_metrics(1, {"something": 1.0, "pass_rate/histogram": [], "distill/loss": None})
    assert "hold none of the values" in page_of(files)


@pytest.mark.parametrize("width", [0, 1])
def test_all_zero_values_are_drawn(width: int) -> None:
    chart = line_chart("t", [1, 2, 3], [Series("t", [0.0, 0.0, 0.0 + width * 1e-12])])
    assert chart is not None and "nan" not in chart.svg


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_run(tmp_path / "run", steps=3)
    out = tmp_path / "elsewhere" / "page.html"
    assert main([str(files.output_dir), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.exists()
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert "RUN_DIR" in text and "--out" in text and "metrics.jsonl" in text


def test_clear_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message() -> str:
        assert main([str(tmp_path / "run")]) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    assert "no such folder" in message()
    (tmp_path / "run").mkdir()
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert f"{metrics}: no such file" in message()
    metrics.write_text("")
    assert f"{metrics}: no metrics yet" in message()
    metrics.write_text('{"step": 1}\n{"step": 2, oops}\n{"step": 3}\n')
    assert f"{metrics}, line 2: not valid JSON" in message()
    metrics.write_text('{"loss": 1}\n')
    assert '"step" must be a whole number' in message()
    metrics.write_text('{"step": 1}\n')
    (tmp_path / "run" / "config.yaml").write_text("a: [1\n")
    assert "config.yaml: not valid YAML" in message()


def test_a_torn_last_line_is_no_error(tmp_path: Path) -> None:
    files = write_run(tmp_path / "run", steps=3)
    with open(files.metrics_path, "a") as file:
        file.write('{"step": 4, "distill/lo')
    assert "Validation accuracy" in page_of(files)


def test_key_numbers_prefer_the_metric_of_the_summary() -> None:
    records = [{"step": 0, "val/mean@8": 0.25, "val/maj@8": 0.5}, {"step": 9, "val/mean@8": 0.5, "val/maj@8": 0.25}]
    assert key_numbers(records, {})[0].value == "25% → 50%"
    worse = key_numbers(records, {"metric": "val/maj@8"})[0]
    assert (worse.value, worse.tone) == ("50% → 25%", "bad")
    assert key_numbers(records, {"metric": "not/there"})[0].value == "25% → 50%"


def test_the_share_on_few_tokens_is_drawn_by_outcome() -> None:
    records = [{"step": step, "distill/top5_share_right": 0.5, "distill/top5_share_wrong": 0.75} for step in (1, 2, 3)]
    chart = all_charts(records)["Divergence on the top 5% of tokens"]
    assert "step 2: right answers 50%, wrong answers 75%" in chart.svg


def test_the_gap_is_drawn_by_pass_rate_in_three_stretches_of_the_run() -> None:
    key = "by_pass_rate/gap/"
    records = [{"step": 0}] + [
        {"step": step, f"{key}p0_25": float(step), f"{key}p75_100": None if step < 5 else -1.0} for step in range(1, 7)
    ]
    chart = all_charts(records)["Gap by pass rate"]
    assert [name for name, _ in chart.legend] == ["steps 1 to 2", "steps 3 to 4", "steps 5 to 6"]
    assert "0 to 25%: steps 1 to 2 1.5, steps 3 to 4 3.5, steps 5 to 6 5.5<" in chart.svg
    assert "75 to 100%: steps 5 to 6 -1<" in chart.svg
    assert [name for name, _ in all_charts(records[:2])["Gap by pass rate"].legend] == ["step 1"]
    assert "Gap by pass rate" not in all_charts(records[:1])


def test_bars_stand_on_zero() -> None:
    chart = grouped_bars("t", ["a", "b"], [Series("s", [2.0, -1.0], 3)])
    bars = re.findall(r'class="f3" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', chart.svg)
    (top, height), (zero, depth) = [tuple(map(float, bar)) for bar in bars]
    assert zero == pytest.approx(top + height, abs=0.11) and height == pytest.approx(2 * depth, abs=0.2)
    assert grouped_bars("t", ["a"], [Series("s", [None])]) is None


def test_the_divergence_along_the_response_is_drawn_by_outcome() -> None:
    rows = [
        {"reward": 1.0, "divergence": [0.1, 0.2]},
        {"reward": 0.0, "divergence": [0.0] * 30 + [2.0]},
        {"reward": 0.0, "divergence": [None, 1.0]},  # not finite in the run
        {"reward": 0.0},
    ]
    chart = all_charts([{"step": 1}], rows)["Divergence along the response"]
    assert [name for name, _ in chart.legend] == ["right answers (1)", "wrong answers (1)"]
    assert "% of the response 98: right answers (1) 0.2, wrong answers (1) 1" in chart.svg and ">step<" not in chart.svg
    assert "Divergence along the response" not in all_charts([{"step": 1}], rows[2:])


def test_choice_of_completions_covers_the_run() -> None:
    rows = [{"step": step, "n": index} for step in range(1, 101) for index in range(20)]
    chosen = choose_completions(rows, 48)
    steps = [row["step"] for row in chosen]
    assert len(chosen) == 48 and steps[0] == 1 and steps[-1] == 100 and len(set(steps)) == 12
    assert choose_completions([], 48) == []
    assert len(choose_completions(rows[:3], 48)) == 3


def row_of(tokens: list, divergence: list, **more: object) -> dict:
    row = {"step": 1, "prompt": "p", "response": "".join(tokens), "tokens": tokens, "divergence": divergence}
    return row | more


def test_tokens_keep_their_place_and_get_a_colour_by_their_divergence() -> None:
    tokens, values = ["a", "", "\x1b🙂\r", "\n", "b"], [0.0, 1.0, -1.0, 0.25, None]
    view = completions_view([row_of(tokens, values)])
    shown = view.rows[0].tokens
    assert shown.text == "a🙂\nb" and shown.lengths == "1,0,1,1,1" and shown.nats == "0,1,-1,0.25,"
    assert shown.levels == "06f3x"
    assert [text for text, _ in shown.top] == ["(part of a character)", "🙂", "⏎"]
    assert [level for level, _ in view.legend] == ["f", "d", "b", "0", "2", "4", "6"]
    assert view.legend[-1] == ("6", "1") and view.legend[0] == ("f", "-1")
    assert view.rows[0].cells["divergence"] == "0.0625" and view.rows[0].cells["tokens"] == "5"


def test_the_scale_is_the_runs_and_not_its_largest_token() -> None:
    rows = [row_of(["t"] * 100, [0.5] * 99 + [50.0])]
    assert divergence_scale(rows) == 0.5 and divergence_scale([{"step": 1}]) == 0.0
    assert [level_of(value, 0.5) for value in (0.0, 0.5, 50.0, None)] == ["0", str(LEVELS), str(LEVELS), "x"]
    assert level_of(0.3, 0.0) == "0"


def test_rows_without_tokens_or_with_broken_ones_show_their_response() -> None:
    for row in (row_of(["a"], [0.1, 0.2]), row_of([], []), {"step": 1, "response": "a", "tokens": "a"}):
        view = completions_view([row])
        assert view.rows[0].tokens is None and view.legend == []
        assert [title for title, _ in view.rows[0].texts] == ["Prompt", "Response", "Teacher context"]


def test_long_rows_are_cut_to_the_budget() -> None:
    long = row_of(["word "] * 5000, [0.1] * 5000, prompt="<" * 9000)
    view = completions_view([long] * 40, budget=100_000)
    assert 0 < len(view.rows) < 40 and view.total == 40
    assert sum(len(row.tokens.text) for row in view.rows) < 100_000
    one = completions_view([row_of(["w"] * 5000, [0.1] * 5000)]).rows[0].tokens
    assert one.left_out == 5000 - MAX_TOKENS and len(one.levels) == MAX_TOKENS == len(one.nats.split(","))
    assert completions_view([long], budget=10).rows == []


def test_chart_pieces() -> None:
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(3.0, 3.0)[0] < 3 < nice_ticks(3.0, 3.0)[-1]
    assert step_ticks(list(range(41))) == [0, 10, 20, 30, 40]
    assert step_ticks([5]) == [5] and step_ticks([1, 2]) == [1, 2]
    assert thin([1, 2, 3, 4, 5], [[1, 3, None, None, 5]], 3) == ([2, 4, 5], [[2, None, 5]], 2)
    assert (short(0.05), short(1234567.0), short(120.0), percent(0.125)) == ("0.05", "1.23e6", "120", "12.5%")
    assert heat_map("t", [1], [[0, 0]]) is None and heat_map("t", [1], [None]) is None
    assert line_chart("t", [1], [Series("t", [None])]) is None


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="nowhere"):
        build_report(tmp_path / "nowhere")


def test_configuration_is_shown_as_it_was_written(tmp_path: Path) -> None:
    files = write_run(tmp_path / "run", steps=1)
    written = yaml.safe_load(files.config_path.read_text())
    assert written["actor_rollout_ref"]["rollout"]["n"] == ROLLOUTS
    assert "temperature: 1.0" in page_of(files)


def test_pairs_have_charts_of_their_own_and_say_who_wrote_a_response(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "run", tensorboard=False)
    sides = {
        f"preference/{name}_{side}": 0.5 for name in ("log_ratio", "pass_rate") for side in ("positive", "negative")
    }
    margins = {"preference/margin": -1.0, "preference/margin_expected": -1.1}
    for step in (1, 2):
        files.append_metrics(step, {"distill/loss": 0.9, "preference/accuracy": 0.2, **margins, **sides})
    row = {"step": 1, "question_id": "q", "prompt": "p", "response": "r", "reward": 1.0}
    files.append_completions([row | {"sampled_by": name} for name in ("teacher", "student")] + [row])
    page = page_of(files)
    for title in ("Preference margin", "Student against teacher", "Preference accuracy", "Right samples"):
        assert f"<h3>{title}</h3>" in page
    assert "log 2 = 0.693" in page
    assert page.count("Response, sampled by the teacher") == page.count("Response, sampled by the student") == 1
