"""Plots of functions as one stand-alone SVG file: panels side by side, each with axes, curves and a legend below it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from recipe.report_charts import nice_ticks, short
from recipe.svg_parts import GRID, TEXT, svg_line, svg_page, svg_text

COLUMNS = 2
WIDTH, PLOT, LEFT, RIGHT, TOP = 430, 240, 62, 14, 34  # of a panel: its width, height of the plot, room around it
AXIS, LEGEND_ROW, LEGEND_GAP = 44, 19, 16
CHARACTER = 6.6  # about the width of one at the size of the legend


@dataclass(frozen=True)
class Curve:
    """Points joined by a line, or marked by dots.

    Attributes:
        x, y: of the points, in the units of the panel's axes.
        dash: SVG's stroke-dasharray; "" for a whole line.
        dots: mark the points and draw no line.
        errors: half-length of a vertical bar at each point; None for none.
        width: of the line in pixels.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dash: str = ""
    dots: bool = False
    errors: Sequence[float] | None = None
    width: int = 2


@dataclass(frozen=True)
class Panel:
    """One pair of axes. The axes end at the round numbers that hold ``x_range`` and ``y_range``."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_range: tuple[float, float]
    y_range: tuple[float, float]


def plot_svg(label: str, panels: Sequence[Panel]) -> str:
    """The file: panels from left to right, two a row. What is outside a panel's axes is cut.

    Args:
        label: what the picture shows, for those who do not see it.

    Raises:
        ValueError: no panel, or a curve with a value that is not finite or with lists of different lengths.
    """
    if not panels:
        raise ValueError("a plot needs at least one panel")
    for curve in (curve for panel in panels for curve in panel.curves):
        _check(curve)
    parts: list[str] = []
    top = 0.0
    for start in range(0, len(panels), COLUMNS):
        row = panels[start : start + COLUMNS]
        for column, panel in enumerate(row):
            parts += _Axes(panel, column * WIDTH, top, f"plot{start + column}").parts()
        top += TOP + PLOT + AXIS + LEGEND_GAP + max(len(list(_legend_rows(panel.curves))) for panel in row) * LEGEND_ROW
    return svg_page(WIDTH * min(len(panels), COLUMNS), math.ceil(top), label, parts)


class _Axes:
    """Maps a panel's values to the picture and draws its parts."""

    def __init__(self, panel: Panel, left: float, top: float, name: str) -> None:
        self.panel, self.name = panel, name
        self.left, self.right = left + LEFT, left + WIDTH - RIGHT
        self.top, self.base = top + TOP, top + TOP + PLOT
        self.x_ticks, self.y_ticks = nice_ticks(*panel.x_range, 5), nice_ticks(*panel.y_range, 5)

    def x(self, value: float) -> float:
        return self.left + (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0]) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.base - (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0]) * (self.base - self.top)

    def parts(self) -> Iterator[str]:
        yield svg_text(self.left, self.top - 14, self.panel.title, "start", 14)
        for tick in self.y_ticks:
            yield svg_line(self.left, self.y(tick), self.right, self.y(tick), GRID, 1)
            yield svg_text(self.left - 6, self.y(tick) + 4, short(tick), "end")
        for tick in self.x_ticks:
            yield svg_line(self.x(tick), self.base, self.x(tick), self.base + 4, TEXT, 1)
            yield svg_text(self.x(tick), self.base + 18, short(tick), "middle")
        yield svg_text((self.left + self.right) / 2, self.base + 37, self.panel.x_label, "middle")
        x, y = self.left - 46, (self.top + self.base) / 2
        yield f'<g transform="rotate(-90 {x:.1f} {y:.1f})">{svg_text(x, y, self.panel.y_label, "middle")}</g>'
        size = f'width="{self.right - self.left:.1f}" height="{self.base - self.top + 12:.1f}"'
        yield f'<clipPath id="{self.name}"><rect x="{self.left:.1f}" y="{self.top - 6:.1f}" {size}/></clipPath>'
        yield f'<g clip-path="url(#{self.name})">'
        for curve in self.panel.curves:
            yield from self._curve(curve)
        yield "</g>"
        y = self.base + AXIS + LEGEND_GAP
        for row in _legend_rows(self.panel.curves):
            x = self.left
            for curve in row:
                yield from _key(curve, x, y)
                x += _key_width(curve)
            y += LEGEND_ROW

    def _curve(self, curve: Curve) -> Iterator[str]:
        points = [(self.x(x), self.y(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        if curve.errors is not None:
            for (at, _), y, error in zip(points, curve.y, curve.errors, strict=True):
                yield svg_line(at, self.y(y - error), at, self.y(y + error), curve.color, 1)
        if curve.dots:
            yield from (_dot(x, y, curve.color, curve.name) for x, y in points)
        else:
            way = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            dashes = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
            yield (
                f'<path d="M{way}" fill="none" stroke="{curve.color}" stroke-width="{curve.width}"{dashes}>'
                f"<title>{escape(curve.name)}</title></path>"
            )


def _dot(x: float, y: float, color: str, name: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"><title>{escape(name)}</title></circle>'


def _key_width(curve: Curve) -> float:
    return 44 + CHARACTER * len(curve.name)


def _key(curve: Curve, x: float, y: float) -> Iterator[str]:
    if curve.dots:
        yield _dot(x + 12, y - 4, curve.color, curve.name)
    else:
        yield svg_line(x, y - 4, x + 24, y - 4, curve.color, curve.width, curve.dash)
    yield svg_text(x + 30, y, curve.name, "start")


def _legend_rows(curves: Sequence[Curve]) -> Iterator[list[Curve]]:
    """Keys as many as fit in a row."""
    row: list[Curve] = []
    for curve in curves:
        if row and sum(map(_key_width, [*row, curve])) > WIDTH - LEFT:
            yield row
            row = []
        row.append(curve)
    if row:
        yield row


def _check(curve: Curve) -> None:
    columns = [curve.x, curve.y] + ([] if curve.errors is None else [curve.errors])
    if any(len(one) != len(two) for one, two in pairwise(columns)) or not len(curve.x):
        raise ValueError(f"curve {curve.name!r} has lists of lengths {[len(one) for one in columns]}")
    if not all(math.isfinite(value) for column in columns for value in column):
        raise ValueError(f"curve {curve.name!r} has a value that is not finite")
