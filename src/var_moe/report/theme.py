"""One look for all pages: figures as text, colours, and an empty figure to draw in.

Text, grid and background colours are left to the page, which sets them for its light and its dark
face; traces use the colours below, which stand out from both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BLUE, ORANGE, GREEN, RED = "#3f86c8", "#e08a2e", "#2f9e6e", "#d1505c"
PURPLE, TEAL, GREY = "#9270c4", "#2b9fb0", "#8b9098"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, "#b0894f", "#c765a5", "#7f9f3f", "#5c6ac4")
TALL = 460  # pixels of the figures that matter most
COLD_TO_HOT = [[0.0, GREEN], [0.5, "#d9b23c"], [1.0, RED]]
LOGARITHMIC = {"type": "log", "minorloglabels": "complete"}  # of an axis
MOST_HOVERED = 2000
"""Marks with text of their own; an exhaustive grid can have many thousands."""


def empty_figure(x: str, y: str, *, height: int = 400, legend: bool = True) -> Any:
    """A figure with its axes named and nothing in it; a legend stands below the axes."""
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
        colorway=SERIES,
        barmode="stack",
    )
    axis = {"automargin": True, "showline": True, "ticks": "outside", "zeroline": False}
    figure.update_xaxes(title={"text": x, "standoff": 8, "font": {"size": 13}}, **axis)
    figure.update_yaxes(title={"text": y, "standoff": 8, "font": {"size": 13}}, **axis)
    return figure


def line_at(
    figure: Any,
    text: str,
    *,
    x: float | None = None,
    y: float | None = None,
    position: str = "bottom right",
) -> None:
    """A dotted line with a name, across the figure at x or at y, there with the name's position."""
    style = {"line": {"dash": "dot", "color": GREY, "width": 1.5}, "annotation_text": text}
    if x is not None:
        figure.add_vline(x=x, annotation_position="top right", **style)
    if y is not None:
        figure.add_hline(y=y, annotation_position=position, **style)


def interval_bars(
    values: Sequence[float], ends: Sequence[Sequence[float]], *, scale: float = 1.0, **style: Any
) -> dict[str, Any]:
    """Error bars from the low and high end of each value; ``scale`` is 100 for percent."""
    pairs = list(zip(ends, values, strict=True))
    return {
        "symmetric": False,
        "array": [scale * (end[1] - value) for end, value in pairs],
        "arrayminus": [scale * (value - end[0]) for end, value in pairs],
        **style,
    }


def percent(share: float | None, digits: int = 2) -> str:
    """A relative change with its sign, as +0.92%."""
    return "" if share is None else f"{100 * share:+.{digits}f}%"


def limit(share: float) -> str:
    """A bound, as 1%."""
    return f"{100 * share:g}%"


def factor(value: float | None) -> str:
    """A speedup, as 1.354x."""
    return "" if value is None else f"{value:.3f}x"


def between(ends: Sequence[float] | None) -> str:
    """An interval of speedups, as [1.255, 1.472]."""
    return "" if not ends else f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def change(row: Mapping[str, Any]) -> str:
    """A degradation with its one-sided upper bound."""
    return f"{percent(row['degradation'])} ({percent(row['degradation_upper_95'])})"


def change_interval(row: Mapping[str, Any]) -> str:
    """A degradation with its interval, as +0.78% [0.72, 0.83]."""
    low, high = row["degradation_interval"]
    return f"{percent(row['degradation'])} [{100 * low:.2f}, {100 * high:.2f}]"


def speedup(row: Mapping[str, Any]) -> str:
    """A speedup with its interval."""
    if row.get("speedup") is None:
        return "not timed"
    return f"{factor(row['speedup'])} {between(row.get('speedup_95'))}".strip()


def tiers(row: Mapping[str, Any]) -> str:
    """Fast, cached, learned in percent."""
    return "{fast_pct:.1f} / {cached_pct:.1f} / {learned_pct:.1f}".format_map(row)


def settings(config: Mapping[str, Any]) -> str:
    """A configuration's own parameters on one line."""
    inner = config.get("settings", config)
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in inner.items()
    )


def kind(config: Mapping[str, Any]) -> str:
    """What decides: VAR in a mode, or a policy, and what stands in for dropped experts."""
    if "policy" not in config:
        return f"VAR, {config.get('mode', 'verified')} mode"
    stand_in = config.get("compensation")
    return f"policy {config['policy']}" + (f", compensation {stand_in}" if stand_in else "")


def hover(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a mark of each evaluation tells when it is pointed at."""
    if len(rows) > MOST_HOVERED:
        return []
    return [
        f"{settings(row['params']).replace(', ', '<br>')}<br>perplexity "
        f"{percent(row['degradation'])}<br>{row['experts_per_token']:.2f} experts per token"
        for row in rows
    ]
