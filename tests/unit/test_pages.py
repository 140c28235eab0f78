"""The pages' templates: one style, of which none has a copy."""

from __future__ import annotations

import jinja2
import pytest

from recipe.compose import ROOT
from recipe.pages import page_environment

SHARED = "page_style.css.j2"
PAGES = sorted(path.name for path in (ROOT / "recipe").glob("*.html.j2"))


def rules(name: str) -> set[str]:
    """The lines of a template's style that say how something looks."""
    text = (ROOT / "recipe" / name).read_text(encoding="utf-8")
    text = text.partition("<style>")[2].partition("</style>")[0] if name.endswith(".html.j2") else text
    return {line.strip() for line in text.splitlines() if ":" in line and not line.strip().startswith(("{#", "@media"))}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_shared_style_and_repeats_none_of_it(page: str) -> None:
    source = (ROOT / "recipe" / page).read_text(encoding="utf-8")
    included = [name for name in (SHARED, "report_style.css.j2") if f'{{% include "{name}" %}}' in source]
    assert len(included) == 1
    assert not rules(page) & rules(included[0])


def test_the_report_s_own_style_adds_to_the_shared_one() -> None:
    assert f'{{% include "{SHARED}" %}}' in (ROOT / "recipe" / "report_style.css.j2").read_text(encoding="utf-8")
    assert rules("report_style.css.j2") and not rules("report_style.css.j2") & rules(SHARED)
    style = page_environment().get_template("report_style.css.j2").render()
    assert "--page: #101418" in style and "--heat" in style and "{%" not in style
    assert style.count("{") == style.count("}")


def test_text_is_escaped_and_a_missing_value_is_an_error() -> None:
    environment = page_environment()
    assert environment.from_string("{{ text }}").render(text="<b>") == "&lt;b&gt;"
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ nothing }}").render()
