"""Plots as SVG files: where things stand, what is refused, and whether the colours can be seen."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from recipe import svg_parts, theory_figures
from recipe.svg_plot import LEFT, PLOT, RIGHT, TOP, WIDTH, Curve, Panel, plot_svg

NAMESPACE = "{http://www.w3.org/2000/svg}"


def panel(*curves: Curve, title: str = "title") -> Panel:
    return Panel(title, "across", "up", curves, (0.0, 10.0), (0.0, 4.0))


def drawing(*panels: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(plot_svg("a plot", panels))


def test_a_point_stands_where_its_values_say() -> None:
    tree = drawing(panel(Curve("dots", [0, 5, 10], [0, 1, 4], "#123456", dots=True, errors=[0, 0.5, 0])))
    group = tree.find(f"{NAMESPACE}g[@clip-path]")
    found = [(float(one.get("cx")), float(one.get("cy"))) for one in group.iter(f"{NAMESPACE}circle")]
    middle = (LEFT + WIDTH - RIGHT) / 2
    assert found == [(LEFT, TOP + PLOT), (middle, TOP + PLOT * 0.75), (WIDTH - RIGHT, TOP)]
    bars = [(float(one.get("y1")), float(one.get("y2"))) for one in group.iter(f"{NAMESPACE}line")]
    assert bars[1] == (TOP + PLOT * (1 - 0.5 / 4), TOP + PLOT * (1 - 1.5 / 4))


def test_a_line_goes_through_its_points_and_the_second_panel_stands_right_of_the_first() -> None:
    tree = drawing(panel(), panel(Curve("line", [0, 10], [4, 0], "#123456", dash="5 4", width=3)), panel())
    path = next(tree.iter(f"{NAMESPACE}path"))
    assert path.get("d") == f"M{WIDTH + LEFT:.1f} {TOP:.1f} L{2 * WIDTH - RIGHT:.1f} {TOP + PLOT:.1f}"
    assert (path.get("stroke-dasharray"), path.get("stroke-width")) == ("5 4", "3")
    width, height = (int(value) for value in tree.get("viewBox").split()[2:])
    assert width == 2 * WIDTH and height > 2 * (TOP + PLOT)
    clips = [one.get("id") for one in tree.iter(f"{NAMESPACE}clipPath")]
    assert len(set(clips)) == 3


def test_the_legend_names_every_curve_inside_the_panel() -> None:
    curves = [Curve(f"a curve with a name {number}", [0, 1], [0, 1], "#123456") for number in range(5)]
    texts = [one for one in drawing(panel(*curves)).iter(f"{NAMESPACE}text") if one.text.startswith("a curve")]
    assert [one.text for one in texts] == [curve.name for curve in curves]
    places = [(float(one.get("x")), float(one.get("y"))) for one in texts]
    assert len(set(places)) == 5 and all(x + 6.6 * 21 < WIDTH for x, _ in places)


def test_texts_are_escaped() -> None:
    curve = Curve("a < b & c", [0, 1], [0, 1], "#123456")
    text = plot_svg('"label" <', [panel(curve, title="<script>alert(1)</script>")])
    assert "<script>" not in text and ElementTree.fromstring(text).get("aria-label") == '"label" <'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": [1.0, math.nan]}, "'broken' has a value that is not finite"),
        ({"x": [1.0, math.inf]}, "'broken' has a value that is not finite"),
        ({"errors": [0.1, math.nan]}, "'broken' has a value that is not finite"),
        ({"y": [1.0]}, r"'broken' has lists of lengths \[2, 1\]"),
        ({"errors": [1.0]}, r"'broken' has lists of lengths \[2, 2, 1\]"),
        ({"x": [], "y": []}, r"'broken' has lists of lengths \[0, 0\]"),
    ],
)
def test_a_curve_that_cannot_be_drawn_whole_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_svg("", [panel(Curve(**{"name": "broken", "x": [0, 1], "y": [0, 1], "color": "#123456"} | changes))])


def test_a_plot_without_a_panel_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        plot_svg("", [])


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    shares = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_has_contrast_on_light_and_dark_pages() -> None:
    modules = (svg_parts, theory_figures)
    names = {(module, name) for module in modules for name in vars(module) if name.isupper() and name != "GRID"}
    colors = {value for module, name in names if re.fullmatch(r"#[0-9a-f]{6}", str(value := getattr(module, name)))}
    assert len(colors) >= 8
    for color in colors:
        for background in ("#ffffff", "#0d1117"):
            low, high = sorted((luminance(color), luminance(background)))
            assert (high + 0.05) / (low + 0.05) > 3, f"{color} on {background}"
