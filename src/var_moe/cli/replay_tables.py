"""The tables of ``var-moe replay``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.terminal import show

_SHOWN = 12  # points of a front
_SHORT = {
    "frequency_threshold": "freq.",
    "entropy_threshold": "entropy",
    "confidence_threshold": "conf.",
    "cache_size": "cache",
    "cache_ttl_seconds": "ttl",
    "context_window_size": "window",
}


def print_replays(rows: Sequence[Mapping[str, Any]], trace: Mapping[str, Any]) -> None:
    """One line per configuration."""
    from rich.table import Table

    table = Table(title=f"Replayed {_where(trace)}", title_justify="left")
    table.add_column("", overflow="fold")
    for heading in ("experts/token", "fast/cached/learned %", "cache hits %"):
        table.add_column(heading, justify="right")
    for heading in ("PPL change, predicted", "speedup, predicted"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["name"], *_figures(row))
    show(table)


def print_front(
    front: Sequence[Mapping[str, Any]],
    trace: Mapping[str, Any],
    points: int,
    mode: str,
    max_degradation: float,
) -> None:
    """Points of a grid that no other beats; some of them where there are many."""
    from rich.table import Table

    if not front:
        return
    print(f"Replayed {points:,} points ({mode}): {_where(trace)}")
    table = Table(
        title=f"{len(front)} points that no other beats in speed and degradation "
        f"(* predicted within {100 * max_degradation:g}%)",
        title_justify="left",
    )
    for heading in (*_SHORT.values(), "experts/token", "fast/cached/learned %"):
        table.add_column(heading, justify="right")
    for heading in ("PPL change", "speedup"):
        table.add_column(heading, justify="right")
    last = len(front) - 1
    shown = {round(last * step / (_SHOWN - 1)) for step in range(_SHOWN)}
    feasible = [number for number, row in enumerate(front) if row["feasible"]]
    for number in sorted(shown | set(feasible[-1:])):
        row = front[number]
        experts, tiers, _, change, speedup = _figures(row)
        values = [f"{row['config'][name]:g}" for name in _SHORT]
        table.add_row(*values, experts, tiers, change + (" *" if row["feasible"] else ""), speedup)
    show(table)


def _where(trace: Mapping[str, Any]) -> str:
    return f"{trace['model']} on {trace['dataset']}, {trace['tokens']:,} tokens"


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    change, speedup = row.get("predicted_degradation"), row.get("predicted_speedup")
    return (
        f"{row['experts_per_token']:.3f}",
        f"{row['fast_pct']:.1f} / {row['cached_pct']:.1f} / {row['learned_pct']:.1f}",
        f"{100 * row['cache_hit_rate']:.1f}",
        "" if change is None else f"{100 * change:+.2f}%",
        "" if speedup is None else f"{speedup:.3f}x",
    )
