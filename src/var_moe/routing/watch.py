"""A guard at work: it bets on each document that ends, and says when the bets are won."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from var_moe.routing.departure import statistic_names, statistics
from var_moe.routing.guard import Guard
from var_moe.routing.units import Sums
from var_moe.routing.wager import Wager


class DriftWarning(UserWarning):
    """Decisions have left the range that a guard was calibrated on."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One statistic of a stream beside what was expected."""

    name: str
    expected: float
    low: float
    high: float
    seen: float | None  # mean over the documents so far, limited as in calibration
    units: int  # documents that have it
    bet_on: bool
    evidence: float  # against the range: 1 / p-value had it been watched alone, on its worse side


@dataclass(frozen=True, kw_only=True)
class GuardReport:
    """The state of a guard: documents that have not ended are not in it."""

    action: str
    alpha: float
    units: int
    evidence: float  # alarm at 2 / alpha
    alarm_at: int | None  # documents after which the alarm came
    fallback: bool  # whether the model's own routing is in place
    statistics: tuple[Seen, ...]

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return asdict(self)

    def worst(self) -> Seen:
        """The statistic with most evidence against it, of those that are bet on."""
        return max(self.statistics, key=lambda seen: (seen.bet_on, seen.evidence))


class Watch:
    """The state of one stream.

    Args:
        guard: what is expected.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        rows = guard.expectation.statistics
        names = statistic_names(guard.expectation.layers)
        self._which = [names.index(row.name) for row in rows]
        self._bottom = np.array([row.bottom for row in rows])
        self._width = np.array([row.top for row in rows]) - self._bottom
        spread = guard.tolerance * np.array([row.spread for row in rows])
        low = np.array([row.low for row in rows]) - spread
        high = np.array([row.high for row in rows]) + spread
        self._low, self._high = np.maximum(low, self._bottom), np.minimum(high, self._top)
        self._wager = Wager(
            self._scaled(self._low),
            self._scaled(self._high),
            np.array([row.stake for row in rows]),
        )
        self._sum = np.zeros(len(rows))
        self._number = np.zeros(len(rows), dtype=np.int64)
        self.alarm_at: int | None = None

    @property
    def _top(self) -> Any:
        return self._bottom + self._width

    def _scaled(self, values: Any) -> Any:
        return np.clip((values - self._bottom) / self._width, 0, 1)

    @property
    def native(self) -> bool:
        """Whether the model's own routing is to be used from now on."""
        return self.alarm_at is not None and self.guard.action == "fallback"

    def see(self, unit: Sums) -> None:
        """A document has ended."""
        if self.native:
            return
        scaled = self._scaled(statistics(unit)[self._which])  # NaN stays NaN
        self._wager.see(scaled)
        self._sum += np.nan_to_num(scaled)
        self._number += ~np.isnan(scaled)
        if self.alarm_at is None and self._wager.wealth >= 2 / self.guard.alpha:
            self.alarm_at = self._wager.units
            if self.guard.action != "report":
                warnings.warn(self._message(), DriftWarning, stacklevel=2)

    def _message(self) -> str:
        report = self.report()
        worst = report.worst()
        then = (
            "; from now on the model's own routing decides"
            if self.guard.action == "fallback"
            else ""
        )
        return (
            f"routing has left its calibrated range after {report.units} documents: mean "
            f"{worst.name} {worst.seen:.4f}, expected {worst.expected:.4f} "
            f"[{worst.low:.4f}, {worst.high:.4f}] (false-alarm rate {report.alpha:g}){then}"
        )

    def report(self) -> GuardReport:
        """What has been seen so far."""
        sides = self._wager.sides.max(axis=1)
        mean = self._bottom + self._width * self._sum / np.maximum(self._number, 1)
        return GuardReport(
            action=self.guard.action,
            alpha=self.guard.alpha,
            units=self._wager.units,
            evidence=self._wager.wealth,
            alarm_at=self.alarm_at,
            fallback=self.native,
            statistics=tuple(
                Seen(
                    name=row.name,
                    expected=row.mean,
                    low=float(self._low[j]),
                    high=float(self._high[j]),
                    seen=float(mean[j]) if self._number[j] else None,
                    units=int(self._number[j]),
                    bet_on=row.stake > 0,
                    evidence=float(sides[j]),
                )
                for j, row in enumerate(self.guard.expectation.statistics)
            ),
        )
