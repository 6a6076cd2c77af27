"""The order of the candidates, safest first, and how much text each of them needs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from var_moe.certification.inference import Floats, QualityClaim
from var_moe.certification.judging import ALL_TEXT
from var_moe.certification.scoring import Measured, UnitScorer
from var_moe.evaluation.perplexity import Groups
from var_moe.routing.base import RoutingPolicy

LEAST_POWER = 0.5
"""Where no candidate has this chance, the certify part is not opened."""
POWER = 0.8
"""The probability of a certificate that the number of units needed is stated for."""
_MOST_UNITS = 2**23


def chance(z: Floats, units: int, *, alpha: float) -> float:
    """Probability that this many units certify, by normal theory from a pilot's values of Z.

    The pilot's worst page stands for the test's.
    """
    n, mean = units + 1, float(z.mean())
    above = float(z.max()) - mean
    mean += above / n
    spread = math.sqrt(float(z.var(ddof=1)) + above**2 / n)
    if spread <= 1e-12 * abs(mean):
        return 1.0 if mean < 0 else 0.0
    level = float(stats.norm.ppf(1 - alpha))
    return float(stats.norm.cdf(-mean / spread * math.sqrt(n) - level))


def units_needed(z: Floats, *, alpha: float, power: float = POWER) -> int | None:
    """Units for this chance of a certificate; None where no number of them gives it."""
    if z.mean() >= 0:
        return None
    sizes = range(2, _MOST_UNITS + 1)
    needed = 2 + bisect_left(sizes, power, key=lambda units: chance(z, units, alpha=alpha))
    return needed if needed <= _MOST_UNITS else None


def order_candidates(
    scorer: UnitScorer,
    policies: Mapping[str, RoutingPolicy | None],
    judged: Groups,
    claim: QualityClaim,
) -> list[dict[str, Any]]:
    """Rows, safest first, with the degradation on the ordering part and the units needed.

    Safest: the smallest upper bound of the degradation, of the worst data set where a claim is
    about each. A candidate that is not faster than a safer one is left out: it could only end
    the sequence.
    """
    rows = []
    for name, policy in policies.items():
        measured = scorer.measure(policy, what=f"ordering: {name}")
        # What is planned for is the data set that will decide.
        row = max(
            (_row(measured, at, dataset, claim) for dataset, at in judged.items()),
            key=lambda row: row["degradation_upper"],
        )
        rows.append({"name": name, "experts_per_token": measured.experts_per_token, **row})
    kept: list[dict[str, Any]] = []
    # Equally safe: the faster first, so that the other one falls out.
    for row in sorted(rows, key=lambda row: (row["degradation_upper"], row["experts_per_token"])):
        if not kept or row["experts_per_token"] < kept[-1]["experts_per_token"]:
            kept.append(row)
    return kept


def _row(
    measured: Measured, at: NDArray[np.int64], dataset: str, claim: QualityClaim
) -> dict[str, Any]:
    """A candidate on one data set's units, or on all."""
    units = measured.change[at], measured.tokens[at]
    interval, z = claim.interval(*units), claim.excess(*units)
    return {
        **({"worst_dataset": dataset} if dataset != ALL_TEXT else {}),
        "degradation": interval.value,
        "degradation_upper": interval.upper,
        "units": len(at),
        "units_needed": units_needed(z, alpha=claim.alpha),
        "units_for_even_chance": units_needed(z, alpha=claim.alpha, power=LEAST_POWER),
    }


def power_line(row: Mapping[str, Any], units: int) -> str:
    """A candidate's outlook, printed before the certify part is opened."""
    where = f", worst data set {row['worst_dataset']}" if "worst_dataset" in row else ""
    head = f"{row['name']}: {100 * row['degradation']:+.2f}% on the ordering part{where}"
    if row["units_needed"] is None:
        return f"{head}, not below the bound: no number of pages would certify it"
    return (
        f"{head}; {row['units_needed']:,} pages needed for a chance of {100 * POWER:.0f}%, "
        f"{units:,} there"
    )
