"""Safest to fastest on the ordering part, and how much text each candidate will need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.certification.candidates import Named
from var_moe.certification.power import POWER, Pilot
from var_moe.certification.statistics import degradation_interval, excess
from var_moe.certification.units import UnitScorer
from var_moe.routing.base import RoutingPolicy

LEAST_POWER = 0.5
"""Where no candidate has this chance, the certify part is not opened."""


def order_candidates(
    scorer: UnitScorer,
    candidates: Sequence[Named],
    policies: Mapping[str, RoutingPolicy | None],
    *,
    bound: float,
    alpha: float,
    sequential: bool,
) -> list[dict[str, Any]]:
    """Rows, safest first, with the degradation on the ordering part and the units needed.

    Safest: the smallest upper bound of the degradation. A candidate that is not faster than a
    safer one is left out: it could only end the sequence.

    Args:
        scorer: of the ordering part.
        candidates, policies: by name; None is the unmodified model.
        bound: on the degradation.
        alpha: of the quality claim.
        sequential: whether units will stream in.
    """
    rows = []
    for one in candidates:
        found = scorer.all(policies[one.name], what=f"ordering: {one.name}")
        interval = degradation_interval(found.change, found.tokens, confidence=0.95, alpha=alpha)
        pilot = Pilot.of(excess(found.change, found.tokens, bound), sequential=sequential)
        rows.append(
            {
                "name": one.name,
                "degradation": interval.value,
                "degradation_upper": interval.upper,
                "experts_per_token": found.experts_per_token,
                "units": len(found.tokens),
                "units_needed": pilot.units_needed(alpha=alpha),
                **pilot.to_dict(),
            }
        )
    return faster_and_faster(rows)


def faster_and_faster(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows by the upper bound of their degradation, each with fewer pairs than those before."""
    kept: list[dict[str, Any]] = []
    # Equally safe: the faster first, so that the other one falls out.
    for row in sorted(rows, key=lambda row: (row["degradation_upper"], row["experts_per_token"])):
        if not kept or row["experts_per_token"] < kept[-1]["experts_per_token"]:
            kept.append(dict(row))
    return kept


def pilot_of(row: Mapping[str, Any], *, sequential: bool) -> Pilot:
    """A row's pilot."""
    return Pilot(
        mean=row["excess_mean"],
        deviation=row["excess_deviation"],
        worst=row["excess_worst"],
        sequential=sequential,
    )


def power_line(row: Mapping[str, Any], units: int, chances: float) -> str:
    """What is said about a candidate before the certify part is opened."""
    head = f"{row['name']}: {100 * row['degradation']:+.2f}% on the ordering part"
    if row["units_needed"] is None:
        return f"{head}, not below the bound: no number of pages would certify it"
    return (
        f"{head}; {row['units_needed']:,} pages needed for a chance of {100 * POWER:.0f}%, "
        f"{units:,} there: a chance of {100 * chances:.0f}%"
    )
