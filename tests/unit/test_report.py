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
from recipe.report_charts import Series, heat_map, line_chart, nice_ticks, percent, short, step_ticks, thin
from recipe.report_content import alarms, charts, choose_completions, key_numbers
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


def test_report_shows_every_part(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    for title in (
        "Validation accuracy",
        "Training reward",
        "Loss",
        "Pass rate",
        "Rows that train",
        "Effective sample size",
        "Teacher gap",
        "Response length",
        "Gradient norm",
        "Seconds by phase",
        "Pass rates over time",
    ):
        assert f"<h3>{title}</h3>" in page
    assert page.count("<svg") == 11
    for text in ("sc_sdpo", "Qwen/Qwen3-8B", "sciknoweval_physics.parquet", "verl 0.9.1", "2 nodes", "1 min 34 s"):
        assert text in page
    assert "total_training_steps: 40" in page
    assert "actor/grad_norm was not finite (step 17)" in page
    assert re.search(r"<title>step 12: \d+ of 32 questions", page)


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
    files.append_completions([row])
    files.append_metrics(3, {f"val/{'<b>'}/mean@8": 0.5})
    page = page_of(files)
    assert page.count("<script") == 1 and page.count("</script>") == 1
    assert "<img" not in page and "<b>" not in page and "\x1b" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_two_hundred_steps_stay_small(tmp_path: Path) -> None:
    files = write_run(tmp_path / "run", steps=200)
    files.append_completions([{"step": 201, "prompt": "p" * 3_000_000, "response": "r"}])
    path = build_report(files.output_dir)
    assert path.stat().st_size < 5_000_000
    assert "more characters in completions.jsonl" in path.read_text(encoding="utf-8")


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


def test_alarms() -> None:
    records = [
        {"step": 0, "val/mean@8": 0.5},
        {"step": 1, "distill/loss": None, "rows/train_share": 0.0, "pass_rate/histogram": [4, 0, 0], "teacher/gap": -1},
        {"step": 2, "distill/loss": 0.1, "rows/train_share": 0.5, "pass_rate/histogram": [2, 1, 1], "val/mean@8": 0.4},
    ]
    text = "\n".join(alarms(records))
    for part in ("distill/loss was not finite (step 1)", "no row trained", "no question had", "gap below", "is lower"):
        assert part in text
    assert alarms([{"step": 0, "val/mean@8": 0.4}, {"step": 1, "distill/loss": 0.1, "val/mean@8": 0.5}]) == []


def test_key_numbers_prefer_the_metric_of_the_summary() -> None:
    records = [{"step": 0, "val/mean@8": 0.25, "val/maj@8": 0.5}, {"step": 9, "val/mean@8": 0.5, "val/maj@8": 0.25}]
    assert key_numbers(records, {})[0].value == "25% → 50%"
    worse = key_numbers(records, {"metric": "val/maj@8"})[0]
    assert (worse.value, worse.tone) == ("50% → 25%", "bad")
    assert key_numbers(records, {"metric": "not/there"})[0].value == "25% → 50%"


def test_the_share_on_few_tokens_is_drawn_by_outcome() -> None:
    records = [{"step": step, "distill/top5_share_right": 0.5, "distill/top5_share_wrong": 0.75} for step in (1, 2, 3)]
    chart = next(one for one in charts(records) if one.title == "Divergence on the top 5% of tokens")
    assert "step 2: right answers 50%, wrong answers 75%" in chart.svg


def test_the_divergence_along_the_response_is_drawn_by_outcome() -> None:
    rows = [
        {"reward": 1.0, "divergence": [0.1, 0.2]},
        {"reward": 0.0, "divergence": [0.0] * 30 + [2.0]},
        {"reward": 0.0, "divergence": [None, 1.0]},  # not finite in the run
        {"reward": 0.0},
    ]
    chart = next(one for one in charts([{"step": 1}], rows) if one.title == "Divergence along the response")
    assert [name for name, _ in chart.legend] == ["right answers (1)", "wrong answers (1)"]
    assert "% of the response 98: right answers (1) 0.2, wrong answers (1) 1" in chart.svg and ">step<" not in chart.svg
    assert all(one.title != "Divergence along the response" for one in charts([{"step": 1}], rows[2:]))


def test_choice_of_completions_covers_the_run() -> None:
    rows = [{"step": step, "n": index} for step in range(1, 101) for index in range(20)]
    chosen = choose_completions(rows, 48)
    steps = [row["step"] for row in chosen]
    assert len(chosen) == 48 and steps[0] == 1 and steps[-1] == 100 and len(set(steps)) == 12
    assert choose_completions([], 48) == []
    assert len(choose_completions(rows[:3], 48)) == 3


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
