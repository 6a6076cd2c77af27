"""The documented success criteria, each met or not, with the figure behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPEEDUP_TARGET = 1.3
LEARNED_TARGET_PCT = 15.0
STABLE_WITHIN = 0.03
STABLE = "stable: all runs feasible, speedups within 3%"


def success_criteria(
    *,
    degradation: float,
    upper: float,
    max_degradation: float,
    speedups: Sequence[float],
    learned_pct: float,
) -> list[dict[str, Any]]:
    """One row per criterion: name, met (None: not measured), measured.

    Args:
        degradation: relative perplexity change.
        upper: its one-sided 95% upper bound.
        max_degradation: the bound on it.
        speedups: measured speedup of each run; stability needs at least two.
        learned_pct: share of decisions left to the router, in percent.
    """
    middle = sorted(speedups)[len(speedups) // 2]
    rows = [
        {
            "name": f"degradation < {100 * max_degradation:g}% (by its 95% upper bound)",
            "met": upper < max_degradation,
            "measured": f"{100 * degradation:+.2f}% (95% upper bound {100 * upper:+.2f}%)",
        },
        {
            "name": f"speedup > {SPEEDUP_TARGET}x",
            "met": middle > SPEEDUP_TARGET,
            "measured": f"{middle:.3f}x",
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
        spread = (max(speedups) - min(speedups)) / middle
        rows.append(
            {
                "name": STABLE,
                "met": upper < max_degradation and spread <= STABLE_WITHIN,
                "measured": f"{len(speedups)} runs, spread {100 * spread:.1f}%",
            }
        )
    return rows
