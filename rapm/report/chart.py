"""A few series over the iterations as one inline SVG: no script, no fonts, colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 210  # a column of a page, and about a telephone, so that the text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
MOST = 400  # points a line: more than there are pixels
FEW = 16  # points up to which each is a dot
SMOOTH = 60  # points from which a line is also drawn smoothed, over a 15th of them

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Chart:
    """A title, what it shows, its figures with their names, and a level worth a line."""

    title: str
    text: str
    figures: dict[str, str]
    level: float | None = None
    log: bool = False


def svg(chart: Chart, series: Mapping[str, Points], mark: int | None = None) -> str:
    """The chart as a <figure>; `mark` is an iteration worth a vertical line. Figures without points are left out."""
    lines = {name: _thin(series[figure]) for figure, name in chart.figures.items() if figure in series}
    if chart.log:
        lines = {name: [(x, math.log10(y)) for x, y in points if y > 0] for name, points in lines.items()}
    values = [y for points in lines.values() for _, y in points] or [0.0]
    if chart.level is not None:
        values.append(chart.level)
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - pad if low < 0 or low - pad > 0 or chart.log else 0.0, high + pad
    end = max((points[-1][0] for points in lines.values() if points), default=1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / end
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts = []
    for value in _ticks(low, high, 6):
        y = place(0, value)[1]
        label = f"{10**value:.2g}" if chart.log else f"{value:.4g}"
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="var(--grid)"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in _ticks(0, end, 5):
        label = f"{value / 1000:g}k" if end >= 10_000 else f"{value:g}"
        parts.append(f'<text x="{place(value, 0)[0]:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{label}</text>')
    if chart.level is not None:
        y = place(0, chart.level)[1]
        dashes = 'stroke="var(--soft)" stroke-dasharray="3 4"'
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" {dashes}/>')
    if mark is not None:
        x = place(mark, 0)[0]
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="var(--c2)" stroke-dasharray="2 3"/>')
        parts.append(f'<text x="{x - 4:.1f}" y="{TOP + 10}" text-anchor="end">best</text>')
    for i, points in enumerate(lines.values()):
        parts.append(_line([place(x, y) for x, y in points], i, len(points) >= SMOOTH))
    names = "".join(f'<span><i style="background:var(--c{i % 4})"></i>{escape(n)}</span>' for i, n in enumerate(lines))
    legend = f'<div class="legend">{names}</div>' if len(lines) > 1 else ""
    text = f"<p>{escape(chart.text)}</p>" if chart.text else ""
    return (
        f'<figure data-figures="{escape(" ".join(chart.figures))}"><figcaption>{escape(chart.title)}</figcaption>{text}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'
        f"{legend}</figure>"
    )


def _line(points: list[tuple[float, float]], colour: int, smooth: bool) -> str:
    style = f'fill="none" stroke="var(--c{colour % 4})" stroke-linejoin="round"'
    if not smooth:
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="var(--c{colour % 4})"/>' for x, y in points)
        return f'<path d="{_path(points)}" {style} stroke-width="1.8"/>{dots if len(points) <= FEW else ""}'
    reach = len(points) // 30
    means = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        means.append((x, sum(near) / len(near)))
    faint = f'<path d="{_path(points)}" {style} stroke-width="1" opacity=".28"/>'
    return faint + f'<path d="{_path(means)}" {style} stroke-width="2"/>'


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _thin(points: Points) -> list[tuple[int, float]]:
    """At most MOST points, each the mean of its neighbours at the last one's iteration."""
    size = -(-len(points) // MOST)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers from low to high."""
    raw = (high - low) / most
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]
