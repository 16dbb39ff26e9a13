"""Plots as inline SVG: nothing is loaded from anywhere, and text stays text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW = 10.0, 0.3  # inches: of a plot, and of each of its rows


def brief(value: float) -> str:
    """Three digits or, from a hundred on, a whole number with its thousands apart."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _axes(rows: int, title: str, across: str) -> Axes:
    """Empty axes with room for so many rows; `_svg` ends them."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(WIDTH, 1.2 + ROW * rows), layout="constrained").add_subplot()
    axes.set(title=title, xlabel=across)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _svg(axes: Axes) -> str:
    """The finished plot, equal for equal figures."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text, figure = StringIO(), axes.figure
    assert isinstance(figure, Figure)
    unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": axes.get_title()}):
        figure.savefig(text, format="svg", metadata=unnamed)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center")


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: brief(value)))
    axes.xaxis.set_minor_formatter("")


def stage_bars(stages_ms: Mapping[str, Mapping[str, float]]) -> str:
    """{name: {stage: ms}} → stacked bars, all on one scale, with a legend."""
    axes = _axes(len(stages_ms), "time by stage", "ms")
    names = list(stages_ms)
    ends = np.zeros(len(names))
    for stage in dict.fromkeys(stage for parts in stages_ms.values() for stage in parts):
        values = np.array([parts.get(stage, 0.0) for parts in stages_ms.values()])
        axes.barh(names, values, left=ends, label=stage.replace("_", " "))
        ends += values
    for row, end in enumerate(ends):
        _beside(axes, end, row, f"{brief(end)} ms")
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.08, 0.5), frameon=False)
    return _svg(axes)


def distributions(times_ms: Mapping[str, Sequence[float]]) -> str:
    """{name: raw times} → one box per name on one logarithmic scale: quartiles, the median (also in
    figures), whiskers to the 1st and 99th percentile, and as points what lies beyond."""
    axes = _axes(len(times_ms), "distribution of times", "ms, logarithmic")
    values = list(times_ms.values())
    axes.boxplot(values, orientation="horizontal", whis=(1, 99), sym=".", widths=0.6)
    axes.set_yticks(range(1, len(values) + 1), list(times_ms))
    for row, times in enumerate(values, start=1):
        _beside(axes, max(times), row, f"p50 {brief(float(np.median(times)))} ms")
    axes.invert_yaxis()
    _log_scale(axes)
    return _svg(axes)


def scatter(points: Sequence[tuple[str, float, float]], across: str, up: str) -> str:
    """(name, x > 0, y) → a plot with a logarithmic x axis. A number stands at each point, and the
    legend gives its name."""
    axes = _axes(max(10, len(points)), f"{up} by {across}", f"{across}, logarithmic")
    axes.set_ylabel(up)
    for number, (name, x, y) in enumerate(points, start=1):
        axes.plot(x, y, marker=f"${number}$", markersize=9, linestyle="", label=name)
    _log_scale(axes)
    axes.margins(0.1)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return _svg(axes)
