"""Which parameters mattered, by PED-ANOVA of the evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Picture, Section, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import BLUE, empty_figure

LEAST_EVALUATIONS = 20
"""Below this the importance of evaluations says more about chance than about parameters."""


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
