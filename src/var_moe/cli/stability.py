"""``var-moe stability``: what searches that differ in their seed alone agree on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_moe.cli.output import Answer


def stability(
    folders: list[Path],
    *,
    output: Path | None = None,
    profile: Path | None = None,
) -> Answer:
    """Tell how much the answer of `var-moe tune` depends on its seed.

    Args:
        folders: results folders that differ in their seed alone, as results/run_*.
        output: folder for stability.json; by default the one that holds the first.
        profile: profile folder, where none lies in the results folders.
    """
    from var_moe.cli.report import make_report
    from var_moe.optimization.seed_runs import read_runs
    from var_moe.optimization.stability import save_stability
    from var_moe.optimization.stability import stability as report_of
    from var_moe.storage import check_output_folder

    place = check_output_folder(output or folders[0].resolve().parent)
    report = report_of(read_runs(folders), profile=profile)
    path = save_stability(place, report)
    print_stability(report)
    print(f"Saved: {path}")
    make_report(place)
    return Answer(report)


def print_stability(report: Mapping[str, Any]) -> None:
    """The runs, the spreads and the agreement as tables."""
    from var_moe.terminal import show

    show(_runs(report))
    criterion = report["criterion"]
    for name in ("best_score", "experts_per_token"):
        found = report[name]
        if found is not None:
            show(
                f"{name.replace('_', ' ')}: mean {found['mean']:.4f}, sd "
                f"{found['standard_deviation']:.4f}, {found['min']:.4f} to {found['max']:.4f}, "
                f"spread {100 * found['spread_relative']:.2f}%",
            )
    met = "yes" if criterion["met"] else "NO"
    show(f"{criterion['name']}: {met}")
    if report["parameters"]:
        show(_parameters(report))
    if report["agreement"] is not None:
        show(_agreement(report))
    for note in report["notes"]:
        show(f"Note: {note}")


def _runs(report: Mapping[str, Any]) -> Any:
    from var_moe.optimization.summary import figures_table

    about = report["search"]
    table = figures_table(
        f"{about['model']} on {about['dataset']}, bound {100 * about['max_degradation']:g}%, "
        f"{len(report['seeds'])} seeds",
        *(
            "seed",
            "best score",
            "speedup [95%]",
            "change (95% upper)",
            "experts/token",
            "documents",
        ),
    )
    for row in report["runs"]:
        if not row["found"]:
            table.add_row(str(row["seed"]), "nothing kept the bound", "", "", "", "")
            continue
        low, high = row["speedup_95"]
        worst = "worst_" if "worst_degradation" in row else ""
        change, upper = row[f"{worst}degradation"], row[f"{worst}degradation_upper_95"]
        table.add_row(
            str(row["seed"]),
            f"{row['best_score']:.4f}",
            f"{row['speedup']:.3f} [{low:.3f}, {high:.3f}]",
            f"{100 * change:+.2f}% ({100 * upper:+.2f}%)",
            f"{row['experts_per_token']:.3f}",
            f"{row['documents']:,}",
        )
    return table


def _parameters(report: Mapping[str, Any]) -> Any:
    from var_moe.optimization.summary import figures_table

    headings = ("parameter", "mean", "sd", "min", "max", "searched", "spread / range")
    table = figures_table("Settings of the winners", *headings)
    for row in report["parameters"]:
        low, high = row["searched_low"], row["searched_high"]
        log = " (log)" if row["logarithmic"] else ""
        table.add_row(
            row["name"],
            *(f"{row[name]:.4g}" for name in ("mean", "standard_deviation", "min", "max")),
            f"{low:g} to {high:g}{log}",
            f"{100 * row['spread_share_of_range']:.1f}%",
        )
    return table


def _agreement(report: Mapping[str, Any]) -> Any:
    from var_moe.optimization.summary import figures_table

    found = report["agreement"]
    seeds = [row["seed"] for row in found["winners"]]
    alike = {tuple(pair["seeds"]): pair["alike_pct"] for pair in found["pairs"]}
    table = figures_table(
        f"The winners on one trace of {found['trace']['tokens']:,} tokens; decisions alike, %",
        *("seed", "experts/token", "predicted change", *(f"as {seed}" for seed in seeds)),
    )
    for row in found["winners"]:
        change, own = row["predicted_degradation"], row["seed"]
        table.add_row(
            str(own),
            f"{row['experts_per_token']:.3f}",
            "" if change is None else f"{100 * change:+.2f}%",
            *(_share(alike, own, other) for other in seeds),
        )
    return table


def _share(alike: Mapping[tuple[int, ...], float], one: int, other: int) -> str:
    if one == other:
        return ""
    return f"{alike.get((one, other), alike.get((other, one), 0.0)):.2f}"
