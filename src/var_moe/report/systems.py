"""What ``var-moe analyze`` measured: parts of a forward, scaling, roofline, bottlenecks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Notes, Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import (
    BLUE,
    GREY,
    LOGARITHMIC,
    ORANGE,
    SERIES,
    between,
    empty_figure,
    factor,
    interval_bars,
    line_at,
)

_ARMS = {"baseline": ("unmodified", GREY), "var": ("VAR", BLUE)}


def systems_section(results: Results) -> Section:
    """The systems analysis."""
    analysis, parts = results.get("analysis"), results.get("components")
    compared = analysis["comparison"]
    return section(
        "systems",
        "Systems analysis",
        [
            _bottlenecks(analysis),
            pictures(
                components_figure(parts) if parts else None,
                scaling_figure(analysis),
                roofline_figure(analysis),
            ),
            _roofline_table(analysis),
            Notes(lines=analysis["notes"]) if analysis["notes"] else None,
        ],
        intro=f"With {analysis['var']['kind']}. The cost model predicts "
        f"{factor(compared['predicted_speedup'])}, {compared['prediction_error_pct']:.1f}% off; "
        f"with the leading experts everywhere it would be {factor(compared['largest_speedup'])}.",
    )


def _bottlenecks(analysis: Mapping[str, Any]) -> Table | None:
    columns: dict[str, Any] = {
        "severity": "{severity}",
        "bottleneck": lambda row: row["name"].replace("_", " "),
        "evidence": "{evidence}",
        "what to do": "{recommendation}",
    }
    return Table.of("What bounds it", analysis["bottlenecks"], columns, words=4)


def components_figure(parts: Mapping[str, Any]) -> Picture:
    """Mean milliseconds of each part, the unmodified model and VAR."""
    names = list(parts["baseline"]["components"])
    figure = empty_figure("milliseconds a forward", "", height=340)
    for number, name in enumerate(names):
        figure.add_bar(
            y=[title for title, _ in _ARMS.values()],
            x=[parts[arm]["components"][name]["mean_ms"] for arm in _ARMS],
            name=name.replace("_", " "),
            orientation="h",
            marker={"color": SERIES[number % len(SERIES)]},
        )
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    figure.update_yaxes(autorange="reversed")
    return Picture(
        name="components",
        title="Parts of a forward",
        caption="Measured with marks and hooks, which add a few percent of their own.",
        figure=figure,
    )


def scaling_figure(analysis: Mapping[str, Any]) -> Picture:
    """Speedup by tokens in a forward, over sequence lengths and batch sizes."""
    figure = empty_figure("tokens in a forward", "speedup", height=380)
    figure.update_xaxes(**LOGARITHMIC)
    kinds = list(dict.fromkeys(row["varied"] for row in analysis["scaling"]))
    for kind, colour in zip(kinds, (BLUE, ORANGE), strict=False):
        rows = [row for row in analysis["scaling"] if row["varied"] == kind]
        speeds = [row["speedup"] for row in rows]
        figure.add_scatter(
            x=[row["batch_size"] * row["sequence"] for row in rows],
            y=speeds,
            error_y=interval_bars(speeds, [row["speedup_95"] for row in rows]),
            text=[f"{row['batch_size']} x {row['sequence']}" for row in rows],
            mode="lines+markers",
            line={"color": colour},
            name=f"{kind.replace('_', ' ')} varied",
        )
    line_at(figure, "unmodified model", y=1.0)
    return Picture(
        name="scaling",
        title="Scaling",
        caption="Interleaved blocks at each size; bars are 95% intervals. With few tokens every "
        "expert is read for a handful of rows, and dropping pairs saves little.",
        figure=figure,
    )


def roofline_figure(analysis: Mapping[str, Any]) -> Picture:
    """Achieved FLOP/s against intensity, below what a matrix product and a copy reach here."""
    roof, machine = analysis["roofline"], analysis["roofline"]["machine"]
    flops, copied = machine["gemm_flops_per_second"], machine["copy_bytes_per_second"]
    places = [roof[arm]["arithmetic_intensity_flops_per_byte"] for arm in _ARMS]
    low, high = min([*places, flops / copied]) / 4, max([*places, flops / copied]) * 4
    figure = empty_figure("FLOP per byte", "GFLOP/s", height=380)
    figure.add_scatter(
        x=[low, flops / copied, high],
        y=[low * copied / 1e9, flops / 1e9, flops / 1e9],
        mode="lines",
        line={"color": GREY, "dash": "dash"},
        name="this machine",
    )
    for arm, (title, colour) in _ARMS.items():
        figure.add_scatter(
            x=[roof[arm]["arithmetic_intensity_flops_per_byte"]],
            y=[roof[arm]["achieved_flops_per_second"] / 1e9],
            mode="markers",
            marker={"size": 12, "color": colour, "symbol": "diamond" if arm == "var" else "circle"},
            name=title,
        )
    figure.update_xaxes(**LOGARITHMIC)
    figure.update_yaxes(**LOGARITHMIC)
    return Picture(
        name="roofline",
        title="Roofline",
        caption="The dashed roof is what a large matrix product and a copy reach on this machine; "
        "under its flat part arithmetic bounds a forward, under its slope memory does.",
        figure=figure,
    )


def _roofline_table(analysis: Mapping[str, Any]) -> Table | None:
    rows = [{"arm": _ARMS[arm][0], **analysis[arm], **analysis["roofline"][arm]} for arm in _ARMS]
    compared = analysis["comparison"]
    return Table.of(
        "Measured",
        rows,
        {
            "": "{arm}",
            "ms": "{avg_time_ms:.1f}",
            "tokens/s": "{throughput_tps:,.0f}",
            "active parameters": lambda row: f"{row['active_parameters'] / 1e6:,.1f}M",
            "GFLOP/s (of a matrix product)": lambda row: _of(row, "flops", "gemm"),
            "GB/s (of a copy)": lambda row: _of(row, "bytes", "copy"),
            "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
        },
        caption=f"Speedup {factor(compared['actual_speedup'])} "
        f"{between(compared['actual_speedup_95'])} against {analysis['baseline']['backend']}.",
    )


def _of(row: Mapping[str, Any], what: str, peak: str) -> str:
    reached, share = row[f"achieved_{what}_per_second"], row[f"share_of_{peak}"]
    return f"{reached / 1e9:,.1f} ({100 * share:.0f}%)"
