"""Plots as inline SVG: nothing is loaded from anywhere, and text stays text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

COLOURS = ("#3465a4", "#c4531d", "#4e8f2f", "#8a4fa3", "#b28a00", "#1f8a8a")
LEFT, WIDTH, RIGHT, ROW = 300, 520, 130, 24  # pixels: names, plot, figures, height of a row


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


def _axis(low: float, high: float, y: float, unit: str) -> str:
    return (
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#888"/>'
        + _text(LEFT, y + 15, f"{low:.3g}")
        + _text(LEFT + WIDTH, y + 15, f"{high:.3g} {unit}", "end")
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
            svg.append(_rect(x, y + 3, width, ROW - 8, colour, f"{stage}: {value:.3g} ms"))
            x += width
        svg.append(_text(x + 6, y + 14, f"{sum(parts.values()):.3g} ms"))
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
        svg.append(_text(LEFT + WIDTH + 6, base - 6, f"p50 {np.exp(np.median(values)):.3g} ms"))
    y = len(logs) * ROW + 4
    svg.append(_axis(np.exp(low), np.exp(high), y, "ms, logarithmic"))
    return _svg(y + 22, svg, "distribution of times")


def scatter(points: Sequence[tuple[str, float, float]], across: str, up: str) -> str:
    """(name, x > 0, y) → a plot with a logarithmic x axis; every point is named beside it."""
    height = 260
    x = np.log([point[1] for point in points])
    y = np.array([point[2] for point in points])
    x0, x1, y0, y1 = x.min() - 0.1, x.max() + 0.1, y.min() - 0.02, y.max() + 0.02
    svg = [_axis(np.exp(x0), np.exp(x1), height, f"{across}, logarithmic")]
    svg.append(f'<line x1="{LEFT}" x2="{LEFT}" y1="10" y2="{height}" stroke="#888"/>')
    svg += [
        _text(LEFT - 8, 18, f"{up} {y1:.3f}", "end"),
        _text(LEFT - 8, height, f"{y0:.3f}", "end"),
    ]
    for index, (name, _, value) in enumerate(points):
        px = LEFT + WIDTH * (x[index] - x0) / (x1 - x0)
        py = height - (height - 10) * (value - y0) / (y1 - y0)
        colour = COLOURS[index % len(COLOURS)]
        svg.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour}"/>')
        on_right = px < LEFT + WIDTH / 2
        svg.append(
            _text(px + (9 if on_right else -9), py + 4, name, "start" if on_right else "end")
        )
    return _svg(height + 22, svg, f"{up} against {across}")
