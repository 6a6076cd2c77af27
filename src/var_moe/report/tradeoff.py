"""Speedup against degradation: evaluations, the front, what was measured again, the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Picture
from var_moe.report.folder import Results
from var_moe.report.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    TALL,
    empty_figure,
    interval_bars,
    line_at,
)
from var_moe.report.wording import change, hover, limit, settings

_THIN = {"thickness": 1.2, "width": 3}


def tradeoff_figure(results: Results, rows: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Speedup against degradation: evaluations, front, what was measured again, the bound."""
    metadata, front = results.get("metadata"), results.get("front")
    if metadata["max_degradation"] is None:
        return None  # a program's own search, of an objective without a bound
    figure = empty_figure("perplexity change, %", "speedup", height=TALL)
    if front:
        forecast = [point for point in front["points"] if not point["verified"]]
        figure.add_scatter(
            x=[100 * point["degradation"] for point in forecast],
            y=[point["speedup"] for point in forecast],
            mode="lines",
            line={"color": GREY, "dash": "dash", "width": 1.5},
            name="front, forecast",
        )
    if rows:
        figure.add_scatter(
            x=[100 * row["degradation"] for row in rows],
            y=[row["speedup"] for row in rows],
            text=hover(rows),
            mode="markers",
            marker={"color": GREY, "size": 6, "opacity": 0.7},
            name="on the search text",
        )
    again = [row for row in metadata.get("remeasured", ()) if row.get("speedup") is not None]
    for passed, name, colour in (
        (False, "over the bound", ORANGE),
        (True, "keeps the bound", BLUE),
    ):
        some = [row for row in again if row["passed"] is passed]
        if some:
            figure.add_scatter(**_measured(some), marker_color=colour, name=name)
    if results.get("validation"):
        one = {"name": results.get("validation")["text"]["split"], **results.get("validation")}
        figure.add_scatter(
            **_measured([one]), marker={"color": PURPLE, "symbol": "square"}, name="held-out text"
        )
    certified = _certified(results.get("certificate"))
    if certified:
        figure.add_scatter(
            x=[100 * certified["degradation"]],
            y=[certified["speedup"]],
            error_x=interval_bars(
                [certified["degradation"]], [certified["degradation_interval"]], scale=100, **_THIN
            ),
            error_y=interval_bars([certified["speedup"]], [certified["speedup_95"]], **_THIN),
            mode="markers",
            marker={"symbol": "star", "size": 15, "color": GREEN},
            name="certified",
        )
    line_at(
        figure, f"bound {limit(metadata['max_degradation'])}", x=100 * metadata["max_degradation"]
    )
    figure.add_scatter(
        x=[0],
        y=[1],
        mode="markers",
        marker={"symbol": "cross", "size": 10, "color": GREY},
        name="unmodified",
    )
    return Picture(
        name="speedup-degradation",
        title="Speedup against degradation",
        caption="Up and left is better. Coloured points were measured on text that was not "
        "searched on; their bars are 95% intervals (of perplexity over documents, of speed over "
        "interleaved blocks). A point counts by the upper end of its perplexity.",
        figure=figure,
    )


def _measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    speeds = [row["speedup"] for row in rows]
    ends = [row["speedup_95"] for row in rows]
    return {
        "x": [100 * row["degradation"] for row in rows],
        "y": speeds,
        "error_x": {
            "array": [196 * row["degradation_standard_error"] for row in rows],
            **_THIN,
        },
        "error_y": interval_bars(speeds, ends, **_THIN),
        "text": [
            f"{row['name']}<br>{settings(row['config'])}<br>perplexity {change(row)}<br>"
            f"{row['experts_per_token']:.2f} experts per token"
            for row in rows
        ],
        "mode": "markers",
        "marker_size": 10,
    }


def _certified(certificate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Figures of the certified configuration, where its speed was measured too."""
    if not certificate or not certificate["certified"]:
        return None
    test = next(t for t in certificate["tests"] if t["name"] == certificate["certified_name"])
    speed = next((c for c in certificate["claims"] if c["name"] == "speedup"), None)
    if speed is None or speed.get("measured") is None:
        return None
    return {**test, "speedup": speed["measured"], "speedup_95": speed["speedup_95"]}
