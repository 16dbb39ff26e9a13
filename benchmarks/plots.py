"""Plots as inline SVG: nothing is loaded from anywhere, and text stays text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

COLOURS = ("#3465a4", "#c4531d", "#4e8f2f", "#8a4fa3", "#b28a00", "#1f8a8a")
LEFT, WIDTH, RIGHT, ROW = 300, 520, 130, 24  # pixels: names, plot, figures, height of a row
LINE = 16  # pixels from one line of text to the next


def brief(value: float) -> str:
    """Three digits or, from a hundred on, a whole number with its thousands apart."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in their order, close to those wanted (sorted) and at least `gap` apart, from `low`
    to `high`; below `low` if there is no room."""
    placed: list[float] = []
    for position in wanted:
        placed.append(max(position, placed[-1] + gap if placed else low))
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], high - gap * (len(placed) - 1 - index))
    return placed


def _svg(height: int, parts: Sequence[str], title: str) -> str:
    width = LEFT + WIDTH + RIGHT
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, True)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height}" '
        f'fill="{colour}"><title>{escape(title)}</title></rect>'
    )


def _axis(low: float, high: float, y: float, unit: str, left: int = LEFT) -> str:
    return (
        f'<line x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}" stroke="#888"/>'
        + _text(left, y + 15, brief(low))
        + _text(left + WIDTH, y + 15, f"{brief(high)} {unit}", "end")
    )


def stage_bars(stages_ms: Mapping[str, Mapping[str, float]]) -> str:
    """{name: {stage: ms}} → stacked bars, all on one scale, with a legend."""
    stages = list(dict.fromkeys(stage for parts in stages_ms.values() for stage in parts))
    longest = max(sum(parts.values()) for parts in stages_ms.values())
    svg = []
    for index, stage in enumerate(stages):
        at = LEFT + index * 130
        svg += [_rect(at, 4, 10, 10, COLOURS[index]), _text(at + 14, 13, stage.replace("_", " "))]
    for row, (name, parts) in enumerate(stages_ms.items(), start=1):
        x, y = float(LEFT), row * ROW
        svg.append(_text(LEFT - 8, y + 14, name, "end"))
        for stage, value in parts.items():
            width = WIDTH * value / longest
            colour = COLOURS[stages.index(stage)]
            svg.append(_rect(x, y + 3, width, ROW - 8, colour, f"{stage}: {brief(value)} ms"))
            x += width
        svg.append(_text(x + 6, y + 14, f"{brief(sum(parts.values()))} ms"))
    return _svg((len(stages_ms) + 1) * ROW + 4, svg, "time by stage")


def distributions(times_ms: Mapping[str, Sequence[float]]) -> str:
    """{name: raw times} → one strip of density per name on one logarithmic scale, p50 marked."""
    logs = {name: np.log(np.asarray(values, float)) for name, values in times_ms.items()}
    low = min(values.min() for values in logs.values()) - 0.02
    high = max(values.max() for values in logs.values()) + 0.02
    edges = np.linspace(low, high, 131)
    step = WIDTH / (len(edges) - 1)
    svg = []
    for row, (name, values) in enumerate(logs.items()):
        base = (row + 1) * ROW
        counts = np.histogram(values, edges)[0]
        svg.append(_text(LEFT - 8, base - 6, name, "end"))
        for index in np.flatnonzero(counts):
            tall = 2 + (ROW - 6) * counts[index] / counts.max()
            svg.append(_rect(LEFT + index * step, base - tall, step, round(tall, 1), COLOURS[0]))
        x = LEFT + WIDTH * (np.median(values) - low) / (high - low)
        svg.append(_rect(x - 1, base - ROW + 3, 2, ROW - 3, COLOURS[1], "median"))
        svg.append(_text(LEFT + WIDTH + 6, base - 6, f"p50 {brief(np.exp(np.median(values)))} ms"))
    y = len(logs) * ROW + 4
    svg.append(_axis(np.exp(low), np.exp(high), y, "ms, logarithmic"))
    return _svg(y + 22, svg, "distribution of times")


def scatter(points: Sequence[tuple[str, float, float]], across: str, up: str) -> str:
    """(name, x > 0, y) → a plot with a logarithmic x axis. Names stand in a column on the right, in
    the points' order from above, each in the colour of its point and joined to it."""
    left, height = 110, max(260, LINE * len(points) + 10)
    points = sorted(points, key=lambda point: (-point[2], point[1]))
    x = np.log([point[1] for point in points])
    y = np.array([point[2] for point in points])
    x0, x1, y0, y1 = x.min() - 0.1, x.max() + 0.1, y.min() - 0.02, y.max() + 0.02
    across_px = left + WIDTH * (x - x0) / (x1 - x0)
    down_px = height - (height - 10) * (y - y0) / (y1 - y0)
    svg = [_axis(np.exp(x0), np.exp(x1), height, f"{across}, logarithmic", left)]
    svg.append(f'<line x1="{left}" x2="{left}" y1="10" y2="{height}" stroke="#888"/>')
    svg += [
        _text(left - 8, 18, f"{up} {y1:.3f}", "end"),
        _text(left - 8, height, f"{y0:.3f}", "end"),
    ]
    column = left + WIDTH + 30
    lines = spread(down_px.tolist(), LINE, 10, height - 4)
    for index, (name, px, py, line) in enumerate(
        zip((point[0] for point in points), across_px, down_px, lines, strict=True)
    ):
        colour = COLOURS[index % len(COLOURS)]
        svg.append(
            f'<path d="M{px:.1f} {py:.1f}H{column - 22}L{column} {line:.1f}" fill="none" '
            f'stroke="{colour}" stroke-opacity=".5"/>'
        )
        for at, down in ((px, py), (column, line)):
            svg.append(f'<circle cx="{at:.1f}" cy="{down:.1f}" r="5" fill="{colour}"/>')
        svg.append(_text(column + 9, line + 4, name))
    return _svg(height + 22, svg, f"{up} against {across}")
