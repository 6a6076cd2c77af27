"""A forward: experts and tiers of each layer, and its time by the cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from var_moe.report.blocks import Picture, Section, Table, pictures, section
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
    logarithmic,
)

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


_TERMS = {
    "pair": ("expert pairs", BLUE),
    "expert": ("reading experts", TEAL),
    "rest": ("attention, norms, head", GREY),
    "fixed": ("calls of the model", "#b0b4ba"),
    "calls": ("calls of the policy", PURPLE),
    "policy": ("decisions", ORANGE),
    "residual": ("compensation", RED),
}


def speed_section(results: Results) -> Section | None:
    """The cost model's breakdown and how well it fits."""
    cost = results.get("cost")
    if cost is None:
        return None
    setting = cost["setting"]
    return section(
        "speed",
        "Where the time goes",
        [pictures(breakdown_figure(cost, results.winner), fit_figure(cost)), _backends(results)],
        intro=f"A forward of {setting['batch_size']} x {setting['sequence']} tokens, by the cost "
        "model that was fitted to timed forwards of this machine. A timing that the fit did not "
        f"see is predicted within {100 * cost['error_relative']:.1f}% (median).",
    )


def breakdown_figure(cost: Mapping[str, Any], winner: Mapping[str, Any] | None) -> Picture:
    """Milliseconds of each term, for the model as it is, the winner, and the floor.

    Args:
        cost: what ``cost_model.json`` holds.
        winner: the measured row of the configuration that was chosen, if any.
    """
    tokens = cost["setting"]["batch_size"] * cost["setting"]["sequence"]
    shown = {
        name: row
        for row in cost["timings"]
        for name in (row["name"],)
        if row["tokens"] == tokens and name in ("all pairs", "leading pairs")
    }
    works = {"all experts": shown.get("all pairs")}
    if winner:
        works["the winner"] = _work_of(cost, winner, tokens)
    works["leading experts only"] = shown.get("leading pairs")
    there = {name: work for name, work in works.items() if work}
    figure = empty_figure("milliseconds a forward", "", height=140 + 56 * len(there))
    for term, (title, colour) in _TERMS.items():
        seconds = cost["seconds"][f"{term}_s"]
        values = [1000 * seconds * _amount(term, work) for work in there.values()]
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


def _amount(term: str, work: Mapping[str, Any]) -> float:
    keys = {"pair": "pairs", "expert": "experts", "rest": "tokens", "residual": "cut"}
    if term == "fixed":
        return 1.0
    if term == "calls":
        return float(work["decided"] > 0)
    return float(work["decided"] if term == "policy" else work[keys[term]])


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


def fit_figure(cost: Mapping[str, Any]) -> Picture | None:
    """Measured against predicted time of everything that was timed."""
    rows = cost["timings"]
    if not rows:
        return None
    figure = empty_figure("measured, ms", "predicted, ms", height=360, legend=False)
    measured = [1000 * row["seconds"] for row in rows]
    ends = [min(measured), max(measured)]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot"})
    figure.add_scatter(
        x=measured,
        y=[1000 * row["predicted_s"] for row in rows],
        text=[f"{row['name']}<br>{row['tokens']:,.0f} tokens" for row in rows],
        mode="markers",
        marker={"color": BLUE, "size": 9},
    )
    logarithmic(figure, "x", measured)
    logarithmic(figure, "y", measured)
    return Picture(
        name="cost-fit",
        title="Fit of the cost model",
        caption="Each mark is a timed batch; on the line, the prediction is right.",
        figure=figure,
    )


def _backends(results: Results) -> Table | None:
    metadata = results.get("metadata") or {}
    found = metadata.get("baseline", {}).get("backend_throughputs_tps")
    if not found:
        return None
    rows = [(name, f"{tps:,.0f}") for name, tps in sorted(found.items(), key=lambda i: -i[1])]
    return Table(
        title="Transformers' experts backends on this machine",
        headings=("backend", "tokens/s"),
        rows=rows,
        marked=0,
        caption="The baseline of every speedup is the fastest.",
    )
