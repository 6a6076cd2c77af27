"""The result files of a search, and the tables for people."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.optimization.objective_protocol import LEARNED_TARGET_PCT
from var_moe.optimization.progress import duration
from var_moe.optimization.results import OptimizationResult, jsonable
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    atomic_write_text,
    check_output_folder,
    provenance,
)
from var_moe.terminal import WIDTH, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from var_moe.evaluation.evaluator import Apart
    from var_moe.evaluation.throughput import Ratio
    from var_moe.optimization.measure_again import Remeasured

CONFIG_FILE = "best_config.json"
RESULTS_FILE = "optimization_results.json"
METADATA_FILE = "optimization_metadata.json"
SUMMARY_FILE = "optimization_summary.txt"
NEAREST_MISS_FILE = "nearest_miss.json"
UNFINISHED = "unfinished"
"""In a result's `extra`: why its best was not measured again, so that there is none to save."""

SPEEDUP_TARGET = 1.3
STABLE_WITHIN = 0.03
STABLE = "stable: all runs feasible, speedups within 3%"


def save_optimization_results(
    result: OptimizationResult,
    dir: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    summary: str | None = None,
) -> None:
    """Write a search's files into the folder `dir`, each whole or not at all.

    ``best_config.json``, ``optimization_results.json``, ``optimization_metadata.json`` and
    ``optimization_summary.txt``. Where nothing was feasible, ``nearest_miss.json`` takes the
    place of ``best_config.json``; where every evaluation failed there is neither. One that an
    earlier search left is removed. What
    JSON has no word for (NaN) is written as null.

    Args:
        result: the search.
        dir: folder, created if needed.
        metadata: further entries of the metadata, over those that are always there.
        summary: text of the summary; a short one by default.

    Raises:
        UsageError: `dir` is a file or cannot be written.
    """
    folder = check_output_folder(dir)
    origin = provenance()
    best = result.best_params
    config = jsonable(best) if isinstance(best, dict) else best.to_dict()
    failed = bool(result.evaluations) and all(one.failed for one in result.evaluations)
    found = not failed and not {"nearest_miss", UNFINISHED} & set(result.extra)
    atomic_write_json(
        folder / RESULTS_FILE,
        {
            "schema_version": SCHEMA_VERSION,
            "best_score": jsonable(result.best_score),
            "best_params": config if found else None,
            "optimization_time": jsonable(result.optimization_time),
            "num_evaluations": result.num_evaluations,
            "converged": result.converged,
            "method": result.method,
            "seed": result.seed,
            "all_results": result.all_results,
            "provenance": origin,
        },
    )
    atomic_write_json(
        folder / METADATA_FILE,
        jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "method": result.method,
                "seed": result.seed,
                "max_degradation": result.max_degradation,
                "search": result.extra,
                "provenance": origin,
                **(metadata or {}),
            }
        ),
    )
    atomic_write_text(folder / SUMMARY_FILE, summary or default_summary(result))
    if found:
        (folder / NEAREST_MISS_FILE).unlink(missing_ok=True)
        atomic_write_json(folder / CONFIG_FILE, config)
    else:
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        (folder / NEAREST_MISS_FILE).unlink(missing_ok=True)
        if "nearest_miss" in result.extra:
            atomic_write_json(folder / NEAREST_MISS_FILE, jsonable(result.extra["nearest_miss"]))


def default_summary(result: OptimizationResult) -> str:
    """A few lines for people about a search of any objective."""
    best = result.best_params
    params = best if isinstance(best, dict) else best.documented()
    failed = sum(e.failed for e in result.evaluations)
    lines = [
        f"{result.method} search, seed {result.seed}",
        f"{result.num_evaluations} evaluations ({failed} failed) in "
        f"{duration(result.optimization_time)}",
        f"best score: {result.best_score:.6g}",
        f"converged: {'yes' if result.converged else 'no'}",
    ]
    if UNFINISHED in result.extra:
        lines.append(f"Not finished, so no best_config.json: {result.extra[UNFINISHED]}")
    elif failed and failed == len(result.evaluations):
        lines.append("Every evaluation failed; no best_config.json")
    elif "nearest_miss" not in result.extra:
        lines += ["best parameters:", *(f"  {name} = {value}" for name, value in params.items())]
    else:
        degradation = 100 * result.extra["nearest_miss"]["degradation"]
        lines.append(
            "All configurations violate the constraint; no best_config.json. Smallest "
            f"degradation: {degradation:.2f}% ({NEAREST_MISS_FILE})"
        )
    return "\n".join(lines) + "\n"


MET = {True: "yes", False: "NO", None: "-"}
"""How a criterion's `met` is shown."""


def result_table(rows: Sequence[Remeasured], *, baseline_tps: float | None, top_k: int) -> Any:
    """One row per configuration, the unmodified model first."""
    from rich.table import Table

    table = Table(title="Measured on text that was not searched on", title_justify="left")
    for heading in (
        "configuration",
        "PPL",
        "change (95% upper)",
        "speedup [95%]",
        "experts/token",
        "fast/cached/learned %",
    ):
        table.add_column(heading, justify="left" if heading == "configuration" else "right")
    if any(row.quality.worst for row in rows):
        table.add_column("worst data set (95% upper)", justify="right")
    if rows:
        ppl = rows[0].quality.change.baseline_perplexity
        speed = "1.00" if baseline_tps is None else f"1.00 ({baseline_tps:,.0f} tokens/s)"
        table.add_row("baseline", f"{ppl:.3f}", "", speed, f"{top_k:.2f}", "0 / 0 / 100")
    for row in rows:
        change, report, speedup = row.quality.change, row.quality.report, row.speed
        table.add_row(
            row.name,
            f"{change.perplexity:.3f}",
            f"{100 * change.value:+.2f}% ({100 * change.upper:+.2f}%)",
            f"{speedup.speedup.median:.3f} [{speedup.speedup.low:.3f}, {speedup.speedup.high:.3f}]"
            if speedup
            else "over the bound",
            f"{report.experts_per_token:.3f}",
            f"{report.fast_pct:.1f} / {report.cached_pct:.1f} / {report.learned_pct:.1f}",
            *_worst(row),
        )
    return table


def _worst(row: Remeasured) -> list[str]:
    worst = row.quality.worst
    if worst is None:
        return []
    change = worst.change
    return [f"{worst.dataset} {100 * change.value:+.2f}% ({100 * change.upper:+.2f}%)"]


def figures_table(title: str, *headings: str) -> Any:
    """An empty table: the first column to the left, figures to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def apart_table(rows: Sequence[Mapping[str, Any]], *, title: str) -> Any:
    """One row per data set, from what `evaluation.evaluator.Apart.to_dict` gives."""
    table = figures_table(
        title,
        *("data set", "documents", "PPL baseline", "PPL", "change (95% upper)"),
        *("experts/token", "fast/cached/learned %"),
    )
    for row in rows:
        table.add_row(
            row["dataset"],
            f"{row['documents']:,}",
            f"{row['baseline_perplexity']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{100 * row['degradation']:+.2f}% ({100 * row['degradation_upper_95']:+.2f}%)",
            f"{row['experts_per_token']:.3f}",
            f"{row['fast_pct']:.1f} / {row['cached_pct']:.1f} / {row['learned_pct']:.1f}",
        )
    return table


def summary_parts(
    *,
    best: Remeasured | None,
    others: Sequence[Remeasured],
    apart: Sequence[Apart] = (),
    answer: str,
    notes: Sequence[str],
    max_degradation: float,
    top_k: int,
) -> list[RenderableType]:
    """What is printed at the end and stands in ``optimization_summary.txt``."""
    from rich.table import Table

    rows = [*([best] if best else []), *others]
    tps = next((row.speed.baseline_tps for row in rows if row.speed), None)
    parts: list[RenderableType] = [answer, ""]
    if rows:
        parts += [result_table(rows, baseline_tps=tps, top_k=top_k), ""]
    if apart:
        title = f"{rows[0].name if best else 'Nearest miss'}, each data set by itself"
        parts += [apart_table([one.to_dict() for one in apart], title=title), ""]
    if best and best.speed:
        back, skip = best.speed.backend_factor, best.speed.skipping_factor
        if back and skip:
            parts.append(
                f"Speedup against {best.speed.baseline_backend}, the fastest Hugging Face experts "
                f"backend here: {best.speed.speedup.median:.3f} ~ backend {back.median:.3f} "
                f"({best.speed.backend}) x skipping {skip.median:.3f}."
            )
        parts.append(f"Best configuration: {best.config.documented()} ({best.config.kind})")
        criteria = Table(title="Success criteria", title_justify="left")
        for heading in ("criterion", "measured", "met"):
            criteria.add_column(heading)
        for row in success_criteria(
            degradation=best.quality.judged.value,
            upper=best.quality.judged.upper,
            max_degradation=max_degradation,
            speedups=[best.speed.speedup],
            learned_pct=best.quality.report.learned_pct,
        ):
            criteria.add_row(row["name"], row["measured"], MET[row["met"]])
        parts += ["", criteria]
    parts += [f"Note: {note}" for note in notes]
    return parts


def as_text(parts: Sequence[RenderableType]) -> str:
    """The parts as plain text."""
    buffer = io.StringIO()
    show(*parts, stream=buffer, width=WIDTH)
    return buffer.getvalue()


def success_criteria(
    *,
    degradation: float,
    upper: float,
    max_degradation: float,
    speedups: Sequence[Ratio],
    learned_pct: float,
) -> list[dict[str, Any]]:
    """One row per criterion: name, met (None: not measured), measured.

    Args:
        degradation: relative perplexity change.
        upper: its one-sided 95% upper bound.
        max_degradation: the bound on it.
        speedups: measured speedup of each run; stability needs at least two. The middle one is
            judged by the low end of its interval: on a disturbed machine the figure alone lies.
        learned_pct: share of decisions left to the router, in percent.
    """
    speedups = sorted(speedups, key=lambda one: one.median)
    middle = speedups[len(speedups) // 2]
    rows = [
        {
            "name": f"degradation < {100 * max_degradation:g}% (by its 95% upper bound)",
            "met": upper < max_degradation,
            "measured": f"{100 * degradation:+.2f}% (95% upper bound {100 * upper:+.2f}%)",
        },
        {
            "name": f"speedup > {SPEEDUP_TARGET}x (by its 95% interval)",
            "met": middle.low > SPEEDUP_TARGET,
            "measured": f"{middle.median:.3f}x [{middle.low:.3f}, {middle.high:.3f}]",
        },
        {
            "name": f"learned routing < {LEARNED_TARGET_PCT:g}%",
            "met": learned_pct < LEARNED_TARGET_PCT,
            "measured": f"{learned_pct:.1f}%",
        },
    ]
    if len(speedups) == 1:
        rows.append(
            {
                "name": STABLE,
                "met": None,
                "measured": "one run here; --validate makes three",
            }
        )
    else:
        spread = (speedups[-1].median - speedups[0].median) / middle.median
        rows.append(
            {
                "name": STABLE,
                "met": upper < max_degradation and spread <= STABLE_WITHIN,
                "measured": f"{len(speedups)} runs, spread {100 * spread:.1f}%",
            }
        )
    return rows
