"""The page, the table and the JSON of an SNR analysis."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from recipe.snr_chart import COLUMNS, render, snr_chart, table, write_snr_report
from recipe.snr_statistics import SnrReport, analyse


def report_of(counts: list[int], *, level: float = 0.4, about=None, **options) -> SnrReport:
    """K = len(counts) - 1 rollouts; counts[k] questions with k successes; SNR² = level * 4 p (1-p)."""
    rng = np.random.default_rng(0)
    samples = len(counts) - 1
    rates = np.repeat(np.arange(samples + 1) / samples, counts)
    gradients = rng.standard_normal((len(rates), 30)) / math.sqrt(30)
    gradients[:, 0] += np.sqrt(level * 4 * rates * (1 - rates))
    return analyse(rates, gradients, bins="exact", samples=samples, resamples=100, about=about, **options)


class _Page(HTMLParser):
    """Refuses tags that are not balanced, and collects what would be loaded from elsewhere."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.outside += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        pass

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def elements(report: SnrReport, tag: str, css: str) -> list[ElementTree.Element]:
    drawing = ElementTree.fromstring(str(snr_chart(report).svg))
    return [one for one in drawing.iter(tag) if one.get("class") == css]


def test_the_chart_shows_every_bin_with_interval_count_and_both_kernels() -> None:
    report = report_of([40, 50, 60, 50, 40])
    assert len(elements(report, "circle", "f0")) == 5
    assert len(elements(report, "line", "line s0")) == 15  # a bar and two caps each
    texts = [one.text for one in elements(report, "text", "tick")]
    assert [text for text in texts if text.startswith("n ")] == ["n 40", "n 50", "n 60", "n 50", "n 40"]
    labels = [one.text for one in elements(report, "text", "label")]
    assert labels == ["pass rate p of the bin", "SNR² / maximum"]
    assert len(elements(report, "path", "line s1")) == len(elements(report, "path", "line s7 dashed")) == 1
    names = [name for name, _ in snr_chart(report).legend]
    assert names[0] == "measured" and names[1].startswith("fitted p^") and names[2] == "PACED's default p (1−p)"
    hover = [one.find("title").text for one in elements(report, "rect", "hit")]
    assert len(hover) == 5 and hover[2].startswith("p 0.5: SNR² 0.") and hover[2].endswith("n 60")


def test_the_highest_measured_bin_stands_at_one() -> None:
    report = report_of([40, 50, 60, 50, 40])
    heights = [float(one.get("cy")) for one in elements(report, "circle", "f0")]
    grid = {one.text: float(one.get("y")) - 3.5 for one in elements(report, "text", "tick") if one.get("x") == "50"}
    assert min(heights) == pytest.approx(grid["1"], abs=0.1)
    assert "n" not in grid and set(grid) >= {"0", "1"}


def test_a_bin_without_interval_is_marked_and_does_not_set_the_scale() -> None:
    report = report_of([40, 50, 60, 3, 40])
    assert len(elements(report, "circle", "f0")) == 4 and len(elements(report, "circle", "f6")) == 1
    assert ("too few questions for an interval", "k6") in snr_chart(report).legend
    reliable = max(one.snr2 for index, one in enumerate(report.bins) if index != 3)
    assert snr_chart(report).title.endswith(f"{reliable:.4g}")


def test_counts_leave_room_for_each_other() -> None:
    report = report_of([6] * 65)
    places = [float(one.get("x")) for one in elements(report, "text", "tick") if one.text.startswith("n ")]
    assert len(elements(report, "circle", "f0")) == 65
    assert 10 < len(places) < 65 and min(np.diff(places)) >= 43


def test_without_signal_there_is_no_chart_but_a_page() -> None:
    report = analyse([0.5, 0.5], np.array([[1.0], [-1.0]]))
    assert snr_chart(report) is None
    page = _Page(render(report))
    assert "no bin has an SNR² above 0" in page.text and "the fit needs at least 3 bins" in page.text
    empty = analyse([], np.zeros((0, 4)))
    assert snr_chart(empty) is None and "undecided" in table(empty)


def test_the_page_is_well_formed_self_contained_and_escapes_what_the_caller_says() -> None:
    report = report_of([40, 50, 60, 50, 40], about={"model": "<script>alert(1)</script>", "step": 20})
    text = render(report)
    page = _Page(text)
    assert page.outside == [] and "://" not in text and "@import" not in text
    assert "<script>alert" not in text and "<script>alert(1)</script>" in page.text
    assert "prefers-color-scheme: dark" in text and "--c7" in text
    assert report.verdict.sentence[1:] in page.text and str(report.fit) in page.text


def test_blocks_of_settings_are_shown_as_names_and_values() -> None:
    about = {"model": {"path": "models/tiny", "revision": None}, "samples": 8, "store": None}
    page = _Page(render(report_of([5, 9, 9, 5], about=about)))
    assert "path models/tiny" in page.text and "{'path'" not in page.text
    assert "revision" not in page.text and "store" not in page.text


def test_the_files_are_written_whole_and_can_be_read_back(tmp_path: Path) -> None:
    report = report_of([40, 3, 60, 50, 0])
    folder = tmp_path / "new" / "snr"
    page = write_snr_report(report, folder)
    assert page == folder / "snr.html" and sorted(one.name for one in folder.iterdir()) == ["snr.html", "snr.json"]
    plain = json.loads((folder / "snr.json").read_text(encoding="utf-8"))
    assert plain == report.to_json()
    assert plain["bins"][1]["se"] is None and plain["bins"][4]["n"] == 0
    assert page.read_text(encoding="utf-8") == render(report)
    write_snr_report(report_of([40, 50, 60]), folder)
    assert len(json.loads((folder / "snr.json").read_text(encoding="utf-8"))["bins"]) == 3


def test_the_table_is_aligned_and_ends_with_exponents_and_verdict() -> None:
    report = report_of([40, 3, 60, 50, 0])
    lines = table(report).split("\n")
    assert len(lines) == 1 + 5 + 2
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[0].split() == " ".join(COLUMNS).split()
    assert lines[1].split()[:3] == ["0/4", "0.000", "40"]
    assert lines[2].split()[4:6] == ["-", "-"]
    assert lines[5].split() == ["4/4", "-", "0", "-", "-", "-", "-", "-"]
    assert lines[6] == f"exponents: none, {report.no_fit}" and lines[7] == report.verdict.sentence
    wide = analyse([0.05, 0.15, 1.0], np.ones((3, 2)))
    assert "[0, 0.1)" in table(wide) and "[0.9, 1]" in table(wide)


def test_a_browser_shows_the_page_without_errors(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("not run: needs chromium")
    page = write_snr_report(report_of([40, 50, 60, 50, 40]), tmp_path)
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
    assert done.stdout.count("<circle") == 5
    # What a page writes to its console, refusals by the content policy included, is logged with this marker.
    assert "CONSOLE" not in done.stderr, done.stderr
