"""How a search went: the best so far, speedup against degradation, each parameter's slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.parameters import parallel_figure, slice_figures
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
from var_moe.report.wording import change, hover, limit, percent, settings, speedup, tiers

_THIN = {"thickness": 1.2, "width": 3}
PRESETS = ("conservative", "balanced", "aggressive")


def search_section(results: Results) -> Section | None:
    """The course of the search and what it left."""
    search, metadata = results.get("search"), results.get("metadata")
    if search is None:
        return None
    shown = [row for row in search["all_results"] if row.get("speedup") is not None]
    return section(
        "search",
        "The search",
        [
            pictures(
                progress_figure(shown, metadata) if shown else None,
                tradeoff_figure(results, shown),
            ),
            measured_table(metadata, search["best_params"]) if "remeasured" in metadata else None,
            pictures(*slice_figures(shown, metadata)),
            pictures(parallel_figure(shown, metadata)),
        ],
        intro=_course(search, metadata),
    )


def _course(search: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    failed = metadata.get("search", {}).get("failed", 0)
    text = f"{search['num_evaluations']} full evaluations by the {search['method']} method"
    if metadata.get("replay"):
        text += f", chosen by {metadata['replay']['forecasts']:,} replays of a recorded trace"
    text += f", in {search['optimization_time'] / 60:.1f} minutes"
    return text + (f"; {failed} of them failed." if failed else ".")


def progress_figure(rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> Picture:
    """Speedup of each evaluation, and the best feasible one so far.

    Args:
        rows: evaluations in their order, with a speedup.
        metadata: of the search.
    """
    figure = empty_figure("full evaluation", "speedup on the search text", height=TALL)
    number = {id(row): place for place, row in enumerate(rows, start=1)}
    for feasible, name, colour, symbol in (
        (False, "over the bound", GREY, "x"),
        (True, "keeps the bound", BLUE, "circle"),
    ):
        some = [row for row in rows if bool(row["feasible"]) is feasible]
        if some:
            figure.add_scatter(
                x=[number[id(row)] for row in some],
                y=[row["speedup"] for row in some],
                text=hover(some),
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=name,
            )
    best, course = None, []
    for row in rows:
        if row["feasible"]:
            best = row["speedup"] if best is None else max(best, row["speedup"])
        course.append(best)
    figure.add_scatter(
        x=list(range(1, len(rows) + 1)),
        y=course,
        mode="lines",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        name="best so far",
    )
    again = metadata.get("remeasured", ())
    presets = [row for row in again if row["name"] in PRESETS and row["speedup"]]
    if presets:
        figure.add_scatter(
            x=[0] * len(presets),
            y=[row["speedup"] for row in presets],
            text=[f"{row['name']}<br>perplexity {change(row)}" for row in presets],
            mode="markers",
            marker={
                "symbol": ["diamond" if row["passed"] else "diamond-open" for row in presets],
                "color": ORANGE,
                "size": 10,
            },
            name="presets",
        )
    line_at(figure, "unmodified model", y=1.0)
    caption = (
        "Each mark is one run of the model on the search text; the line is the fastest so far "
        "whose perplexity kept the bound."
    )
    if presets:
        caption += " Presets stand at 0 (open: over the bound), on the text that judges."
    return Picture(name="best-so-far", title="Best feasible so far", caption=caption, figure=figure)


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


def measured_table(metadata: Mapping[str, Any], best: Mapping[str, Any] | None) -> Table | None:
    """What was measured on text that was not searched on.

    Args:
        metadata: of the search.
        best: the winner's configuration, where there is one.
    """
    rows, baseline = metadata["remeasured"], metadata["baseline"]
    winner = next((number for number, row in enumerate(rows) if row["config"] == best), None)
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
        columns["worst data set"] = _worst
    return Table.of(
        "Measured on text that was not searched on",
        [unmodified, *rows],
        columns,
        marked=None if winner is None else winner + 1,
        caption=f"{metadata['ordering_documents']:,} documents. The marked row wins: the fewest "
        "executed experts among those whose upper bound keeps "
        f"{limit(metadata['max_degradation'])}.",
    )


def _worst(row: Mapping[str, Any]) -> str:
    if not row.get("worst_dataset"):
        return ""
    upper = percent(row["worst_degradation_upper_95"])
    return f"{row['worst_dataset']} {percent(row['worst_degradation'])} ({upper})"
