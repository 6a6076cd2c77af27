"""How a search went: the best so far, speedup against degradation, and each parameter's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from var_moe.report.blocks import Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import (
    BLUE,
    COLD_TO_HOT,
    GREEN,
    GREY,
    LOGARITHMIC,
    ORANGE,
    PURPLE,
    TALL,
    change,
    empty_figure,
    hover,
    interval_bars,
    limit,
    line_at,
    percent,
    settings,
    speedup,
    tiers,
)

_THIN = {"thickness": 1.2, "width": 3}

Rows = Sequence[Mapping[str, Any]]


def search_section(results: Results) -> Section:
    """The course of the search and what it left."""
    search, metadata = results["search"], results["metadata"]
    rows = [row for row in search["all_results"] if row.get("speedup") is not None]
    failed = metadata.get("search", {}).get("failed", 0)
    course = f"{search['num_evaluations']} full evaluations by the {search['method']} method"
    if metadata.get("replay"):
        course += f", chosen by {metadata['replay']['forecasts']:,} replays of a recorded trace"
    course += f", in {search['optimization_time'] / 60:.1f} minutes"
    return section(
        "search",
        "The search",
        pictures(progress_figure(rows) if rows else None, tradeoff_figure(results, rows)),
        measured_table(metadata, search["best_params"]) if "remeasured" in metadata else None,
        pictures(*slice_figures(rows, metadata)),
        intro=course + (f"; {failed} of them failed." if failed else "."),
    )


def progress_figure(rows: Rows) -> Picture:
    """Speedup of each evaluation, in order, and the best feasible one so far."""
    figure = empty_figure("full evaluation", "speedup on the search text", height=TALL)
    for feasible, name, colour, symbol in (
        (False, "over the bound", GREY, "x"),
        (True, "keeps the bound", BLUE, "circle"),
    ):
        some = {at: row for at, row in enumerate(rows, 1) if bool(row["feasible"]) is feasible}
        if some:
            figure.add_scatter(
                x=list(some),
                y=[row["speedup"] for row in some.values()],
                text=hover(list(some.values())),
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=name,
            )
    best = accumulate((row["speedup"] if row["feasible"] else 0.0 for row in rows), max)
    figure.add_scatter(
        x=list(range(1, len(rows) + 1)),
        y=[value or None for value in best],
        mode="lines",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        name="best so far",
    )
    line_at(figure, "unmodified model", y=1.0)
    return Picture(
        name="best-so-far",
        title="Best feasible so far",
        caption="Each mark is one run of the model on the search text; the line is the fastest so "
        "far whose perplexity kept the bound.",
        figure=figure,
    )


def tradeoff_figure(results: Results, rows: Rows) -> Picture | None:
    """Speedup against degradation: evaluations, front, what was measured again, the bound."""
    metadata, held_out = results["metadata"], results.get("validation")
    bound = metadata["max_degradation"]
    if bound is None:
        return None  # a program's own search, of an objective without a bound
    figure = empty_figure("perplexity change, %", "speedup", height=TALL)

    def add(some: Rows, name: str, **style: Any) -> None:
        if some:
            figure.add_scatter(
                x=[100 * row["degradation"] for row in some],
                y=[row["speedup"] for row in some],
                name=name,
                **{"mode": "markers", **style},
            )

    front = (results.get("front") or {"points": ()})["points"]
    forecast = [point for point in front if not point["verified"]]
    dashes = {"color": GREY, "dash": "dash", "width": 1.5}
    add(forecast, "front, forecast", mode="lines", line=dashes)
    marks = {"color": GREY, "size": 6, "opacity": 0.7}
    add(rows, "on the search text", text=hover(rows), marker=marks)
    again = [row for row in metadata.get("remeasured", ()) if row.get("speedup") is not None]
    for some, name, colour, symbol in (
        ([row for row in again if not row["passed"]], "over the bound", ORANGE, "circle"),
        ([row for row in again if row["passed"]], "keeps the bound", BLUE, "circle"),
        ([held_out] if held_out else [], "held-out text", PURPLE, "square"),
    ):
        add(
            some,
            name,
            marker={"color": colour, "symbol": symbol, "size": 10},
            error_x={"array": [196 * row["degradation_standard_error"] for row in some], **_THIN},
            error_y=_speed_bars(some),
            text=[
                f"{row.get('name', name)}<br>{settings(row['config'])}<br>perplexity "
                f"{change(row)}<br>{row['experts_per_token']:.2f} experts per token"
                for row in some
            ],
        )
    certified = _certified(results.get("certificate"))
    values = [row["degradation"] for row in certified]
    ends = [row["degradation_interval"] for row in certified]
    add(
        certified,
        "certified",
        marker={"symbol": "star", "size": 15, "color": GREEN},
        error_x=interval_bars(values, ends, scale=100, **_THIN),
        error_y=_speed_bars(certified),
    )
    line_at(figure, f"bound {limit(bound)}", x=100 * bound)
    unmodified = {"degradation": 0.0, "speedup": 1.0}
    add([unmodified], "unmodified", marker={"symbol": "cross", "size": 10, "color": GREY})
    return Picture(
        name="speedup-degradation",
        title="Speedup against degradation",
        caption="Up and left is better. Coloured points were measured on text that was not "
        "searched on; their bars are 95% intervals (of perplexity over documents, of speed over "
        "interleaved blocks). A point counts by the upper end of its perplexity.",
        figure=figure,
    )


def _speed_bars(rows: Rows) -> dict[str, Any]:
    speeds, ends = [row["speedup"] for row in rows], [row["speedup_95"] for row in rows]
    return interval_bars(speeds, ends, **_THIN)


def _certified(certificate: Mapping[str, Any] | None) -> Rows:
    """Figures of the certified configuration, where its speed was measured too."""
    if not certificate or not certificate["certified"]:
        return []
    test = {row["name"]: row for row in certificate["tests"]}[certificate["certified_name"]]
    speed = {claim["name"]: claim for claim in certificate["claims"]}.get("speedup", {})
    if speed.get("measured") is None:
        return []
    return [{**test, "speedup": speed["measured"], "speedup_95": speed["speedup_95"]}]


def measured_table(metadata: Mapping[str, Any], best: Mapping[str, Any] | None) -> Table | None:
    """What was measured on text that was not searched on; ``best`` is the winner's row."""
    rows, baseline = metadata["remeasured"], metadata["baseline"]
    winner = next((number for number, row in enumerate(rows, 1) if row["config"] == best), None)
    unmodified = {"name": "unmodified model", "perplexity": baseline["perplexity"]}
    unmodified |= {"experts_per_token": metadata["geometry"]["top_k"]}

    def other(one: Any, of_baseline: str = "") -> Any:
        return lambda row: of_baseline if row is unmodified else one(row)

    columns: dict[str, Any] = {
        "": "{name}",
        "perplexity": "{perplexity:.3f}",
        "change (95% upper)": other(change),
        "speedup [95%]": other(speedup, f"1 ({baseline['backend']})"),
        "experts per token": "{experts_per_token:.3f}",
    }
    if any(row["learned_pct"] < 100 for row in rows):
        columns["fast / cached / learned, %"] = other(tiers, "0 / 0 / 100")
    if any(row.get("worst_dataset") for row in rows):
        columns["worst data set"] = other(_worst)
    return Table.of(
        "Measured on text that was not searched on",
        [unmodified, *rows],
        columns,
        marked=winner,
        caption=f"{metadata['ordering_documents']:,} documents. The marked row wins: the fewest "
        "executed experts among those whose upper bound keeps "
        f"{limit(metadata['max_degradation'])}.",
    )


def _worst(row: Mapping[str, Any]) -> str:
    upper = percent(row["worst_degradation_upper_95"])
    return f"{row['worst_dataset']} {percent(row['worst_degradation'])} ({upper})"


def slice_figures(rows: Rows, metadata: Mapping[str, Any]) -> list[Picture]:
    """Values of each parameter that took several, against speedup, coloured by degradation."""
    space = metadata.get("settings", {}).get("space", {})
    names = [name for name in space if len({row["params"].get(name) for row in rows}) > 1]
    figures = []
    for name in names:
        figure = empty_figure(name, "speedup", height=300, legend=False)
        if space[name].get("log"):
            figure.update_xaxes(**LOGARITHMIC)
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
                "cmax": 200 * metadata["max_degradation"],
                "symbol": ["circle" if row["feasible"] else "x" for row in rows],
            },
        )
        figures.append(
            Picture(
                name=f"slice-{name.replace('_', '-')}",
                title=name,
                caption="Colour: perplexity change, green 0 to red at twice the bound; crosses "
                "are over the bound."
                if name == names[0]
                else "",
                figure=figure,
            )
        )
    return figures
