"""The report as a browser sees it. Needs chromium; everything else about the report is tested without it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recipe.report import build_report
from recipe.run_files import RunFiles


def test_a_browser_shows_the_charts_and_reports_no_errors(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("not run: needs chromium")
    files = RunFiles(tmp_path / "run", tensorboard=False)
    for step in range(1, 9):
        metrics = {"distill/loss": 1 / step, "pass_rate/histogram": [step, 2, 1], "time/rollout": 2.0, "time/step": 3.0}
        files.append_metrics(step, metrics)
    attack = "</pre><script>document.title = 'taken over'; console.error('ran')</script><img src=x onerror=alert(1)>"
    files.append_completions([{"step": 1, "prompt": attack, "response": attack, "teacher_context": attack}])
    page = build_report(files.output_dir)
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("<svg") == 3
    assert re.search(r"<title>step 3: loss 0\.333", done.stdout)
    assert "taken over" in done.stdout and "<title>taken over" not in done.stdout
    # What a page writes to its console, refusals by the content policy included, is logged with this marker.
    assert "CONSOLE" not in done.stderr, done.stderr
