"""Safest to fastest on the ordering part, and how much text each candidate will need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_moe.certification.apart import WHOLE, parts_of
from var_moe.certification.candidates import Named
from var_moe.certification.power import POWER, Pilot
from var_moe.certification.statistics import degradation_interval, excess
from var_moe.certification.units import Measured, UnitScorer
from var_moe.evaluation.perplexity import Groups
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

    Safest: the smallest upper bound of the degradation, of the worst data set where a claim is
    about each. A candidate that is not faster than a
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
        # What is planned for is the data set that will decide.
        row = max(
            (
                _row(found, at, name, bound=bound, alpha=alpha, sequential=sequential)
                for name, at in parts_of(found, scorer.judged).items()
            ),
            key=lambda row: row["degradation_upper"],
        )
        rows.append({"name": one.name, "experts_per_token": found.experts_per_token, **row})
    return faster_and_faster(rows)


def _row(
    found: Measured,
    at: NDArray[np.int64],
    dataset: str,
    *,
    bound: float,
    alpha: float,
    sequential: bool,
) -> dict[str, Any]:
    """A candidate on one data set's units, or on all."""
    change, tokens = found.change[at], found.tokens[at]
    interval = degradation_interval(change, tokens, confidence=0.95, alpha=alpha)
    pilot = Pilot.of(excess(change, tokens, bound), sequential=sequential)
    return {
        **({"worst_dataset": dataset} if dataset != WHOLE else {}),
        "degradation": interval.value,
        "degradation_upper": interval.upper,
        "units": len(tokens),
        "units_needed": pilot.units_needed(alpha=alpha),
        **pilot.to_dict(),
    }


def units_there(row: Mapping[str, Any], units: int, judged: Groups) -> int:
    """How many of so many units are of the data set that a row was planned for."""
    return len(judged[row["worst_dataset"]]) if "worst_dataset" in row else units


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
    where = f", worst data set {row['worst_dataset']}" if "worst_dataset" in row else ""
    head = f"{row['name']}: {100 * row['degradation']:+.2f}% on the ordering part{where}"
    if row["units_needed"] is None:
        return f"{head}, not below the bound: no number of pages would certify it"
    return (
        f"{head}; {row['units_needed']:,} pages needed for a chance of {100 * POWER:.0f}%, "
        f"{units:,} there: a chance of {100 * chances:.0f}%"
    )
