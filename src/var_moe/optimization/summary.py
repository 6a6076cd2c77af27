"""The result table for people: the winner against the baseline and the presets."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from var_moe.evaluation.evaluator import Apart
from var_moe.optimization.candidate import kind_of
from var_moe.optimization.criteria import success_criteria
from var_moe.optimization.remeasure import Measured
from var_moe.terminal import WIDTH, show

if TYPE_CHECKING:
    from rich.console import RenderableType


MET = {True: "yes", False: "NO", None: "-"}
"""How a criterion's `met` is shown."""


def result_table(rows: Sequence[Measured], *, baseline_tps: float | None, top_k: int) -> Any:
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


def _worst(row: Measured) -> list[str]:
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
    best: Measured | None,
    others: Sequence[Measured],
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
        parts.append(f"Best configuration: {best.config.documented()} ({kind_of(best.config)})")
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
