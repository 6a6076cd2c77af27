"""Each parameter's part in a search: slices, and all of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Picture
from var_moe.report.theme import COLD_TO_HOT, empty_figure, logarithmic
from var_moe.report.wording import hover


def varied(rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> list[str]:
    """Parameters of the search space that took more than one value."""
    space = metadata.get("settings", {}).get("space", ())
    return [name for name in space if len({row["params"].get(name) for row in rows}) > 1]


def slice_figures(rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> list[Picture]:
    """Each parameter's values against speedup, coloured by degradation."""
    names = varied(rows, metadata)
    found = []
    for name in names:
        space, bound = metadata["settings"]["space"], 100 * metadata["max_degradation"]
        figure = empty_figure(name, "speedup", height=300, legend=False)
        if space[name].get("log"):
            logarithmic(figure, "x", [row["params"][name] for row in rows])
        figure.add_scatter(
            x=[row["params"][name] for row in rows],
            y=[row["speedup"] for row in rows],
            text=hover(rows),
            mode="markers",
            marker={
                "size": 8,
                "color": [100 * row["degradation"] for row in rows],
                "colorscale": COLD_TO_HOT,
                "cmin": 0,
                "cmax": 2 * bound,
                "symbol": ["circle" if row["feasible"] else "x" for row in rows],
                "showscale": len(names) == 1,
                "colorbar": {"title": {"text": "PPL, %", "side": "right"}, "thickness": 10},
            },
        )
        found.append(
            Picture(
                name=f"slice-{name.replace('_', '-')}",
                title=name,
                caption="Colour: perplexity change, green 0 to red at twice the bound; crosses "
                "are over the bound."
                if name == names[0]
                else "",
                figure=figure,
                small=len(names) > 1,
            )
        )
    return found


def parallel_figure(
    rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]
) -> Picture | None:
    """All parameters of all evaluations at once, where there are several."""
    import plotly.graph_objects as go

    names = varied(rows, metadata)
    if len(names) < 2 or len(rows) < 3:
        return None
    axes = [_axis(name, [row["params"][name] for row in rows]) for name in names]
    axes.append({"label": "PPL change, %", "values": [100 * row["degradation"] for row in rows]})
    axes.append({"label": "speedup", "values": [row["speedup"] for row in rows]})
    figure = empty_figure("", "", height=400, legend=False)
    figure.update_layout(margin={"l": 60, "r": 60, "t": 50, "b": 24})
    figure.add_trace(
        go.Parcoords(
            dimensions=axes,
            line={
                "color": [100 * row["degradation"] for row in rows],
                "colorscale": COLD_TO_HOT,
                "cmin": 0,
                "cmax": 200 * metadata["max_degradation"],
            },
        )
    )
    return Picture(
        name="parallel",
        title="All parameters together",
        caption="A line is an evaluation; drag along an axis to choose some. Green lines cost "
        "little perplexity, red ones twice the bound or more.",
        figure=figure,
        least_width=760,
    )


def _axis(name: str, values: list[Any]) -> dict[str, Any]:
    """One of parallel axes; names stand at whole numbers."""
    if not any(isinstance(value, str) for value in values):
        return {"label": name, "values": values}
    known = list(dict.fromkeys(values))
    places = list(range(len(known)))
    return {
        "label": name,
        "values": [known.index(value) for value in values],
        "tickvals": places,
        "ticktext": known,
    }
