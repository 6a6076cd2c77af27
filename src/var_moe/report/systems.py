"""What ``var-moe analyze`` measured: bottlenecks, parts of a forward, scaling, roofline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Notes, Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import (
    BLUE,
    LOGARITHMIC,
    ORANGE,
    between,
    empty_figure,
    factor,
    interval_bars,
    line_at,
)

_ARMS = {"baseline": "unmodified", "var": "VAR"}


def systems_section(results: Results) -> Section:
    """The systems analysis."""
    analysis, parts = results["analysis"], results.get("components")
    compared = analysis["comparison"]
    bottlenecks: dict[str, Any] = {
        "severity": "{severity}",
        "bottleneck": lambda row: row["name"].replace("_", " "),
        "evidence": "{evidence}",
        "what to do": "{recommendation}",
    }
    return section(
        "systems",
        "Systems analysis",
        Table.of("What bounds it", analysis["bottlenecks"], bottlenecks, words=4),
        pictures(components_figure(parts) if parts else None, scaling_figure(analysis)),
        roofline_table(analysis),
        Notes("", analysis["notes"]),
        intro=f"With {analysis['var']['kind']}. The cost model predicts "
        f"{factor(compared['predicted_speedup'])}, {compared['prediction_error_pct']:.1f}% off; "
        f"with the leading experts everywhere it would be {factor(compared['largest_speedup'])}.",
    )


def components_figure(parts: Mapping[str, Any]) -> Picture:
    """Mean milliseconds of each part, the unmodified model and VAR."""
    figure = empty_figure("milliseconds a forward", "", height=340)
    for name in parts["baseline"]["components"]:
        figure.add_bar(
            y=list(_ARMS.values()),
            x=[parts[arm]["components"][name]["mean_ms"] for arm in _ARMS],
            name=name,
            orientation="h",
        )
    figure.update_layout(legend_traceorder="normal")
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
    for varied, colour in (("sequence", BLUE), ("batch_size", ORANGE)):
        rows = [row for row in analysis["scaling"] if row["varied"] == varied]
        speeds = [row["speedup"] for row in rows]
        figure.add_scatter(
            x=[row["batch_size"] * row["sequence"] for row in rows],
            y=speeds,
            error_y=interval_bars(speeds, [row["speedup_95"] for row in rows]),
            text=["{batch_size} x {sequence}".format(**row) for row in rows],
            mode="lines+markers",
            line={"color": colour},
            name=f"{varied.replace('_', ' ')} varied",
        )
    line_at(figure, "unmodified model", y=1.0)
    return Picture(
        name="scaling",
        title="Scaling",
        caption="Interleaved blocks at each size; bars are 95% intervals. With few tokens every "
        "expert is read for a handful of rows, and dropping pairs saves little.",
        figure=figure,
    )


def roofline_table(analysis: Mapping[str, Any]) -> Table | None:
    """Time and memory, and what a forward reaches of what this machine can."""
    compared, roof = analysis["comparison"], analysis["roofline"]

    def reached(what: str, peak: str) -> Any:
        name, share = f"achieved_{what}_per_second", f"share_of_{peak}"
        return lambda row: f"{row[name] / 1e9:,.1f} ({row[share]:.0%})"

    return Table.of(
        "Roofline",
        [{"arm": name, **analysis[arm], **roof[arm]} for arm, name in _ARMS.items()],
        {
            "": "{arm}",
            "ms": "{avg_time_ms:.1f}",
            "tokens/s": "{throughput_tps:,.0f}",
            "active parameters": lambda row: f"{row['active_parameters'] / 1e6:,.1f}M",
            "GFLOP/s (of a matrix product)": reached("flops", "gemm"),
            "GB/s (of a copy)": reached("bytes", "copy"),
            "FLOP/byte": "{arithmetic_intensity_flops_per_byte:.1f}",
            "bound by": "{bound}",
            "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
        },
        caption=f"Speedup {factor(compared['actual_speedup'])} "
        f"{between(compared['actual_speedup_95'])} against {analysis['baseline']['backend']}. "
        "Below half of what a large matrix product, or a copy, reaches here, a forward is bound "
        f"by overhead. Above {roof['machine']['ridge_flops_per_byte']:.0f} FLOP/byte arithmetic "
        "is the roof, below it memory.",
    )
