"""How much a search's answer depends on its seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Notes, Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import BLUE, empty_figure, interval_bars, line_at
from var_moe.report.wording import change, setting, settings, speedup


def seeds_section(results: Results) -> Section | None:
    """The searches of several seeds, side by side."""
    found = results.get("stability")
    if found is None:
        return None
    return section(
        "seeds",
        f"{len(found['seeds'])} seeds",
        [
            _runs(found),
            pictures(speeds_figure(found), winners_figure(found)),
            _parameters(found),
            _pairs(found),
            Notes(lines=found["notes"]) if found["notes"] else None,
        ],
        intro=_verdict(found),
    )


def _verdict(found: Mapping[str, Any]) -> str:
    score, experts = found["best_score"], found["experts_per_token"]
    if score is None:
        return "Fewer than two seeds found a configuration: there is nothing to compare."
    word = "Stable" if found["criterion"]["met"] else "Not stable"
    return (
        f"{word} by the criterion ({found['criterion']['name']}): scores spread by "
        f"{100 * score['spread_relative']:.1f}%, which is partly the machine's timing; experts per "
        f"token, free of timing, by {100 * experts['spread_relative']:.1f}%."
    )


def _runs(found: Mapping[str, Any]) -> Table:
    rows = [
        (
            str(run["seed"]),
            change(run),
            speedup(run),
            f"{run['experts_per_token']:.3f}",
            settings(run["config"]),
        )
        if run["found"]
        else (str(run["seed"]), "nothing kept the bound", "", "", "")
        for run in found["runs"]
    ]
    headings = ("seed", "change (95% upper)", "speedup [95%]", "experts per token", "winner")
    return Table(title="Winners", headings=headings, rows=rows)


def speeds_figure(found: Mapping[str, Any]) -> Picture | None:
    """The measured speedup of each seed's winner."""
    runs = [run for run in found["runs"] if run["found"] and run["speedup"] is not None]
    if not runs:
        return None
    figure = empty_figure("seed", "speedup", height=340, legend=False)
    speeds = [run["speedup"] for run in runs]
    figure.add_scatter(
        x=[str(run["seed"]) for run in runs],
        y=speeds,
        error_y=interval_bars(speeds, [run["speedup_95"] for run in runs]),
        mode="markers",
        marker={"color": BLUE, "size": 10},
    )
    figure.update_xaxes(type="category")
    line_at(figure, "unmodified model", y=1.0)
    return Picture(
        name="seeds-speeds",
        title="Speedups",
        caption="Bars are 95% intervals over interleaved blocks: winners that run equally many "
        "experts differ by the machine's timing alone.",
        figure=figure,
    )


def winners_figure(found: Mapping[str, Any]) -> Picture | None:
    """Perplexity and experts per token of each seed's winner, where winners differ."""
    runs = [run for run in found["runs"] if run["found"]]
    if len({run["experts_per_token"] for run in runs}) < 2:
        return None
    figure = empty_figure("experts per token", "perplexity change, %", height=340, legend=False)
    figure.add_scatter(
        x=[run["experts_per_token"] for run in runs],
        y=[100 * run["degradation"] for run in runs],
        error_y={"array": [196 * run["degradation_standard_error"] for run in runs]},
        text=[str(run["seed"]) for run in runs],
        mode="markers+text",
        textposition="middle right",
        marker={"color": BLUE, "size": 10},
    )
    return Picture(
        name="seeds-winners",
        title="The winners",
        caption="Each mark is a seed; bars are 95% intervals over documents. Seeds that agree lie "
        "within them.",
        figure=figure,
    )


def _parameters(found: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            one["name"],
            *(setting(float(one[key])) for key in ("mean", "standard_deviation", "min", "max")),
            f"{100 * one['spread_share_of_range']:.1f}%",
        )
        for one in found["parameters"]
    ]
    headings = ("parameter", "mean", "s.d.", "smallest", "largest", "share of the range")
    return Table(title="Parameters of the winners", headings=headings, rows=rows) if rows else None


def _pairs(found: Mapping[str, Any]) -> Table | None:
    compared = found["agreement"]
    if compared is None:
        return None
    alike = {frozenset(pair["seeds"]): f"{pair['alike_pct']:.2f}" for pair in compared["pairs"]}
    seeds = list(dict.fromkeys(seed for pair in compared["pairs"] for seed in pair["seeds"]))
    return Table(
        title="Agreement on common text",
        headings=("seed", *map(str, seeds)),
        rows=[
            (str(one), *(alike.get(frozenset((one, other)), "") for other in seeds))
            for one in seeds
        ],
        caption="Share of (layer, token), in percent, for which two winners run the same experts.",
    )
