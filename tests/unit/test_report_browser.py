"""The report as a browser sees it. Needs chromium; everything else about the report is tested without it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipe.report import build_report
from recipe.run_files import RunFiles

ATTACK = "</pre><script>document.title = 'taken over'; console.error('ran')</script><img src=x onerror=alert(1)>"
TOKENS = [ATTACK, " 🙂", "", "\nsix", "<|im_end|>"]


def load_browser() -> Any:
    """The neighbouring file, which pytest's importlib mode does not put on the path."""
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = RunFiles(tmp_path_factory.mktemp("report") / "run", tensorboard=False)
    for step in range(1, 9):
        metrics = {"distill/loss": 1 / step, "pass_rate/histogram": [step, 2, 1], "time/rollout": 2.0, "time/step": 3.0}
        files.append_metrics(step, metrics | {"verifier/errors": 1})
    row = {"step": 1, "prompt": ATTACK, "response": "".join(TOKENS), "teacher_context": ATTACK, "question_id": "q0"}
    row |= {"tokens": TOKENS, "divergence": [0.1, 0.9, 0.0, -0.4, 0.0], "reward": 1.0, "pass_rate": 1.0, "weight": 0.0}
    rows = [row]
    for n, rate in enumerate((0.0, 0.5, 0.75), start=1):
        text = f"six times {n}"
        rows.append({"step": 8, "prompt": text, "response": text, "reward": 0.0, "pass_rate": rate, "weight": n / 2})
    files.append_completions(rows)
    files.write_changes({"presets": ["method=sdpo"], "changes": []})
    return build_report(files.output_dir)


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("not run: needs chromium")
    made = load_browser()(chromium, tmp_path_factory.mktemp("profile"))
    try:
        made.size(1280, 800)
        made.open(page.as_uri())
        yield made
        # Errors, and refusals by the page's own content policy, would stand here.
        assert made.console == []
    finally:
        made.close()


SHOWN = (
    "Array.from(document.querySelectorAll('#completions details')).filter(d => !d.hidden)"
    ".map(d => d.querySelector('.ask').textContent.slice(-11))"
)
ONE, TWO, THREE = ("six times 1", "six times 2", "six times 3")
FIRST = "r=alert(1)>"


def set_to(browser: Any, name: str, value: str) -> None:
    """What choosing an entry of a select does."""
    change = f"e => {{ e.value = '{value}'; e.dispatchEvent(new Event('input')); }}"
    browser.run(f"({change})(document.querySelector('[name={name}]'))")


@pytest.fixture
def table(browser: Any) -> Any:
    browser.click("#clear")
    browser.click("#close")
    return browser


def test_the_charts_are_there_and_the_texts_are_texts(browser: Any) -> None:
    assert browser.run("document.querySelectorAll('svg').length") == 4
    titles = browser.run("Array.from(document.querySelectorAll('.hit title')).map(t => t.textContent)")
    assert "step 3: loss 0.3333" in titles
    assert browser.run("document.title") == "run: training report"
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert "the verifier failed" in browser.run("document.querySelector('.alarms').textContent")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("outcome", "right", [FIRST]),
        ("outcome", "wrong", [ONE, TWO, THREE]),
        ("step", "1", [FIRST]),
        ("rate", "none", [ONE]),
        ("rate", "some", [TWO, THREE]),
        ("rate", "all", [FIRST]),
        ("demo", "yes", []),
    ],
)
def test_filters(table: Any, name: str, value: str, expected: list[str]) -> None:
    set_to(table, name, value)
    assert table.run(SHOWN) == expected
    assert table.run("document.getElementById('count').textContent") == f"{len(expected)} of 4 shown"


def test_search_takes_every_word_and_is_kept_in_the_address(table: Any, page: Path) -> None:
    table.click("[name=q]")
    table.type("TIMES six")
    assert table.run(SHOWN) == [ONE, TWO, THREE]
    table.type(" 2")
    assert table.run(SHOWN) == [TWO] and table.run("location.hash") == "#q=TIMES+six+2"
    table.click("#clear")
    assert len(table.run(SHOWN)) == 4
    table.run("location.hash = '#outcome=wrong&sort=-weight'")
    table.run("new Promise(done => setTimeout(done, 0))")
    assert table.run(SHOWN) == [THREE, TWO, ONE]


def test_sorting_by_a_column_down_up_and_back(table: Any) -> None:
    orders = []
    for _ in range(3):
        table.click("button[data-sort=weight]")
        orders.append(table.run(SHOWN))
    assert orders == [[THREE, TWO, ONE, FIRST], [FIRST, ONE, TWO, THREE], [FIRST, ONE, TWO, THREE]]
    for _ in range(2):
        table.click("button[data-sort=divergence]")
        assert table.run(SHOWN)[0] == FIRST  # rows without a value stay last


def test_an_opened_row_shows_its_tokens_in_colour(table: Any) -> None:
    table.click("#completions summary")
    table.run("new Promise(done => setTimeout(done, 50))")
    pieces = table.run(
        "Array.from(document.querySelectorAll('pre.tokens span')).map(s => [s.textContent, s.className, s.title])"
    )
    assert [text for text, _, _ in pieces] == [text for text in TOKENS if text]
    assert [css for _, css, _ in pieces] == ["t2", "t6", "td", "t0"]
    assert pieces[1][2] == "0.9 nats" and pieces[2][2] == "-0.4 nats"
    color = "getComputedStyle(document.querySelector('pre.tokens .t6')).backgroundColor"
    assert table.run(color).startswith("rgba(220, 95, 10")
    table.size(1280, 800, dark=True)
    assert table.run(color).startswith("rgba(240, 130, 50")
    table.size(1280, 800)


def test_nothing_is_wider_than_a_laptop_screen_and_it_prints(table: Any, tmp_path: Path) -> None:
    for width in (1280, 700):
        table.size(width, 800)
        assert table.run("document.documentElement.scrollWidth") <= width
    table.size(1280, 800)
    table.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-"
