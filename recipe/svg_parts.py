"""Pieces of stand-alone SVG pictures; the colours read on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

DOT, MEAN, BEFORE, TEXT, GRID = "#2a78d6", "#0b3d78", "#8a8f98", "#57606a", "#d0d7de"


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
