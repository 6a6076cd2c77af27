"""How many units of text a candidate needs, told from the ordering part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from var_moe.certification.statistics import Floats
from var_moe.evaluation.sequential import LEAST_DOCUMENTS, margin

POWER = 0.8
"""The probability of a certificate that the number of units needed is stated for."""

_MOST_UNITS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What the ordering part tells about Z: enough to plan a test, by normal theory.

    The test's worst page is planned with that of the pilot.
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
