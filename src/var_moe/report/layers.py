"""Where experts are saved: executed experts and tiers of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Picture, Section, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import BLUE, GREEN, GREY, ORANGE, empty_figure, line_at

_TIERS = (("fast", GREEN), ("cached", ORANGE), ("learned", BLUE))


def layers_section(results: Results) -> Section | None:
    """The configuration that was chosen, or measured, layer by layer."""
    found = _subject(results)
    if found is None:
        return None
    name, row, top_k = found
    if not row.get("experts_per_token_by_layer"):
        return None
    return section(
        "layers",
        "Layer by layer",
        [pictures(experts_figure(row, top_k), tiers_figure(row))],
        intro=f"Of {name}.",
    )


def _subject(results: Results) -> tuple[str, Mapping[str, Any], int] | None:
    """Whose layers are shown: what was measured on held-out text, else the winner of a search."""
    validation = results.get("validation")
    if validation:
        return (
            f"the configuration on {validation['text']['split']}",
            validation,
            validation["top_k"],
        )
    row = results.winner
    return (f"the winner ({row['name']})", row, row["top_k"]) if row else None


def experts_figure(row: Mapping[str, Any], top_k: int) -> Picture:
    """Executed experts per token of each layer."""
    executed: Sequence[float] = row["experts_per_token_by_layer"]
    figure = empty_figure("layer", "experts per token", height=320, legend=False)
    mean = row["experts_per_token"]
    figure.add_bar(
        x=list(range(len(executed))),
        y=list(executed),
        marker={"color": BLUE},
        text=[f"{value:.2f}" for value in executed] if len(executed) <= 16 else None,
    )
    line_at(figure, f"unmodified model {top_k}", y=top_k)
    # Above the bars, where its name hides no figure of theirs.
    line_at(figure, f"mean {mean:.2f}", y=mean, position="top left")
    figure.update_traces(textposition="inside", insidetextanchor="start")
    figure.update_yaxes(range=[0, top_k * 1.1])
    figure.update_xaxes(dtick=max(1, len(executed) // 12))
    return Picture(
        name="experts-by-layer",
        title="Executed experts per token",
        caption="Only executed experts take time. Layers share the budget by what a cut costs in "
        "each.",
        figure=figure,
    )


def tiers_figure(row: Mapping[str, Any]) -> Picture | None:
    """Which tier decided, by layer; nothing where the router always did."""
    counts: Sequence[Sequence[int]] = row.get("tiers_by_layer") or ()
    if not counts or not any(fast or cached for fast, cached, _ in counts):
        return None
    figure = empty_figure("layer", "share of tokens, %", height=320)
    for place, (name, colour) in enumerate(_TIERS):
        figure.add_bar(
            x=list(range(len(counts))),
            y=[100 * layer[place] / max(sum(layer), 1) for layer in counts],
            name=name,
            marker={"color": colour, "line": {"color": GREY, "width": 0}},
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(dtick=max(1, len(counts) // 12))
    return Picture(
        name="tiers-by-layer",
        title="Which tier decided",
        caption="Fast: the static table; cached: a decision of the same context; learned: the "
        "model's router.",
        figure=figure,
    )
