"""What a search says to people: the answer, its tables, and notes on what limits it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.calibration.profile import RoutingProfile
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.results import LEARNED_TARGET_PCT, NEAREST_MISS_FILE, OptimizationResult
from var_moe.optimization.selection import CONVERGENCE_WINDOW
from var_moe.terminal import WIDTH, figures_table, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from var_moe.evaluation.throughput import Ratio
    from var_moe.optimization.selection import Remeasured


SPEEDUP_TARGET, STABLE_WITHIN = 1.3, 0.03


def result_table(rows: Sequence[Remeasured], *, top_k: int) -> Any:
    """One row per configuration, the unmodified model first."""
    robust = any(row.quality.worst for row in rows)
    table = figures_table(
        "Measured on text that was not searched on",
        *("configuration", "PPL", "change (95% upper)", "speedup [95%]"),
        *("experts/token", "fast/cached/learned %"),
        *(["worst data set (95% upper)"] if robust else []),
    )
    ppl = rows[0].quality.change.baseline_perplexity
    tps = next((row.speed.baseline_tps for row in rows if row.speed), None)
    speed = "1.00" if tps is None else f"1.00 ({tps:,.0f} tokens/s)"
    table.add_row("baseline", f"{ppl:.3f}", "", speed, f"{top_k:.2f}", "0 / 0 / 100")
    for row in rows:
        change, report, worst = row.quality.change, row.quality.report, row.quality.worst
        ratio = row.speed and row.speed.speedup
        table.add_row(
            row.name,
            f"{change.perplexity:.3f}",
            _change(change.value, change.upper),
            f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            if ratio
            else "over the bound",
            f"{report.experts_per_token:.3f}",
            f"{report.fast_pct:.1f} / {report.cached_pct:.1f} / {report.learned_pct:.1f}",
            *(
                [f"{worst.dataset} {_change(worst.change.value, worst.change.upper)}"]
                if worst
                else []
            ),
        )
    return table


def _change(value: float, upper: float) -> str:
    return f"{value:+.2%} ({upper:+.2%})"


def apart_table(rows: Sequence[Mapping[str, Any]], *, title: str) -> Any:
    """One row per data set, from `evaluation.evaluator.measure_by_dataset`."""
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
            _change(row["degradation"], row["degradation_upper_95"]),
            f"{row['experts_per_token']:.3f}",
            f"{row['fast_pct']:.1f} / {row['cached_pct']:.1f} / {row['learned_pct']:.1f}",
        )
    return table


def summary_parts(
    *,
    best: Remeasured | None,
    others: Sequence[Remeasured],
    by_dataset: Sequence[Mapping[str, Any]] = (),
    answer: str,
    notes: Sequence[str],
    top_k: int,
) -> list[RenderableType]:
    """What is printed at the end and stands in ``optimization_summary.txt``."""
    rows = [*([best] if best else []), *others]
    parts: list[RenderableType] = [answer, ""]
    if rows:
        parts += [result_table(rows, top_k=top_k), ""]
    if by_dataset:
        title = f"{rows[0].name if best else 'Nearest miss'}, each data set by itself"
        parts += [apart_table(by_dataset, title=title), ""]
    if best and best.speed:
        back, skip = best.speed.backend_factor, best.speed.skipping_factor
        if back and skip:
            parts.append(
                f"Speedup against {best.speed.baseline_backend}, the fastest Hugging Face experts "
                f"backend here: {best.speed.speedup.median:.3f} ~ backend {back.median:.3f} "
                f"({best.speed.backend}) x skipping {skip.median:.3f}."
            )
        parts.append(f"Best configuration: {best.config.documented()} ({best.config.kind})")
    return [*parts, *(f"Note: {note}" for note in notes)]


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
    """What was hoped of a configuration, on held-out text: name, met, measured.

    Args:
        degradation: relative perplexity change.
        upper: its one-sided 95% upper bound.
        max_degradation: the bound on it.
        speedups: measured speedup of each run. The middle one is judged by the low end of its
            interval: on a disturbed machine the figure alone lies.
        learned_pct: share of decisions left to the router, in percent.
    """
    speedups = sorted(speedups, key=lambda one: one.median)
    middle = speedups[len(speedups) // 2]
    spread = (speedups[-1].median - speedups[0].median) / middle.median
    rows = [
        (
            f"degradation < {100 * max_degradation:g}% (by its 95% upper bound)",
            upper < max_degradation,
            f"{degradation:+.2%} (95% upper bound {upper:+.2%})",
        ),
        (
            f"speedup > {SPEEDUP_TARGET}x (by its 95% interval)",
            middle.low > SPEEDUP_TARGET,
            f"{middle.median:.3f}x [{middle.low:.3f}, {middle.high:.3f}]",
        ),
        (
            f"learned routing < {LEARNED_TARGET_PCT:g}%",
            learned_pct < LEARNED_TARGET_PCT,
            f"{learned_pct:.1f}%",
        ),
        (
            "stable: all runs feasible, speedups within 3%",
            upper < max_degradation and spread <= STABLE_WITHIN,
            f"{len(speedups)} runs, spread {spread:.1%}",
        ),
    ]
    return [dict(zip(("name", "met", "measured"), row, strict=True)) for row in rows]


def nearest_answer(near: Remeasured, limit: str, output: Path) -> str:
    return (
        f"All configurations violate constraint: the smallest degradation is "
        f"{near.quality.judged.value:+.2%} (95% upper bound {near.quality.judged.upper:+.2%}, "
        f"bound {limit}{_judged_on(near)}) with "
        f"{near.config.documented()} ({near.config.kind}). It is saved in "
        f"{output / NEAREST_MISS_FILE}; "
        "try a larger --max_degradation or wider --bounds."
    )


def best_answer(best: Remeasured, default: Remeasured | None, limit: str, top_k: int) -> str:
    assert best.speed is not None
    judged = best.quality.judged
    answer = (
        f"Fastest configuration with degradation below {limit}: "
        f"{best.speed.speedup.median:.3f}x at {judged.value:+.2%} perplexity (95% upper bound "
        f"{judged.upper:+.2%}{_judged_on(best)}), "
        f"{best.quality.report.experts_per_token:.2f} of {top_k} experts per token."
    )
    if not _no_better(best, default):
        return answer
    return (
        "No improvement found: no configuration that keeps the bound is faster than the "
        f"{'baseline' if best.speed.speedup.median <= 1 else 'default'} beyond what the timings "
        f"tell apart. Baseline: perplexity {best.quality.change.baseline_perplexity:.3f}, "
        f"{best.speed.baseline_tps:,.0f} tokens/s. {answer} Try a larger --max_degradation or "
        "wider --bounds."
    )


def _judged_on(one: Remeasured) -> str:
    """Where the worst of several data sets is judged, which that is."""
    worst = one.quality.worst
    return "" if worst is None else f", on the worst data set, {worst.dataset}"


def _no_better(best: Remeasured, default: Remeasured | None) -> bool:
    """Whether the winner is the default, or within its timings, or slower than the baseline."""
    assert best.speed is not None
    if best.speed.speedup.median <= 1.0:
        return True
    if default is None or default.speed is None or not default.passed:
        return False
    return best.config == default.config or best.speed.speedup.median <= default.speed.speedup.high


def profile_notes(profile: RoutingProfile, default: Candidate) -> list[str]:
    """Where an entropy threshold can't bite on this model; nothing for a policy without one."""
    threshold = default.settings.get("entropy_threshold")
    if threshold is None:
        return []
    faster = (
        "these are VAR's six thresholds; where it was measured, the damage policy runs fewer "
        "experts at the same degradation: `var-moe tune --policy damage`"
    )
    weight = profile.stats["frequency"].to_numpy(np.float64)
    entropy = profile.stats["mean_entropy"].to_numpy(np.float64)
    reach = float(weight[entropy <= threshold].sum() / weight.sum())
    if reach >= 0.001:
        return [faster]
    how = "never" if reach == 0 else "hardly ever (below 0.1%)"
    note = (
        f"with the default entropy_threshold {threshold} the fast path is {how} taken on this "
        f"model (a tenth of its table entries lie below {np.quantile(entropy, 0.1):.2f} nats, of "
        f"at most {profile.head['entropy_max_nats']:.2f}); what cuts pairs here is "
        "confidence_threshold"
    )
    return [note, faster]


def search_notes(result: OptimizationResult, independent: bool) -> list[str]:
    """What limits the search's answer."""
    notes = []
    failed = sum(1 for one in result.evaluations if one.failed)
    if failed:
        notes.append(f"{failed} of {result.num_evaluations} evaluations failed; see all_results")
    # A search by replay evaluates near the bound on purpose, and does not converge in that sense.
    if result.method == "replay":
        if result.extra.get("stopped_early"):
            notes.append(
                f"the search ended after {result.num_evaluations} evaluations: every other point "
                "of the search space decides as one of them"
            )
    else:
        if result.num_evaluations <= CONVERGENCE_WINDOW:
            notes.append(f"{result.num_evaluations} evaluations are too few to tell convergence")
        elif not result.converged:
            notes.append(
                "the search was still improving at its end: a larger --n_calls may find more"
            )
    if not independent:
        notes.append("the text's documents are cut from one text: intervals are too narrow")
    return notes
