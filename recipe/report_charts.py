"""Charts as inline SVG: lines with bands, stacked bars, a heat map.

Colours come from the page's CSS, so that they follow dark mode. Everything a chart shows is escaped here. Hover texts
are SVG titles on one strip per step, which need no script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 384, 200
WIDE = 1180  # about the pixels a chart gets on a laptop, so that all text comes out at its own size
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MAX_POINTS = 400  # more steps than this are averaged in equal stretches, to bound the size of the page

Values = Sequence[float | None]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One curve: a value or None for each step; ``low`` and ``high`` draw a band around it."""

    name: str
    values: Values
    color: int = 0
    low: Values | None = None
    high: Values | None = None
    markers: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page: its drawing, and its legend as (name, colour) pairs."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]] = field(default_factory=list)
    help: str = ""
    wide: bool = False


def short(value: float) -> str:
    """A number for an axis or a hover text."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e5 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f}".rstrip("0").rstrip(".") + "%"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span low to high, about ``count`` intervals."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * 0.999), 10 * power)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [round(index * unit, 12) for index in range(first, last + 1)]


def step_ticks(steps: Sequence[int], count: int = 6) -> list[int]:
    """Whole steps at round distances, inside the range of the data."""
    if len(steps) < 2:
        return list(steps)
    span = steps[-1] - steps[0]
    rough = max(1, span / count)
    power = 10 ** math.floor(math.log10(rough))
    unit = max(1, next(int(f * power) for f in (1, 2, 5, 10) if f * power >= rough * 0.999))
    return [step for step in range(-(-steps[0] // unit) * unit, steps[-1] + 1, unit)]


def thin(
    steps: Sequence[int], columns: Sequence[Values], limit: int = MAX_POINTS
) -> tuple[list[int], list[Values], int]:
    """At most ``limit`` points: means over equal stretches. Returns steps, columns and the steps in a point."""
    size = math.ceil(len(steps) / limit) if steps else 1
    if size <= 1:
        return list(steps), list(columns), 1
    starts = range(0, len(steps), size)

    def mean(values: Values) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return (
        [steps[min(start + size, len(steps)) - 1] for start in starts],
        [[mean(column[start : start + size]) for start in starts] for column in columns],
        size,
    )


class Frame:
    """Maps data to the drawing and draws what all charts share: grid, axes, labels, hover strips."""

    def __init__(
        self,
        steps: Sequence[int],
        low: float,
        high: float,
        fmt: Format,
        y_label: str,
        width: int,
        height: int,
        x_label: str = "step",
    ) -> None:
        self.steps, self.fmt, self.y_label, self.x_label = steps, fmt, y_label, x_label
        self.width, self.height = width, height
        self.ticks = nice_ticks(low, high)
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])
        self.parts: list[str] = []
        # Half a step of room at both ends, so that bars and hover strips of the first and last step are whole.
        self.first, self.last = steps[0] - 0.5, steps[-1] + 0.5

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def edges(self, index: int) -> tuple[float, float]:
        """Left and right border of a step's strip: half way to its neighbours."""
        step = self.steps[index]
        left = self.first if index == 0 else (self.steps[index - 1] + step) / 2
        right = self.last if index == len(self.steps) - 1 else (step + self.steps[index + 1]) / 2
        return self.x(left), self.x(right)

    def grid(
        self,
        labels: Sequence[tuple[float, str]] | None = None,
        lines: bool = True,
        x_labels: Sequence[tuple[float, str]] | None = None,
    ) -> None:
        """Lines and labels of the axes; ``labels`` and ``x_labels`` are (place, text) in place of round numbers."""
        for value, text in labels if labels is not None else [(tick, self.fmt(tick)) for tick in self.ticks]:
            height = self.y(value)
            if lines:
                css = "zero" if value == 0 and self.low < 0 else "grid"
                self.parts.append(
                    f'<line class="{css}" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
                )
            self.parts.append(
                f'<text class="tick" x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{text}</text>'
            )
        base = self.height - BOTTOM
        self.parts.append(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{base}" y2="{base}"/>')
        for place, text in x_labels if x_labels is not None else [(one, str(one)) for one in step_ticks(self.steps)]:
            at = self.x(place)
            self.parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 4}"/>')
            self.parts.append(
                f'<text class="tick" x="{at:.1f}" y="{base + 15}" text-anchor="middle">{escape(text)}</text>'
            )
        middle = (LEFT + self.width - RIGHT) / 2
        self.parts.append(
            f'<text class="label" x="{middle:.0f}" y="{self.height - 4}" text-anchor="middle">'
            f"{escape(self.x_label)}</text>"
        )
        if self.y_label:
            center = (TOP + base) / 2
            self.parts.append(
                f'<text class="label" transform="translate(9 {center:.0f}) rotate(-90)" text-anchor="middle">'
                f"{escape(self.y_label)}</text>"
            )

    def hover(self, index: int, text: str) -> None:
        left, right = self.edges(index)
        self.parts.append(
            f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.5):.1f}" '
            f'height="{self.height - TOP - BOTTOM}"><title>{escape(text)}</title></rect>'
        )

    def svg(self, title: str) -> Markup:
        body = "".join(self.parts)
        return Markup(
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}">'
            f"{body}</svg>"
        )


def span(values: Sequence[float | None], include: Sequence[float]) -> tuple[float, float] | None:
    """Smallest and largest of the values and of those to include; None where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    known += include
    return min(known), max(known)


def _path(frame: Frame, values: Values, bridge: bool) -> str:
    """The curve; where a value is missing it breaks, or is bridged for metrics that are measured only now and then."""
    commands, pen_down = [], False
    for step, value in zip(frame.steps, values, strict=True):
        if value is None:
            pen_down = pen_down and bridge
            continue
        commands.append(f"{'L' if pen_down else 'M'}{frame.x(step):.1f} {frame.y(value):.1f}")
        pen_down = True
    return "".join(commands)


def _band(frame: Frame, low: Values, high: Values) -> str:
    points = [(s, a, b) for s, a, b in zip(frame.steps, low, high, strict=True) if a is not None and b is not None]
    if len(points) < 2:
        return ""
    forth = " ".join(f"{frame.x(s):.1f},{frame.y(b):.1f}" for s, _, b in points)
    back = " ".join(f"{frame.x(s):.1f},{frame.y(a):.1f}" for s, a, _ in reversed(points))
    return f"{forth} {back}"


def line_chart(
    title: str,
    steps: Sequence[int],
    series: Sequence[Series],
    *,
    fmt: Format = short,
    y_label: str = "",
    x_label: str = "step",
    include: Sequence[float] = (),
    help: str = "",
) -> Chart | None:
    """Curves over steps; None where no series has a value. ``include`` lists values the axis must reach."""
    columns: list[Values] = [
        column for one in series for column in (one.values, one.low, one.high) if column is not None
    ]
    steps, thinned, stretch = thin(steps, columns)
    queue = iter(thinned)
    series = [
        Series(
            name=one.name,
            values=next(queue),
            color=one.color,
            low=None if one.low is None else next(queue),
            high=None if one.high is None else next(queue),
            markers=one.markers,
            dashed=one.dashed,
        )
        for one in series
    ]
    reach = span([value for column in thinned for value in column], include)
    if reach is None:
        return None
    frame = Frame(steps, *reach, fmt, y_label, WIDTH, HEIGHT, x_label)
    frame.grid()
    for one in series:
        if one.low is not None and one.high is not None and (points := _band(frame, one.low, one.high)):
            frame.parts.append(f'<polygon class="band f{one.color}" points="{points}"/>')
    for one in series:
        css = f"line s{one.color}" + (" dashed" if one.dashed else "")
        frame.parts.append(f'<path class="{css}" d="{_path(frame, one.values, bridge=one.markers)}"/>')
        lonely = sum(value is not None for value in one.values) < 3
        for step, value in zip(steps, one.values, strict=True):
            if value is not None and (one.markers or lonely):
                frame.parts.append(
                    f'<circle class="f{one.color}" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="3"/>'
                )
    for index in range(len(steps)):
        texts = [
            f"{one.name} {fmt(value)}" + _band_text(one, index, fmt)
            for one in series
            if (value := one.values[index]) is not None
        ]
        if texts:
            place = _step_text(steps[index], stretch) if x_label == "step" else f"{x_label} {steps[index]}"
            frame.hover(index, f"{place}: " + ", ".join(texts))
    legend = [(one.name, f"k{one.color}") for one in series if len(series) > 1]
    return Chart(title, frame.svg(title), legend, _help(help, stretch))


def _band_text(one: Series, index: int, fmt: Format) -> str:
    low = one.low[index] if one.low is not None else None
    high = one.high[index] if one.high is not None else None
    return "" if low is None or high is None else f" ({fmt(low)} to {fmt(high)})"


def stacked_chart(
    title: str, steps: Sequence[int], series: Sequence[Series], *, y_label: str = "", help: str = ""
) -> Chart | None:
    """Stacked bars, one a step; None where no series has a value above 0."""
    steps, columns, stretch = thin(steps, [one.values for one in series])
    totals = [sum(column[index] or 0 for column in columns) for index in range(len(steps))]
    if not totals or max(totals) <= 0:
        return None
    frame = Frame(steps, 0, max(totals), short, y_label, WIDE, HEIGHT)
    frame.grid()
    for index, step in enumerate(steps):
        left, right = frame.edges(index)
        gap = min(1.0, (right - left) * 0.15)
        base, texts = 0.0, []
        for one, column in zip(series, columns, strict=True):
            value = column[index]
            if not value:
                continue
            top, bottom = frame.y(base + value), frame.y(base)
            frame.parts.append(
                f'<rect class="f{one.color}" x="{left + gap / 2:.2f}" y="{top:.2f}" '
                f'width="{right - left - gap:.2f}" height="{bottom - top:.2f}"/>'
            )
            base += value
            texts.append(f"{one.name} {value:.1f} s")
        if texts:
            frame.hover(index, f"{_step_text(step, stretch)}: {base:.1f} s = " + " + ".join(texts))
    return Chart(
        title, frame.svg(title), [(one.name, f"k{one.color}") for one in series], _help(help, stretch), wide=True
    )


def heat_map(
    title: str, steps: Sequence[int], counts: Sequence[Sequence[float] | None], *, help: str = ""
) -> Chart | None:
    """The pass-rate histogram over time: a column a step, a row for each number of successes."""
    known = [one for one in counts if one and sum(one) > 0]
    if not known:
        return None
    rows = max(len(one) for one in known)
    columns = [[one[row] if one and row < len(one) else None for one in counts] for row in range(rows)]
    steps, columns, stretch = thin(steps, columns)
    frame = Frame(steps, -0.5, rows - 0.5, short, "successes", WIDE, 230)
    frame.low, frame.high = -0.5, rows - 0.5
    every = max(1, math.ceil(rows / 9))
    frame.grid([(row, str(row)) for row in range(0, rows, every)], lines=False)
    # The shade is relative to the largest share that occurs, or a run whose questions spread out would be all pale.
    shares = [_shares([column[index] for column in columns]) for index in range(len(steps))]
    largest = max(share for one in shares for share in one)
    for index, step in enumerate(steps):
        left, right = frame.edges(index)
        gap = min(1.0, (right - left) * 0.1)
        total = sum(column[index] or 0 for column in columns)
        if not total:
            continue
        for row, share in enumerate(shares[index]):
            top, bottom = frame.y(row + 0.5), frame.y(row - 0.5)
            count = columns[row][index] or 0
            text = (
                f"{_step_text(step, stretch)}: {short(count)} of {short(total)} questions ({percent(share)}) "
                f"with {row} of {rows - 1} successes"
            )
            opacity = 0.04 + 0.96 * (share / largest) ** 0.7 if share else 0.03
            frame.parts.append(
                f'<rect class="cell" x="{left + gap / 2:.2f}" y="{top + 0.5:.2f}" width="{right - left - gap:.2f}" '
                f'height="{bottom - top - 1:.2f}" fill-opacity="{opacity:.2f}"><title>{escape(text)}</title></rect>'
            )
    legend = [("no question", "h0"), ("", "h1"), ("", "h2"), (f"{percent(largest)} of the questions", "h3")]
    return Chart(title, frame.svg(title), legend, _help(help, stretch), wide=True)


def _shares(counts: Values) -> list[float]:
    total = sum(count or 0 for count in counts)
    return [(count or 0) / total if total else 0.0 for count in counts]


def _step_text(step: int, stretch: int) -> str:
    return f"step {step}" if stretch == 1 else f"{stretch} steps to {step}"


def _help(text: str, stretch: int) -> str:
    return text if stretch == 1 else f"{text} Each point is the mean of {stretch} steps.".strip()
