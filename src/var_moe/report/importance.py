"""Which parameters mattered: Sobol indices of the forecasts, or PED-ANOVA of the evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Picture, Section, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import BLUE, ORANGE, empty_figure

LEAST_EVALUATIONS = 20
"""Below this the importance of evaluations says more about chance than about parameters."""


def importance_section(results: Results) -> Section | None:
    """Parameter importance, where there is more than one parameter and enough to judge by."""
    found = pictures(_of_forecasts(results), _of_evaluations(results))
    return section("importance", "Which parameters matter", [found]) if found else None


def _of_forecasts(results: Results) -> Picture | None:
    """Of a grid of forecasts, which covers the search space evenly."""
    sensitivity = results.get("sensitivity")
    if sensitivity is None or len(sensitivity["rows"]) < 2:
        return None
    rows = sensitivity["rows"]
    bars = {
        title: {row["parameter"]: row[key] for row in rows}
        for title, key in (("degradation", "degradation_total"), ("speed", "speedup_total"))
        if key in rows[0]
    }
    return Picture(
        name="sensitivity",
        title="Share of the variance over the whole search space",
        caption=f"Total Sobol indices of {sensitivity['points']:,} forecasts on a full grid: the "
        "share of the variance that a parameter takes part in. They are exact for the grid, and "
        "about its ranges.",
        figure=_bars(bars, "share of the variance, %"),
    )


def _of_evaluations(results: Results) -> Picture | None:
    """Of the model's own evaluations (Optuna's PED-ANOVA, Watanabe et al. 2023)."""
    search, metadata = results.get("search"), results.get("metadata")
    if search is None or metadata.get("replay") or "settings" not in metadata:
        return None  # a search by replay evaluates near the bound alone; a program's has no space
    rows = [row for row in search["all_results"] if row["state"] == "complete"]
    shares = ped_anova(rows, metadata["settings"]["space"])
    if not shares:
        return None
    return Picture(
        name="importance",
        title="Importance for the score",
        caption=f"PED-ANOVA of {len(rows)} evaluations: how far the best tenth stands apart from "
        "the rest in each parameter. Few evaluations make it uncertain.",
        figure=_bars({"score": shares}, "importance, %"),
    )


def ped_anova(
    rows: Sequence[Mapping[str, Any]], space: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Shares that sum to 1, the largest first; empty where there is too little to judge by.

    Args:
        rows: complete evaluations with ``params`` and ``score``.
        space: the search space: type, low, high and log, or the choices, of each parameter.
    """
    import optuna

    distributions: dict[str, Any] = {}
    for name, entry in space.items():
        kind: Any = optuna.distributions.FloatDistribution
        if entry["type"] == "choice":
            distributions[name] = optuna.distributions.CategoricalDistribution(entry["choices"])
            continue
        if entry["type"] == "int":
            kind = optuna.distributions.IntDistribution
        if entry["low"] < entry["high"]:
            distributions[name] = kind(entry["low"], entry["high"], log=entry.get("log", False))
    if len(rows) < LEAST_EVALUATIONS or len(distributions) < 2:
        return {}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize")
        for row in rows:
            params = {name: row["params"][name] for name in distributions}
            inside = {
                n: d for n, d in distributions.items() if d._contains(d.to_internal_repr(params[n]))
            }
            if len(inside) < len(distributions):
                continue  # a preset may lie outside of narrowed bounds
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=distributions, value=row["score"]
                )
            )
        if len(study.trials) < LEAST_EVALUATIONS:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    return {name: float(share) for name, share in found.items()}


def _bars(bars: Mapping[str, Mapping[str, float]], title: str) -> Any:
    names = list(next(iter(bars.values())))
    figure = empty_figure(title, "", height=120 + 44 * len(names), legend=len(bars) > 1)
    for (name, shares), colour in zip(bars.items(), (ORANGE, BLUE), strict=False):
        figure.add_bar(
            y=names,
            x=[100 * shares[one] for one in names],
            orientation="h",
            name=name,
            marker={"color": colour},
        )
    figure.update_yaxes(autorange="reversed")
    return figure
