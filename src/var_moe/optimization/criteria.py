"""The documented success criteria, each met or not, with the figure behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from var_moe.evaluation.throughput import Ratio

SPEEDUP_TARGET = 1.3
LEARNED_TARGET_PCT = 15.0
STABLE_WITHIN = 0.03
STABLE = "stable: all runs feasible, speedups within 3%"


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
