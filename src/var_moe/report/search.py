"""How a search went: the best so far, speedup against degradation, and each parameter's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import (
    BLUE,
    COLD_TO_HOT,
    GREEN,
    GREY,
    LOGARITHMIC,
    ORANGE,
    PURPLE,
    TALL,
    change,
    empty_figure,
    hover,
    interval_bars,
    limit,
    line_at,
    percent,
    settings,
    speedup,
    tiers,
)

_THIN = {"thickness": 1.2, "width": 3}
PRESETS = ("conservative", "balanced", "aggressive")
LEAST_EVALUATIONS = 20
"""Below this the importance of evaluations says more about chance than about parameters."""

Rows = Sequence[Mapping[str, Any]]


def search_section(results: Results) -> Section:
    """The course of the search and what it left."""
    search, metadata = results.get("search"), results.get("metadata")
    shown = [row for row in search["all_results"] if row.get("speedup") is not None]
    return section(
        "search",
        "The search",
        [
            pictures(
                progress_figure(shown, metadata) if shown else None,
                tradeoff_figure(results, shown),
            ),
            measured_table(metadata, search["best_params"]) if "remeasured" in metadata else None,
            pictures(*slice_figures(shown, metadata)),
            pictures(importance_figure(search, metadata)),
        ],
        intro=_course(search, metadata),
    )


def _course(search: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    failed = metadata.get("search", {}).get("failed", 0)
    text = f"{search['num_evaluations']} full evaluations by the {search['method']} method"
    if metadata.get("replay"):
        text += f", chosen by {metadata['replay']['forecasts']:,} replays of a recorded trace"
    text += f", in {search['optimization_time'] / 60:.1f} minutes"
    return text + (f"; {failed} of them failed." if failed else ".")


def progress_figure(rows: Rows, metadata: Mapping[str, Any]) -> Picture:
    """Speedup of each evaluation, in order, and the best feasible one so far."""
    figure = empty_figure("full evaluation", "speedup on the search text", height=TALL)
    best, course = None, []
    for row in rows:
        if row["feasible"]:
            best = row["speedup"] if best is None else max(best, row["speedup"])
        course.append(best)
    for feasible, name, colour, symbol in (
        (False, "over the bound", GREY, "x"),
        (True, "keeps the bound", BLUE, "circle"),
    ):
        some = {at: row for at, row in enumerate(rows, 1) if bool(row["feasible"]) is feasible}
        if some:
            figure.add_scatter(
                x=list(some),
                y=[row["speedup"] for row in some.values()],
                text=hover(list(some.values())),
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=name,
            )
    figure.add_scatter(
        x=list(range(1, len(rows) + 1)),
        y=course,
        mode="lines",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        name="best so far",
    )
    again = metadata.get("remeasured", ())
    presets = [row for row in again if row["name"] in PRESETS and row["speedup"]]
    if presets:
        symbols = ["diamond" if row["passed"] else "diamond-open" for row in presets]
        figure.add_scatter(
            x=[0] * len(presets),
            y=[row["speedup"] for row in presets],
            text=[f"{row['name']}<br>perplexity {change(row)}" for row in presets],
            mode="markers",
            marker={"symbol": symbols, "color": ORANGE, "size": 10},
            name="presets",
        )
    line_at(figure, "unmodified model", y=1.0)
    caption = (
        "Each mark is one run of the model on the search text; the line is the fastest so far "
        "whose perplexity kept the bound."
    )
    if presets:
        caption += " Presets stand at 0 (open: over the bound), on the text that judges."
    return Picture(name="best-so-far", title="Best feasible so far", caption=caption, figure=figure)


def tradeoff_figure(results: Results, rows: Rows) -> Picture | None:
    """Speedup against degradation: evaluations, front, what was measured again, the bound."""
    metadata, front = results.get("metadata"), results.get("front")
    bound = metadata["max_degradation"]
    if bound is None:
        return None  # a program's own search, of an objective without a bound
    figure = empty_figure("perplexity change, %", "speedup", height=TALL)

    def add(some: Rows, name: str, **style: Any) -> None:
        if some:
            figure.add_scatter(
                x=[100 * row["degradation"] for row in some],
                y=[row["speedup"] for row in some],
                name=name,
                **{"mode": "markers", **style},
            )

    if front:
        forecast = [point for point in front["points"] if not point["verified"]]
        dashes = {"color": GREY, "dash": "dash", "width": 1.5}
        add(forecast, "front, forecast", mode="lines", line=dashes)
    marks = {"color": GREY, "size": 6, "opacity": 0.7}
    add(rows, "on the search text", text=hover(rows), marker=marks)
    again = [row for row in metadata.get("remeasured", ()) if row.get("speedup") is not None]
    held_out = results.get("validation")
    for some, name, colour, symbol in (
        ([row for row in again if not row["passed"]], "over the bound", ORANGE, "circle"),
        ([row for row in again if row["passed"]], "keeps the bound", BLUE, "circle"),
        ([held_out] if held_out else [], "held-out text", PURPLE, "square"),
    ):
        add(
            some,
            name,
            marker={"color": colour, "symbol": symbol, "size": 10},
            error_x={"array": [196 * row["degradation_standard_error"] for row in some], **_THIN},
            error_y=_speed_bars(some),
            text=[
                f"{row.get('name', name)}<br>{settings(row['config'])}<br>perplexity "
                f"{change(row)}<br>{row['experts_per_token']:.2f} experts per token"
                for row in some
            ],
        )
    certified = _certified(results.get("certificate"))
    values = [row["degradation"] for row in certified]
    ends = [row["degradation_interval"] for row in certified]
    add(
        certified,
        "certified",
        marker={"symbol": "star", "size": 15, "color": GREEN},
        error_x=interval_bars(values, ends, scale=100, **_THIN),
        error_y=_speed_bars(certified),
    )
    line_at(figure, f"bound {limit(bound)}", x=100 * bound)
    unmodified = {"degradation": 0.0, "speedup": 1.0}
    add([unmodified], "unmodified", marker={"symbol": "cross", "size": 10, "color": GREY})
    return Picture(
        name="speedup-degradation",
        title="Speedup against degradation",
        caption="Up and left is better. Coloured points were measured on text that was not "
        "searched on; their bars are 95% intervals (of perplexity over documents, of speed over "
        "interleaved blocks). A point counts by the upper end of its perplexity.",
        figure=figure,
    )


def _speed_bars(rows: Rows) -> dict[str, Any]:
    speeds, ends = [row["speedup"] for row in rows], [row["speedup_95"] for row in rows]
    return interval_bars(speeds, ends, **_THIN)


def _certified(certificate: Mapping[str, Any] | None) -> Rows:
    """Figures of the certified configuration, where its speed was measured too."""
    if not certificate or not certificate["certified"]:
        return []
    test = next(t for t in certificate["tests"] if t["name"] == certificate["certified_name"])
    speed = next((c for c in certificate["claims"] if c["name"] == "speedup"), None)
    if speed is None or speed.get("measured") is None:
        return []
    return [{**test, "speedup": speed["measured"], "speedup_95": speed["speedup_95"]}]


def measured_table(metadata: Mapping[str, Any], best: Mapping[str, Any] | None) -> Table | None:
    """What was measured on text that was not searched on; ``best`` is the winner's row."""
    rows, baseline = metadata["remeasured"], metadata["baseline"]
    winner = next((number for number, row in enumerate(rows) if row["config"] == best), None)
    unmodified = {"name": "unmodified model", "perplexity": baseline["perplexity"]}
    unmodified |= {"experts_per_token": metadata["geometry"]["top_k"]}

    def other(one: Any, of_baseline: str = "") -> Any:
        return lambda row: of_baseline if row is unmodified else one(row)

    columns: dict[str, Any] = {
        "": "{name}",
        "perplexity": "{perplexity:.3f}",
        "change (95% upper)": other(change),
        "speedup [95%]": other(speedup, f"1 ({baseline['backend']})"),
        "experts per token": "{experts_per_token:.3f}",
    }
    if any(row["learned_pct"] < 100 for row in rows):
        columns["fast / cached / learned, %"] = other(tiers, "0 / 0 / 100")
    if any(row.get("worst_dataset") for row in rows):
        columns["worst data set"] = _worst
    return Table.of(
        "Measured on text that was not searched on",
        [unmodified, *rows],
        columns,
        marked=None if winner is None else winner + 1,
        caption=f"{metadata['ordering_documents']:,} documents. The marked row wins: the fewest "
        "executed experts among those whose upper bound keeps "
        f"{limit(metadata['max_degradation'])}.",
    )


def _worst(row: Mapping[str, Any]) -> str:
    if not row.get("worst_dataset"):
        return ""
    upper = percent(row["worst_degradation_upper_95"])
    return f"{row['worst_dataset']} {percent(row['worst_degradation'])} ({upper})"


def slice_figures(rows: Rows, metadata: Mapping[str, Any]) -> list[Picture]:
    """Values of each parameter that took several, against speedup, coloured by degradation."""
    space = metadata.get("settings", {}).get("space", {})
    names = [name for name in space if len({row["params"].get(name) for row in rows}) > 1]
    figures = []
    for name in names:
        figure = empty_figure(name, "speedup", height=300, legend=False)
        if space[name].get("log"):
            figure.update_xaxes(**LOGARITHMIC)
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
                "cmax": 200 * metadata["max_degradation"],
                "symbol": ["circle" if row["feasible"] else "x" for row in rows],
                "showscale": len(names) == 1,
                "colorbar": {"title": {"text": "PPL, %", "side": "right"}, "thickness": 10},
            },
        )
        figures.append(
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
    return figures


def importance_figure(search: Mapping[str, Any], metadata: Mapping[str, Any]) -> Picture | None:
    """Parameter importance (Optuna's PED-ANOVA, Watanabe et al. 2023).

    Left out of a search by replay, which evaluates near the bound alone.
    """
    if metadata.get("replay") or "settings" not in metadata:
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
    return Picture(
        name="importance",
        title="Which parameters matter for the score",
        caption=f"PED-ANOVA of {len(rows)} evaluations: how far the best tenth stands apart from "
        "the rest in each parameter. Few evaluations make it uncertain.",
        figure=figure,
    )


def ped_anova(rows: Rows, space: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Shares that sum to 1, the largest first; empty where there is too little to judge by.

    Args:
        rows: complete evaluations with ``params`` and ``score``.
        space: the search space: type, low, high and log, or the choices, of each parameter.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

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
                made = optuna.trial.create_trial(
                    params=params, distributions=known, value=row["score"]
                )
                study.add_trial(made)
        if len(known) < 2 or len(study.trials) < LEAST_EVALUATIONS:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    finally:
        optuna.logging.set_verbosity(level)
