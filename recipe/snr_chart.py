"""SNR² by pass rate as a picture, a page and a table: ``snr.html``, ``snr.json`` and the lines for the terminal."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from recipe.console_format import MISSING
from recipe.paced_theory import optimal_weight
from recipe.pages import page_environment
from recipe.report import SCRIPT
from recipe.report_charts import WIDE, Chart, nice_ticks, short
from recipe.snr_statistics import EXACT, SnrBin, SnrReport
from verl_ext.atomic import write_atomically
from verl_ext.weighting import beta_kernel

TEMPLATE = Path(__file__).with_name("snr.html.j2")
HEIGHT = 430
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 66
INSET = 26  # room beside p = 0 and 1, so that their marks and labels are whole
# Closer together at the ends, where a small exponent makes a curve steep.
RATES = (1 - torch.linspace(0, torch.pi, 241, dtype=torch.float64).cos()) / 2
# A bin of few questions can have an interval many times the maximum; drawing it whole would flatten all else.
HIGHEST = 2.0
LABEL_ROOM = 44  # pixels that "n 1234" takes

COLUMNS = ("pass rates", "p", "n", "SNR²", "± se", "interval", "/ max", "w*")
EXPLANATION = (
    "SNR² = max(|mean g|² − tr S / n, 0) / tr S over the gradients g of a bin's n questions, with their sample "
    "covariance S; se and interval by bootstrap over questions; w* = SNR² / (1 + SNR²), the optimal weight of one "
    "question. Pass rates from few rollouts blur the bins: the curve and its exponents come out flatter than they are."
)


def write_snr_report(report: SnrReport, folder: Path) -> Path:
    """Write ``snr.json`` and ``snr.html`` into the folder, each in one step; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "snr.json", text + "\n")
    page = folder / "snr.html"
    write_atomically(page, render(report))
    return page


def table(report: SnrReport) -> str:
    """The bins as aligned plain text, then the exponents and the verdict."""
    rows = [COLUMNS, *_rows(report)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"exponents: {_fit_text(report)}", report.verdict.sentence])


def render(report: SnrReport) -> str:
    """The page as text, self-contained, in the style of the training report."""
    environment = page_environment()
    sentence = report.verdict.sentence
    facts = [("Exponents", _fit_text(report))]
    facts += [(name, _setting_text(value)) for name, value in report.settings.items() if value is not None]
    return environment.get_template(TEMPLATE.name).render(
        verdict=sentence[:1].upper() + sentence[1:] + ".",
        facts=facts,
        chart=snr_chart(report),
        columns=COLUMNS,
        rows=_rows(report),
        explanation=EXPLANATION,
        script=Markup(SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def snr_chart(report: SnrReport) -> Chart | None:
    """SNR² by pass rate over its maximum, with intervals, the fitted kernel and p(1-p); None where no bin has signal.

    The fit is divided by the same maximum as the bins, so that it goes through them also where the highest bin is a
    chance peak; p(1-p) is scaled to a maximum of 1.
    """
    largest = _largest(report)
    if largest is None:
        return None
    drawn = [one for one in report.bins if math.isfinite(one.snr2)]
    tops = [(one.high if math.isfinite(one.high) else one.snr2) / largest for one in drawn]
    highest = max(1.0, *tops)
    axes = _Axes(nice_ticks(0.0, min(highest, HIGHEST), 5))
    legend = [("measured", "k0")]
    default = beta_kernel(RATES, alpha=1.0, beta=1.0)
    curves = [axes.curve(RATES, default / default.max(), "line s7 dashed")]
    if report.fit is not None:
        alpha, beta = report.fit.alpha, report.fit.beta
        centres = [one.centre for one in drawn]
        rates = RATES[(RATES >= min(centres)) & (RATES <= max(centres))]
        fitted = report.fit.scale * beta_kernel(rates, alpha=alpha, beta=beta) / largest
        curves.append(axes.curve(rates, fitted, "line s1"))
        legend.append((f"fitted p^{alpha:.2f} (1−p)^{beta:.2f}", "k1"))
    legend.append(("PACED's default p (1−p)", "k7"))
    if not all(math.isfinite(one.se) for one in drawn):
        legend.append(("too few questions for an interval", "k6"))
    marks = [part for one in drawn for part in axes.mark(one, largest)]
    help = "The fit is drawn as fitted, p (1−p) with a maximum of 1. "
    help += f"Bars: {100 * report.settings['confidence']:g} % interval of a bin"
    help += f"; what exceeds {HIGHEST:g} is cut." if highest > HIGHEST else "."
    title = f"SNR² divided by its maximum, {short(largest)}"
    strips = axes.strips(drawn, [_hover_text(one, largest) for one in drawn])
    body = "".join([*axes.grid(), *curves, *marks, *axes.counts(drawn), *strips])
    svg = Markup(
        f'<svg class="chart" viewBox="0 0 {WIDE} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    )
    return Chart(title, svg, legend, help, wide=True)


class _Axes:
    """Maps pass rate and relative SNR² to the drawing, and draws the parts of the chart."""

    def __init__(self, ticks: Sequence[float]) -> None:
        self.ticks, self.highest = ticks, ticks[-1]
        self.base = HEIGHT - BOTTOM

    def x(self, rate: float) -> float:
        return LEFT + INSET + rate * (WIDE - LEFT - RIGHT - 2 * INSET)

    def y(self, value: float) -> float:
        return self.base - min(value, self.highest) / self.highest * (self.base - TOP)

    def grid(self) -> list[str]:
        right, middle, center = WIDE - RIGHT, (LEFT + WIDE - RIGHT) / 2, (TOP + self.base) / 2
        parts = []
        for tick in self.ticks:
            at = self.y(tick)
            css = "grid" if tick else "axis"
            parts.append(f'<line class="{css}" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
        for tenth in range(11):
            at = self.x(tenth / 10)
            parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{self.base}" y2="{self.base + 4}"/>')
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{self.base + 16}" text-anchor="middle">{short(tenth / 10)}</text>'
            )
        parts.append(
            f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">pass rate p of the bin</text>'
        )
        parts.append(
            f'<text class="label" transform="translate(12 {center:.0f}) rotate(-90)" text-anchor="middle">'
            "SNR² / maximum</text>"
        )
        return parts

    def curve(self, rates: Tensor, values: Tensor, css: str) -> str:
        points = zip(rates.tolist(), values.tolist(), strict=True)
        return f'<path class="{css}" d="M{" L".join(f"{self.x(p):.1f} {self.y(value):.1f}" for p, value in points)}"/>'

    def mark(self, one: SnrBin, largest: float) -> list[str]:
        """A point with its interval; what is above the highest tick is cut."""
        at, value = self.x(one.centre), one.snr2 / largest
        color = 0 if math.isfinite(one.se) else 6
        parts = []
        if math.isfinite(one.se):
            low, high = self.y(one.low / largest), self.y(one.high / largest)
            parts.append(f'<line class="line s0" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
            for end, height in ((one.low, low), (one.high, high)):
                if end / largest <= self.highest:
                    parts.append(
                        f'<line class="line s0" x1="{at - 5:.1f}" x2="{at + 5:.1f}" '
                        f'y1="{height:.1f}" y2="{height:.1f}"/>'
                    )
        if value <= self.highest:
            parts.append(f'<circle class="f{color}" cx="{at:.1f}" cy="{self.y(value):.1f}" r="4.5"/>')
        return parts

    def counts(self, bins: Sequence[SnrBin]) -> list[str]:
        """n under each bin, as far as there is room."""
        parts, free = [], -math.inf
        for one in bins:
            at = self.x(one.centre)
            if at >= free:
                free = at + LABEL_ROOM
                parts.append(
                    f'<text class="tick" x="{at:.1f}" y="{self.base + 33}" text-anchor="middle">n {one.n}</text>'
                )
        return parts

    def strips(self, bins: Sequence[SnrBin], texts: Sequence[str]) -> list[str]:
        """Hover strips from half way to half way between bins."""
        centres = [self.x(one.centre) for one in bins]
        inner = [(left + right) / 2 for left, right in pairwise(centres)]
        borders = [LEFT, *inner, WIDE - RIGHT]
        return [
            f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{self.base - TOP}">'
            f"<title>{escape(text)}</title></rect>"
            for (left, right), text in zip(pairwise(borders), texts, strict=True)
        ]


def _hover_text(one: SnrBin, largest: float) -> str:
    spread = f" ({short(one.low)} to {short(one.high)})" if math.isfinite(one.low) else ""
    return f"p {one.centre:.3g}: SNR² {short(one.snr2)}{spread}, {one.snr2 / largest:.2f} of the maximum, n {one.n}"


def _largest(report: SnrReport) -> float | None:
    """The SNR² to divide by; None without any signal.

    It is the largest of the bins with an interval, for a bin of two or three questions may have any value; of all bins
    where none has one.
    """
    measured = [one for one in report.bins if math.isfinite(one.snr2)]
    reliable = [one for one in measured if math.isfinite(one.se)]
    return max((one.snr2 for one in reliable or measured), default=0.0) or None


def _rows(report: SnrReport) -> list[tuple[str, ...]]:
    """The bins as cells under ``COLUMNS``."""
    largest = _largest(report)
    exact = report.settings["bins"] == EXACT
    rows = []
    for index, one in enumerate(report.bins):
        close = "]" if index == len(report.bins) - 1 else ")"
        measured = math.isfinite(one.snr2)
        rows.append(
            (
                f"{index}/{report.settings['samples']}" if exact else f"[{one.lower:.3g}, {one.upper:.3g}{close}",
                f"{one.centre:.3f}" if one.n else MISSING,
                str(one.n),
                _figure(one.snr2),
                _figure(one.se),
                f"{_figure(one.low)} … {_figure(one.high)}" if math.isfinite(one.se) else MISSING,
                f"{one.snr2 / largest:.2f}" if measured and largest else MISSING,
                _figure(optimal_weight(one.snr2)) if measured else MISSING,
            )
        )
    return rows


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else MISSING


def _setting_text(value: Any) -> str:
    """A setting for people: a block as its names and values."""
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{name} {_setting_text(part)}" for name, part in value.items() if part is not None)


def _fit_text(report: SnrReport) -> str:
    return f"none, {report.no_fit}" if report.fit is None else str(report.fit)
