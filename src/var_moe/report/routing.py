"""What a profile saw of the routers, and what it says of the hypotheses behind the fast path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.report.blocks import Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import SERIES, empty_figure, line_at

if TYPE_CHECKING:
    import pandas as pd

_BINS = 60
_MOST_LINES = 8  # layers drawn by themselves; of more, evenly chosen ones


def routing_section(results: Results) -> Section:
    """The routing statistics of the profile."""
    stats, title = results.stats, "Routing of the unmodified model"
    if stats is None or not len(stats):
        return section("routing", title)
    best = (results.get("search") or {}).get("best_params") or {}
    weight, layers = stats["frequency"], stats["layer"].nunique()
    usual = np.average(stats["routing_consistency"], weights=weight)
    return section(
        "routing",
        title,
        pictures(entropy_figure(stats, best.get("entropy_threshold"))),
        intro=f"The profile: {weight.sum() // layers:,} tokens of calibration text, "
        f"{stats['token_id'].nunique():,} different ones, {layers} layers. {usual:.0%} of a "
        "token's occurrences go to its usual first expert.",
    )


def entropy_figure(stats: pd.DataFrame, threshold: float | None) -> Picture:
    """Distribution of the mean router entropy, weighted by how often a token comes."""
    figure = empty_figure("mean router entropy of a token, nats", "share of tokens, %")
    edges = np.linspace(0, max(float(stats["mean_entropy"].max()), 1e-6), _BINS + 1)
    layers = np.unique(stats["layer"])
    places = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LINES)).round().astype(int)
    for layer in layers[places]:
        rows = stats[stats["layer"] == layer]
        counts, _ = np.histogram(rows["mean_entropy"], bins=edges, weights=rows["frequency"])
        figure.add_scatter(
            x=((edges[:-1] + edges[1:]) / 2).tolist(),
            y=(100 * counts / max(counts.sum(), 1)).tolist(),
            mode="lines",
            name=f"layer {layer}",
        )
    if threshold is not None:
        line_at(figure, "entropy_threshold", x=threshold)
    return Picture(
        name="entropy",
        title="Entropy of the routers",
        caption="Tokens far to the left are predictable: the static table can serve them. Most "
        "of the mass to the right means that a threshold on entropy cuts little.",
        figure=figure,
    )


def hypotheses_section(results: Results) -> Section:
    """Each hypothesis with its test, figure and verdict, and the coverage of the fast path."""
    analysis = results["routing"]

    def shown(name: str, digits: int = 3, scale: float = 1) -> Any:
        return lambda row: "-" if row[name] is None else f"{scale * row[name]:.{digits}f}"

    columns = {"": "{name}", "claim": "{claim}", "test": "{test}", "found": "{evidence}"}
    columns["verdict"] = "{verdict}"
    layers = {
        "layer": "{layer}",
        "mean entropy, nats": shown("mean_entropy_nats"),
        "Spearman's rho": shown("spearman_rho", 2),
        "consistency": shown("consistency"),
        "covered, %": shown("coverage_default", 1, scale=100),
    }
    return section(
        "hypotheses",
        "Is routing what the fast path needs?",
        Table.of("Hypotheses", analysis["hypotheses"], columns, words=5),
        pictures(coverage_figure(analysis)),
        Table.of("Layers", analysis["layers"], layers),
        intro=f"{analysis['model']} on {analysis['tokens']:,} tokens of {analysis['dataset']}.",
    )


def coverage_figure(analysis: Mapping[str, Any]) -> Picture:
    """Share of tokens on the fast path, by both of its thresholds."""
    coverage = analysis["coverage"]
    figure = empty_figure("entropy_threshold, nats", "tokens on the fast path, %")
    for frequency, shares in zip(coverage["frequency_thresholds"], coverage["share"], strict=True):
        figure.add_scatter(
            x=coverage["entropy_thresholds"],
            y=[100 * share for share in shares],
            mode="lines",
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
