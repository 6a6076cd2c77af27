"""What a profile says of VAR's three hypotheses (``experiments/01_routing_analysis.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import SERIES, empty_figure


def hypotheses_section(results: Results) -> Section | None:
    """Each hypothesis with its test, figure and verdict, and the coverage of the fast path."""
    found = results.get("routing")
    if found is None:
        return None
    return section(
        "hypotheses",
        "Is routing what the fast path needs?",
        [
            Table(
                title="Hypotheses",
                headings=("", "claim", "test", "found", "verdict"),
                rows=[
                    (row["name"], row["claim"], row["test"], row["evidence"], row["verdict"])
                    for row in found["hypotheses"]
                ],
                words=5,
            ),
            pictures(coverage_figure(found)),
            _layers(found),
        ],
        intro=f"{found['model']} on {found['tokens']:,} tokens of {found['dataset']}.",
    )


def coverage_figure(found: Mapping[str, Any]) -> Picture:
    """Share of tokens on the fast path, by both of its thresholds."""
    coverage = found["coverage"]
    figure = empty_figure("entropy_threshold, nats", "tokens on the fast path, %")
    for number, (frequency, shares) in enumerate(
        zip(coverage["frequency_thresholds"], coverage["share"], strict=True)
    ):
        figure.add_scatter(
            x=coverage["entropy_thresholds"],
            y=[100 * share for share in shares],
            mode="lines",
            line={"color": SERIES[number % len(SERIES)]},
            name=f"frequency_threshold {frequency}",
        )
    default = coverage["default"]
    figure.add_scatter(
        x=[default["entropy_threshold"]],
        y=[100 * default["share"]],
        mode="markers",
        marker={"symbol": "star", "size": 13, "color": SERIES[1]},
        name="default",
    )
    return Picture(
        name="coverage",
        title="Coverage of the fast path",
        caption="Share of (layer, token) that the static table would serve.",
        figure=figure,
    )


def _layers(found: Mapping[str, Any]) -> Table:
    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return Table(
        title="Layers",
        headings=("layer", "mean entropy, nats", "Spearman's rho", "consistency", "covered, %"),
        rows=[
            (
                str(row["layer"]),
                shown(row["mean_entropy_nats"]),
                shown(row["spearman_rho"], 2),
                shown(row["consistency"]),
                shown(100 * row["coverage_default"], 1),
            )
            for row in found["layers"]
        ],
    )
