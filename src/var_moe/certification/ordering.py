"""The order of the candidates, safest first, and how much text each of them needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from var_moe.certification.inference import Floats, degradation_interval, excess
from var_moe.certification.judging import WHOLE, parts_of
from var_moe.certification.plan import Named
from var_moe.certification.scoring import Measured, UnitScorer
from var_moe.evaluation.perplexity import Groups
from var_moe.evaluation.sequential import LEAST_DOCUMENTS, margin
from var_moe.routing.base import RoutingPolicy

LEAST_POWER = 0.5
"""Where no candidate has this chance, the certify part is not opened."""
POWER = 0.8
"""The probability of a certificate that the number of units needed is stated for."""
_MOST_UNITS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """Mean and spread of Z on the ordering part, to plan the test by normal theory.

    The pilot's worst page stands for the test's.
    """

    mean: float
    deviation: float
    worst: float
    sequential: bool

    @classmethod
    def of(cls, z: Floats, *, sequential: bool) -> Pilot:
        """From the pilot's values of Z."""
        return cls(
            mean=float(z.mean()),
            deviation=float(z.std(ddof=1)),
            worst=float(z.max()),
            sequential=sequential,
        )

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "excess_mean": self.mean,
            "excess_deviation": self.deviation,
            "excess_worst": self.worst,
        }

    def chance(self, units: int, *, alpha: float) -> float:
        """Probability that so many units certify; in sequential mode, by their end."""
        n = units + 1
        if self.sequential and n < LEAST_DOCUMENTS:
            return 0.0
        mean = (units * self.mean + self.worst) / n
        spread = math.sqrt(self.deviation**2 + (self.worst - self.mean) ** 2 / n)
        if spread <= 1e-12 * abs(mean):
            return 1.0 if mean < 0 else 0.0
        if self.sequential:
            level = math.sqrt(n) * float(margin(np.array([float(n)]), alpha=alpha, best_at=n)[0])
        else:
            level = float(stats.norm.ppf(1 - alpha))
        return float(stats.norm.cdf(-mean / spread * math.sqrt(n) - level))

    def units_needed(self, *, alpha: float) -> int | None:
        """Units for a chance of `POWER`; None where the pilot's mean is not below zero."""
        if self.mean >= 0:
            return None
        return _smallest(lambda units: self.chance(units, alpha=alpha) >= POWER)


def _smallest(holds: Callable[[int], bool]) -> int | None:
    """The smallest number of units, at least 2, for which a monotone condition holds."""
    low, high = 1, 2
    while not holds(high):
        low, high = high, 2 * high
        if high > _MOST_UNITS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


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
    about each. A candidate that is not faster than a safer one is left out: it could only end
    the sequence.

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
    """A candidate's outlook, printed before the certify part is opened."""
    where = f", worst data set {row['worst_dataset']}" if "worst_dataset" in row else ""
    head = f"{row['name']}: {100 * row['degradation']:+.2f}% on the ordering part{where}"
    if row["units_needed"] is None:
        return f"{head}, not below the bound: no number of pages would certify it"
    return (
        f"{head}; {row['units_needed']:,} pages needed for a chance of {100 * POWER:.0f}%, "
        f"{units:,} there: a chance of {100 * chances:.0f}%"
    )
