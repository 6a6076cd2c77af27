"""One look for all figures: colours that read on light and dark, and an empty figure.

Text, grid and background colours are left to the page, which sets them for its light and its dark
face; traces use the colours below, which stand out from both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

BLUE, ORANGE, GREEN, RED = "#3f86c8", "#e08a2e", "#2f9e6e", "#d1505c"
PURPLE, TEAL, GREY = "#9270c4", "#2b9fb0", "#8b9098"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, "#b0894f", "#c765a5", "#7f9f3f", "#5c6ac4")
TALL = 460  # pixels of the figures that matter most
DENSITY = [[0.0, "rgba(63,134,200,0.0)"], [0.02, "rgba(63,134,200,0.15)"], [1.0, BLUE]]
COLD_TO_HOT = [[0.0, GREEN], [0.5, "#d9b23c"], [1.0, RED]]


def empty_figure(x: str, y: str, *, height: int = 400, legend: bool = True) -> Any:
    """A figure with its axes named and nothing in it.

    Args:
        x, y: titles of the axes.
        height: pixels.
        legend: whether there is one, below the axes.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 62, "r": 16, "t": 16, "b": 56},
        font={"size": 13, "family": "system-ui, sans-serif"},
        showlegend=legend,
        # Below the axes, where it takes no width from a narrow page.
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    axis = {"automargin": True, "showline": True, "ticks": "outside", "zeroline": False}
    figure.update_xaxes(title={"text": x, "standoff": 8, "font": {"size": 13}}, **axis)
    figure.update_yaxes(title={"text": y, "standoff": 8, "font": {"size": 13}}, **axis)
    return figure


def logarithmic(figure: Any, axis: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with labels at 1, 2 and 5 times powers of ten.

    Args:
        figure: the figure.
        axis: ``"x"`` or ``"y"``.
        values: all that is drawn along it, above 0.
    """
    options: dict[str, Any] = {"type": "log"}
    ticks = log_ticks(min(values), max(values))
    if len(ticks) > 2:  # within less than that, plotly finds better places
        options |= {"tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}
    (figure.update_xaxes if axis == "x" else figure.update_yaxes)(**options)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high; powers alone over many decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 4 else (1,)
    ticks = [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def line_at(
    figure: Any,
    text: str,
    *,
    x: float | None = None,
    y: float | None = None,
    position: str = "bottom right",
) -> None:
    """A dotted line across the figure at x or y, with its name at its end.

    Args:
        figure: the figure.
        text: name of the line.
        x, y: where it crosses the axis.
        position: of the name on a line at y.
    """
    style = {"line": {"dash": "dot", "color": GREY, "width": 1.5}, "annotation_text": text}
    if x is not None:
        figure.add_vline(x=x, annotation_position="top right", **style)
    if y is not None:
        figure.add_hline(y=y, annotation_position=position, **style)


def interval_bars(
    values: Sequence[float], ends: Sequence[Sequence[float]], *, scale: float = 1.0, **style: Any
) -> dict[str, Any]:
    """Error bars from intervals that need not be symmetric.

    Args:
        values: of the points.
        ends: low and high end of each.
        scale: what values and ends are multiplied by in the figure, as 100 for percent.
        style: further entries of plotly's error bars.
    """
    pairs = list(zip(ends, values, strict=True))
    return {
        "symmetric": False,
        "array": [scale * (end[1] - value) for end, value in pairs],
        "arrayminus": [scale * (value - end[0]) for end, value in pairs],
        **style,
    }
