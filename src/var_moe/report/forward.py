"""A forward: experts and tiers of each layer, and its time by the cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from var_moe.evaluation.cost import CostModel

_TIERS = (("fast", GREEN), ("cached", ORANGE), ("learned", BLUE))


def layers_section(results: Results) -> Section:
    """What was measured on held-out text, else the winner of a search, layer by layer."""
    held_out = results.get("validation")
    row = held_out or results.winner or {}
    name = "the configuration" if held_out else f"the winner ({row.get('name')})"
    return section(
        "layers",
        "Layer by layer",
        pictures(experts_figure(row), tiers_figure(row)),
        intro=f"Of {name}.",
    )


def experts_figure(row: Mapping[str, Any]) -> Picture | None:
    """Executed experts per token of each layer, where they were counted."""
    executed: Sequence[float] = row.get("experts_per_token_by_layer") or ()
    if not executed:
        return None
    figure = empty_figure("layer", "experts per token", height=320, legend=False)
    mean, top_k = row["experts_per_token"], row["top_k"]
    figure.add_bar(
        x=list(range(len(executed))),
        y=list(executed),
        marker={"color": BLUE},
        text=[f"{value:.2f}" for value in executed] if len(executed) <= 16 else None,
        textposition="inside",
        insidetextanchor="start",
    )
    line_at(figure, f"unmodified model {top_k}", y=top_k)
    # Above the bars, where its name hides no figure of theirs.
    line_at(figure, f"mean {mean:.2f}", y=mean, position="top left")
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
    if not any(fast or cached for fast, cached, _ in counts):
        return None
    figure = empty_figure("layer", "share of tokens, %", height=320)
    for place, (name, colour) in enumerate(_TIERS):
        figure.add_bar(
            x=list(range(len(counts))),
            y=[100 * layer[place] / max(sum(layer), 1) for layer in counts],
            name=name,
            marker={"color": colour},
        )
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
"""Term of the cost model -> its name and colour."""


def speed_section(results: Results) -> Section:
    """The cost model's breakdown and how well it fits."""
    from var_moe.evaluation.cost import CostModel

    cost = CostModel.from_dict(results["cost"], source=str(results.folder / "cost_model.json"))
    return section(
        "speed",
        "Where the time goes",
        pictures(breakdown_figure(cost, results.winner)),
        intro=f"A forward of {cost.setting.described}, by the "
        "cost model that was fitted to timed forwards of this machine. A timing that the fit did "
        f"not see is predicted within {100 * cost.error:.1f}% (median).",
    )


def breakdown_figure(cost: CostModel, winner: Mapping[str, Any] | None) -> Picture:
    """Milliseconds of each term, for the model as it is, the winner if any, and the floor."""
    layers, leading = cost.layers, -(-cost.top_k // 2)
    works = {"all experts": cost.work([cost.top_k] * layers, tokens=1, decided=False)}
    if winner and winner.get("experts_per_token_by_layer"):
        executed = winner["experts_per_token_by_layer"]
        works["the winner"] = cost.work(executed, tokens=1, residual=True)
    works["leading experts only"] = cost.work([leading] * layers, tokens=1, decided=False)
    figure = empty_figure("milliseconds a forward", "", height=140 + 56 * len(works))
    seconds = [cost.breakdown(work) for work in works.values()]
    for term, (title, colour) in _TERMS.items():
        values = [1000 * float(one[term]) for one in seconds]
        if max(values) > 0:
            figure.add_bar(
                y=list(works), x=values, orientation="h", name=title, marker={"color": colour}
            )
    figure.add_scatter(
        y=["all experts"],
        x=[1000 * cost.baseline],
        mode="markers",
        marker={"symbol": "line-ns", "size": 26, "line": {"width": 3, "color": GREEN}},
        name="unmodified, measured",
    )
    figure.update_yaxes(autorange="reversed")
    return Picture(
        name="cost-breakdown",
        title="Breakdown of a forward",
        caption="Only expert pairs and reading experts shrink with fewer executed experts; what "
        "else is there bounds the speedup.",
        figure=figure,
    )
