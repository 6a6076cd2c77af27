"""What a profile saw of the routers, and what it says of the hypotheses behind the fast path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.report.blocks import Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import BLUE, DENSITY, LOGARITHMIC, SERIES, empty_figure, line_at

if TYPE_CHECKING:
    import pandas as pd

_BINS = 60
_MOST_LINES = 8  # layers drawn by themselves; of more, evenly chosen ones


def routing_section(results: Results) -> Section | None:
    """The routing statistics of the profile."""
    stats = results.stats
    if stats is None or not len(stats):
        return None
    best = (results.get("search") or {}).get("best_params") or {}
    layers = stats["layer"].nunique()
    tokens = int(stats["frequency"].sum() / layers)
    return section(
        "routing",
        "Routing of the unmodified model",
        [
            pictures(
                entropy_figure(stats, best.get("entropy_threshold")),
                frequency_figure(stats),
                consistency_figure(stats),
            )
        ],
        intro=f"The profile: {tokens:,} tokens of calibration text, "
        f"{stats['token_id'].nunique():,} different ones, {layers} layers.",
    )


def _distribution(rows: pd.DataFrame, column: str, edges: Any) -> dict[str, list[float]]:
    """Middles of the bins, and the share of tokens in each in percent."""
    counts, _ = np.histogram(rows[column], bins=edges, weights=rows["frequency"])
    middles = (edges[:-1] + edges[1:]) / 2
    return {"x": middles.tolist(), "y": (100 * counts / max(counts.sum(), 1)).tolist()}


def entropy_figure(stats: pd.DataFrame, threshold: float | None) -> Picture:
    """Distribution of the mean router entropy, weighted by how often a token comes."""
    figure = empty_figure("mean router entropy of a token, nats", "share of tokens, %")
    top = float(stats["mean_entropy"].max())
    edges = np.linspace(0, max(top, 1e-6), _BINS + 1)
    layers = np.unique(stats["layer"])
    places = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LINES)).round().astype(int)
    for number, layer in enumerate(layers[places]):
        figure.add_scatter(
            **_distribution(stats[stats["layer"] == layer], "mean_entropy", edges),
            mode="lines",
            line={"color": SERIES[number % len(SERIES)], "width": 2},
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


def frequency_figure(stats: pd.DataFrame) -> Picture:
    """Frequency against entropy: density and Spearman's rho."""
    from scipy.stats import spearmanr

    frequency = stats["frequency"].to_numpy(np.float64)
    entropy = stats["mean_entropy"].to_numpy(np.float64)
    rho = float(spearmanr(frequency, entropy).statistic) if len(stats) > 2 else float("nan")
    counts, x_edges, y_edges = np.histogram2d(np.log10(frequency), entropy, bins=(40, 40))
    figure = empty_figure("occurrences of the token", "mean router entropy, nats", legend=False)
    figure.update_xaxes(**LOGARITHMIC)
    figure.add_heatmap(
        x=(10 ** ((x_edges[:-1] + x_edges[1:]) / 2)).tolist(),
        y=((y_edges[:-1] + y_edges[1:]) / 2).tolist(),
        z=np.log10(1 + counts.T).tolist(),
        text=counts.T.astype(int).tolist(),
        hovertemplate="%{x:.0f} occurrences, %{y:.2f} nats: %{text} entries<extra></extra>",
        colorscale=DENSITY,
        showscale=False,
    )
    return Picture(
        name="frequency-entropy",
        title="Frequency against entropy",
        caption=f"Entries of the table, one per (layer, token); Spearman's rho = {rho:+.2f}. "
        "Were frequent tokens routed more predictably, the entries would fall to the right.",
        figure=figure,
    )


def consistency_figure(stats: pd.DataFrame) -> Picture:
    """How often a token's most frequent first expert is its first expert."""
    figure = empty_figure("routing consistency", "share of tokens, %", height=340, legend=False)
    edges = np.linspace(0, 1, 41)
    figure.add_bar(**_distribution(stats, "routing_consistency", edges), marker={"color": BLUE})
    figure.update_layout(bargap=0.05)
    return Picture(
        name="consistency",
        title="Consistency",
        caption="Share of a token's occurrences whose first expert is the token's usual one; at 1 "
        "the token alone decides, whatever its context.",
        figure=figure,
    )


def hypotheses_section(results: Results) -> Section:
    """Each hypothesis with its test, figure and verdict, and the coverage of the fast path."""
    analysis = results.get("routing")

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
        [
            Table.of("Hypotheses", analysis["hypotheses"], columns, words=5),
            pictures(coverage_figure(analysis)),
            Table.of("Layers", analysis["layers"], layers),
        ],
        intro=f"{analysis['model']} on {analysis['tokens']:,} tokens of {analysis['dataset']}.",
    )


def coverage_figure(analysis: Mapping[str, Any]) -> Picture:
    """Share of tokens on the fast path, by both of its thresholds."""
    coverage = analysis["coverage"]
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
