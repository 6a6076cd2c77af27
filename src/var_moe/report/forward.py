"""A forward: experts and tiers of each layer, and its time by the cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from var_moe.report.blocks import Picture, Section, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    empty_figure,
    line_at,
)

_TIERS = (("fast", GREEN), ("cached", ORANGE), ("learned", BLUE))


def layers_section(results: Results) -> Section | None:
    """What was measured on held-out text, else the winner of a search, layer by layer."""
    row = results.get("validation")
    if row is not None:
        name = f"the configuration on {row['text']['split']}"
    else:
        row = results.winner
        name = f"the winner ({row['name']})" if row else ""
    if not row or not row.get("experts_per_token_by_layer"):
        return None
    return section(
        "layers",
        "Layer by layer",
        [pictures(experts_figure(row, row["top_k"]), tiers_figure(row))],
        intro=f"Of {name}.",
    )


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


# Term of the cost model -> its name, colour, and the entry of the work that it is multiplied by.
_TERMS = {
    "pair": ("expert pairs", BLUE, "pairs"),
    "expert": ("reading experts", TEAL, "experts"),
    "rest": ("attention, norms, head", GREY, "tokens"),
    "fixed": ("calls of the model", "#b0b4ba", "forwards"),
    "calls": ("calls of the policy", PURPLE, "calls"),
    "policy": ("decisions", ORANGE, "decided"),
    "residual": ("compensation", RED, "cut"),
}


def speed_section(results: Results) -> Section:
    """The cost model's breakdown and how well it fits."""
    cost = results.get("cost")
    setting = cost["setting"]
    return section(
        "speed",
        "Where the time goes",
        [pictures(breakdown_figure(cost, results.winner))],
        intro=f"A forward of {setting['batch_size']} x {setting['sequence']} tokens, by the cost "
        "model that was fitted to timed forwards of this machine. A timing that the fit did not "
        f"see is predicted within {100 * cost['error_relative']:.1f}% (median).",
    )


def breakdown_figure(cost: Mapping[str, Any], winner: Mapping[str, Any] | None) -> Picture:
    """Milliseconds of each term, for the model as it is, the winner if any, and the floor."""
    tokens = cost["setting"]["batch_size"] * cost["setting"]["sequence"]
    shown = {row["name"]: row for row in cost["timings"] if row["tokens"] == tokens}
    works = {"all experts": shown.get("all pairs")}
    if winner:
        works["the winner"] = _work_of(cost, winner, tokens)
    works["leading experts only"] = shown.get("leading pairs")
    there = {
        name: {**work, "forwards": 1, "calls": int(work["decided"] > 0)}
        for name, work in works.items()
        if work
    }
    figure = empty_figure("milliseconds a forward", "", height=140 + 56 * len(there))
    for term, (title, colour, amount) in _TERMS.items():
        seconds = cost["seconds"][f"{term}_s"]
        values = [1000 * seconds * work[amount] for work in there.values()]
        if max(values, default=0) > 0:
            figure.add_bar(
                y=list(there), x=values, orientation="h", name=title, marker={"color": colour}
            )
    figure.add_scatter(
        y=[next(iter(there))],
        x=[1000 * cost["baseline_s"]],
        mode="markers",
        marker={"symbol": "line-ns", "size": 26, "line": {"width": 3, "color": GREEN}},
        name="unmodified, measured",
    )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed")
    return Picture(
        name="cost-breakdown",
        title="Breakdown of a forward",
        caption="Only expert pairs and reading experts shrink with fewer executed experts; what "
        "else is there bounds the speedup.",
        figure=figure,
    )


def _work_of(
    cost: Mapping[str, Any], row: Mapping[str, Any], tokens: int
) -> dict[str, float] | None:
    """What a forward executes with a measured configuration's experts per token."""
    layers = row.get("experts_per_token_by_layer")
    if not layers:
        return None
    pairs = np.array(layers) * tokens
    experts = cost["experts"]
    read = experts * -np.expm1(pairs * np.log1p(-1 / experts)) if experts > 1 else 1 + 0 * pairs
    top_k = cost["top_k"]
    dropped = tokens * top_k * cost["layers"] - pairs.sum()
    return {
        "tokens": tokens,
        "pairs": float(pairs.sum()),
        "experts": float(read.sum()),
        "decided": tokens,
        "cut": float(dropped / max(top_k - -(-top_k // 2), 1)),
    }
