"""The picture of `var-moe compare`: what each policy's cuts cost, and what they bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.storage import atomic_write

CONTROL = "random_skip"
_COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#ee7733", "#0077bb"),
    *("#cc3311", "#009988"),
)


def comparison_figure(result: Mapping[str, Any]) -> Any:
    """Degradation against experts per token (left) and against measured speedup (right).

    Args:
        result: what ``comparison.json`` holds.

    Raises:
        UsageError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError:
        raise UsageError(
            "plotly not found: the plot needs `pip install 'var-moe[report]'`"
        ) from None
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    for number, (name, points) in enumerate(_lines(result["rows"]).items()):
        control = name == CONTROL
        style = {
            "name": name,
            "legendgroup": name,
            "mode": "lines+markers",
            "line": {
                "color": "#888888" if control else _COLOURS[number % len(_COLOURS)],
                "dash": "dash" if control else "solid",
            },
            "y": [100 * point["degradation"] for point in points],
            "error_y": {"array": [196 * p["degradation_standard_error"] for p in points]},
        }
        experts = [point["experts_per_token"] for point in points]
        figure.add_trace(go.Scatter(x=experts, **style), row=1, col=1)
        if any(point["speedup"] is None for point in points):
            continue  # compared without timing
        figure.add_trace(
            go.Scatter(
                x=[point["speedup"] for point in points],
                error_x={
                    "symmetric": False,
                    "array": [p["speedup_95"][1] - p["speedup"] for p in points],
                    "arrayminus": [p["speedup"] - p["speedup_95"][0] for p in points],
                },
                showlegend=False,
                **style,
            ),
            row=1,
            col=2,
        )
    bound = 100 * result["max_degradation"]
    figure.add_hline(y=bound, line={"dash": "dot", "color": "#000000", "width": 1})
    figure.update_xaxes(title="experts per token", autorange="reversed", row=1, col=1)
    figure.update_xaxes(title="speedup against the unmodified model", row=1, col=2)
    figure.update_yaxes(title="perplexity change, %", row=1, col=1)
    text = result["text"]
    figure.update_layout(
        title=f"{result['model']['name']} on {text['dataset']} ({text['split']}, "
        f"{result['documents']} documents); bars are 95% intervals",
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
    )
    return figure


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """A line per policy and way of turning it, most experts first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    for points in found.values():
        points.sort(key=lambda row: -row["experts_per_token"])
    return found


def save_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture as one HTML file that needs no network."""
    figure = comparison_figure(result)
    atomic_write(path, lambda temporary: figure.write_html(temporary, include_plotlyjs=True))
