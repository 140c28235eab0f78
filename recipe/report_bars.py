"""Grouped bars as inline SVG, on the frame of the other charts."""

from __future__ import annotations

from collections.abc import Sequence

from recipe.report_charts import HEIGHT, WIDTH, Chart, Format, Frame, Series, short, span

ROOM = 0.16  # of a group's width stays free at each side


def grouped_bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
    *,
    fmt: Format = short,
    y_label: str = "",
    x_label: str = "",
    help: str = "",
) -> Chart | None:
    """One bar for each series in each group, from 0; None where there is no value. A series' values go by group."""
    reach = span([value for one in series for value in one.values], (0.0,))
    if reach is None:
        return None
    frame = Frame(range(len(groups)), *reach, fmt, y_label, WIDTH, HEIGHT, x_label)
    frame.grid(x_labels=list(enumerate(groups)))
    zero = frame.y(0.0)
    for place, name in enumerate(groups):
        left, right = frame.edges(place)
        room = (right - left) * ROOM
        width = (right - left - 2 * room) / len(series)
        texts = []
        for index, one in enumerate(series):
            value = one.values[place]
            if value is None:
                continue
            top = frame.y(value)
            frame.parts.append(
                f'<rect class="f{one.color}" x="{left + room + index * width + 0.5:.1f}" y="{min(top, zero):.1f}" '
                f'width="{max(width - 1, 0.5):.1f}" height="{max(abs(zero - top), 0.5):.1f}"/>'
            )
            texts.append(f"{one.name} {fmt(value)}")
        if texts:
            frame.hover(place, f"{name}: " + ", ".join(texts))
    return Chart(title, frame.svg(title), [(one.name, f"k{one.color}") for one in series], help)
