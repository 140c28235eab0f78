"""Pieces of stand-alone SVG pictures.

A page that shows a picture file may be light or dark, and the file does not learn which: text and lines have a contrast
of at least 3 on white and on #0d1117, and the grid is faint on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

DOT, MEAN, BEFORE, TEXT, GRID = "#2a78d6", "#c2410c", "#858b94", "#737a84", "#8a8f984d"


def svg_page(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """The whole file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}" font-family="sans-serif">{"".join(parts)}</svg>\n'
    )


def svg_text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    """A text at a point; ``anchor`` is start, middle or end."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{TEXT}">{escape(text)}</text>'
    )


def svg_line(x1: float, y1: float, x2: float, y2: float, color: str, width: int, dash: str = "") -> str:
    """A straight line."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}"{dashes}/>'
