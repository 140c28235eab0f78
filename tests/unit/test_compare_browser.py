"""The page that compares runs, as a browser sees it. Needs chromium; its content is tested without it."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from recipe.compare import build_comparison
from recipe.run_files import RunFiles

# Points at a step of the first chart and hides a group: all charts must show the step's numbers, without the group.
ACTS = """
document.querySelector('.hit').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
var shown = Array.from(document.querySelectorAll('.readout')).map(function (one) { return one.textContent; });
document.querySelector('#g0').checked = false;
function look(selector) { return getComputedStyle(document.querySelector(selector)).display; }
document.title = JSON.stringify([shown, look('.charts .s0'), look('.charts .s1')]);
"""


def test_a_browser_shows_the_comparison_and_reports_no_errors(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("not run: needs chromium")
    for method in ("grpo", "sdpo"):
        for seed in range(2):
            files = RunFiles(tmp_path / f"{method}-{seed}", tensorboard=False)
            files.write_config({"run": {"seed": seed, "steps": 8}, "distill": {"method": method}})
            for step in range(1, 9):
                files.append_metrics(step, {"reward/mean": step / 8, "distill/loss": seed + 1 / step})
            files.write_summary({"steps": 8})
    page = tmp_path / "page.html"
    build_comparison([tmp_path / f"{method}-{seed}" for method in ("grpo", "sdpo") for seed in range(2)], page)
    digest = base64.b64encode(hashlib.sha256(ACTS.encode()).digest()).decode()
    text = page.read_text().replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    page.write_text(text.replace("</body>", f"<script>{ACTS}</script></body>"))
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
    assert done.stdout.count("<svg") == 2
    reward, loss = "step 1: grpo 0.125 (0.125 to 0.125), sdpo 0.125", "step 1: grpo 1.5 (1 to 2), sdpo 1.5 (1 to 2)"
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert reward in title and loss in title
    assert title.endswith('"none","inline"]')
    # What a page writes to its console, refusals by the content policy included, is logged with this marker.
    assert "CONSOLE" not in done.stderr, done.stderr
