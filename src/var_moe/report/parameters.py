"""Each parameter's part in a search: slices, all of them side by side, and which mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Picture, Section, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import BLUE, COLD_TO_HOT, empty_figure, logarithmic
from var_moe.report.wording import hover

LEAST_EVALUATIONS = 20
"""Below this the importance of evaluations says more about chance than about parameters."""


def varied(rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> list[str]:
    """Parameters of the search space that took more than one value."""
    space = metadata.get("settings", {}).get("space", ())
    return [name for name in space if len({row["params"].get(name) for row in rows}) > 1]


def slice_figures(rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> list[Picture]:
    """Each parameter's values against speedup, coloured by degradation."""
    names = varied(rows, metadata)
    found = []
    for name in names:
        space, bound = metadata["settings"]["space"], 100 * metadata["max_degradation"]
        figure = empty_figure(name, "speedup", height=300, legend=False)
        if space[name].get("log"):
            logarithmic(figure, "x", [row["params"][name] for row in rows])
        figure.add_scatter(
            x=[row["params"][name] for row in rows],
            y=[row["speedup"] for row in rows],
            text=hover(rows),
            mode="markers",
            marker={
                "size": 8,
                "color": [100 * row["degradation"] for row in rows],
                "colorscale": COLD_TO_HOT,
                "cmin": 0,
                "cmax": 2 * bound,
                "symbol": ["circle" if row["feasible"] else "x" for row in rows],
                "showscale": len(names) == 1,
                "colorbar": {"title": {"text": "PPL, %", "side": "right"}, "thickness": 10},
            },
        )
        found.append(
            Picture(
                name=f"slice-{name.replace('_', '-')}",
                title=name,
                caption="Colour: perplexity change, green 0 to red at twice the bound; crosses "
                "are over the bound."
                if name == names[0]
                else "",
                figure=figure,
                small=len(names) > 1,
            )
        )
    return found


def parallel_figure(
    rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]
) -> Picture | None:
    """All parameters of all evaluations at once, where there are several."""
    import plotly.graph_objects as go

    names = varied(rows, metadata)
    if len(names) < 2 or len(rows) < 3:
        return None
    axes = [_axis(name, [row["params"][name] for row in rows]) for name in names]
    axes.append({"label": "PPL change, %", "values": [100 * row["degradation"] for row in rows]})
    axes.append({"label": "speedup", "values": [row["speedup"] for row in rows]})
    figure = empty_figure("", "", height=400, legend=False)
    figure.update_layout(margin={"l": 60, "r": 60, "t": 50, "b": 24})
    figure.add_trace(
        go.Parcoords(
            dimensions=axes,
            line={
                "color": [100 * row["degradation"] for row in rows],
                "colorscale": COLD_TO_HOT,
                "cmin": 0,
                "cmax": 200 * metadata["max_degradation"],
            },
        )
    )
    return Picture(
        name="parallel",
        title="All parameters together",
        caption="A line is an evaluation; drag along an axis to choose some. Green lines cost "
        "little perplexity, red ones twice the bound or more.",
        figure=figure,
        least_width=760,
    )


def _axis(name: str, values: list[Any]) -> dict[str, Any]:
    """One of parallel axes; names stand at whole numbers."""
    if not any(isinstance(value, str) for value in values):
        return {"label": name, "values": values}
    known = list(dict.fromkeys(values))
    places = list(range(len(known)))
    return {
        "label": name,
        "values": [known.index(value) for value in values],
        "tickvals": places,
        "ticktext": known,
    }


def importance_section(results: Results) -> Section | None:
    """Parameter importance (Optuna's PED-ANOVA, Watanabe et al. 2023).

    Left out of a search by replay, which evaluates near the bound alone.
    """
    search, metadata = results.get("search"), results.get("metadata")
    if search is None or metadata.get("replay") or "settings" not in metadata:
        return None
    rows = [row for row in search["all_results"] if row["state"] == "complete"]
    shares = ped_anova(rows, metadata["settings"]["space"])
    if not shares:
        return None
    figure = empty_figure("importance, %", "", height=120 + 44 * len(shares), legend=False)
    figure.add_bar(
        y=list(shares),
        x=[100 * share for share in shares.values()],
        orientation="h",
        marker={"color": BLUE},
    )
    figure.update_yaxes(autorange="reversed")
    picture = Picture(
        name="importance",
        title="Importance for the score",
        caption=f"PED-ANOVA of {len(rows)} evaluations: how far the best tenth stands apart from "
        "the rest in each parameter. Few evaluations make it uncertain.",
        figure=figure,
    )
    return section("importance", "Which parameters matter", [pictures(picture)])


def ped_anova(
    rows: Sequence[Mapping[str, Any]], space: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Shares that sum to 1, the largest first; empty where there is too little to judge by.

    Args:
        rows: complete evaluations with ``params`` and ``score``.
        space: the search space: type, low, high and log, or the choices, of each parameter.
    """
    import optuna
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    known: dict[str, Any] = {}
    for name, entry in space.items():
        if entry["type"] == "choice":
            known[name] = CategoricalDistribution(entry["choices"])
        elif entry["low"] < entry["high"]:
            kind: Any = IntDistribution if entry["type"] == "int" else FloatDistribution
            known[name] = kind(entry["low"], entry["high"], log=entry.get("log", False))
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize")
        for row in rows:
            params = {name: row["params"][name] for name in known}
            # A preset may lie outside of narrowed bounds.
            if all(d._contains(d.to_internal_repr(params[n])) for n, d in known.items()):
                study.add_trial(
                    optuna.trial.create_trial(
                        params=params, distributions=known, value=row["score"]
                    )
                )
        if len(known) < 2 or len(study.trials) < LEAST_EVALUATIONS:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    finally:
        optuna.logging.set_verbosity(level)
