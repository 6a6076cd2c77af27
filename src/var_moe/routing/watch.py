"""A guard at work: it bets on each document that ends, and raises the alarm.

A document is a row of a forward with all later forwards that continue its KV cache, or all rows
that were announced under one number. It ends with the first forward that has no part of it. Of
texts that take turns (several KV caches in one session), only what comes before the first pause
counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_moe.routing.counts import COLUMNS, ForwardSums, Sums, statistic_names, statistics
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.guard import Guard
from var_moe.routing.wager import Wager

_GIVEN = 2**40  # a session numbers documents upwards from here, each number once


class DriftWarning(UserWarning):
    """Decisions have left the range that a guard was calibrated on."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One statistic of a stream, beside its calibrated range."""

    name: str
    expected: float
    low: float
    high: float
    seen: float | None  # mean over the documents so far, limited as in calibration
    units: int  # documents that have it
    bet_on: bool
    evidence: float  # against the range, 1 / p-value on its worse side if watched alone


@dataclass(frozen=True, kw_only=True)
class GuardReport:
    """What a guard has seen of the documents that have ended."""

    action: str
    alpha: float
    units: int
    evidence: float  # alarm at 2 / alpha
    alarm_at: int | None  # documents after which the alarm came
    fallback: bool  # whether the model's own routing is in place
    statistics: tuple[Seen, ...]

    def worst(self) -> Seen:
        """The statistic with most evidence against it, of those that are bet on."""
        return max(self.statistics, key=lambda seen: (seen.bet_on, seen.evidence))


class Units(ForwardSums):
    """Sums decisions by document, and calls ``ended`` with each one's (L, 14) at its end."""

    def __init__(self, layers: int, *, drops_only: bool, ended: Callable[[Sums], None]) -> None:
        super().__init__(layers, drops_only=drops_only)
        self._ended = ended
        self._open: dict[int, Sums] = {}
        # The last forward, not yet added: its context, and sums (N, B, 14) of each N layers.
        self._last: tuple[ForwardContext, list[tuple[list[int], Tensor]]] | None = None
        self._newest = _GIVEN - 1

    def begin(self, context: ForwardContext) -> None:
        super().begin(context)
        self._collect()
        continued = {number for number in context.document if number >= 0}
        self._show([number for number in self._open if number not in continued])

    def end(self) -> None:
        # Beams are drafts of one text, no documents.
        if self._context is not None and self._context.inserting:
            self._last = self._context, list(self._take(self._context, len(self._context.ids)))

    def end_documents(self) -> None:
        self._collect()
        self._show(list(self._open))

    def _show(self, numbers: list[int]) -> None:
        """Show documents that have ended, without those of padding alone."""
        for sums in [self._open.pop(number) for number in numbers]:
            if sums[:, :3].any():
                self._ended(sums)

    def _collect(self) -> None:
        """Add the last forward's rows to their documents (waits for the device)."""
        if self._last is None:
            return
        (context, parts), self._last = self._last, None
        by_row = torch.zeros((self._layers, len(context.document), COLUMNS), dtype=torch.float64)
        for layers, sums in parts:
            by_row[layers] += sums.double().cpu()
        for row, number in enumerate(context.document):
            # One that has ended before, and comes back, is no document any more.
            if number in self._open or not _GIVEN <= number <= self._newest:
                self._open[number] = self._open.get(number, 0) + by_row[:, row].numpy()
        self._newest = max((self._newest, *context.document))


class Watch(Units):
    """A guard's bets on one stream of documents."""

    def __init__(self, guard: Guard, *, drops_only: bool = True) -> None:
        super().__init__(guard.expectation.layers, drops_only=drops_only, ended=self.judge)
        self.guard = guard
        rows = guard.expectation.statistics
        names = statistic_names(guard.expectation.layers)
        self._which = [names.index(row.name) for row in rows]

        def of_each(name: str) -> Any:
            return np.array([getattr(row, name) for row in rows])

        self._bottom, top = of_each("bottom"), of_each("top")
        self._width, reach = top - self._bottom, guard.tolerance * of_each("spread")
        self._low = np.maximum(of_each("low") - reach, self._bottom)
        self._high = np.minimum(of_each("high") + reach, top)
        self._wager = Wager(self._scaled(self._low), self._scaled(self._high), of_each("stake"))
        self._sum = np.zeros(len(rows))
        self._number = np.zeros(len(rows), dtype=np.int64)
        self.alarm_at: int | None = None

    def _scaled(self, values: Any) -> Any:
        return np.clip((values - self._bottom) / self._width, 0, 1)

    @property
    def native(self) -> bool:
        return self.alarm_at is not None and self.guard.action == "fallback"

    def see(
        self, layer: int, context: ForwardContext, routing: Routing, index: Tensor, weight: Tensor
    ) -> None:
        if not self.native:
            super().see(layer, context, routing, index, weight)

    def judge(self, unit: Sums) -> None:
        """A document has ended: bet on its (L, 14) sums."""
        if self.native:
            return
        scaled = self._scaled(statistics(unit)[self._which])  # NaN stays NaN
        self._wager.see(scaled)
        self._sum += np.nan_to_num(scaled)
        self._number += ~np.isnan(scaled)
        if self.alarm_at is None and self._wager.wealth >= 2 / self.guard.expectation.alpha:
            self.alarm_at = self._wager.units
            if self.guard.action != "report":
                warnings.warn(self._message(), DriftWarning, stacklevel=2)

    def _message(self) -> str:
        report = self.guard_report()
        worst = report.worst()
        then = "; from now on the model's own routing decides" if report.fallback else ""
        return (
            f"routing has left its calibrated range after {report.units} documents: mean "
            f"{worst.name} {worst.seen:.4f}, expected {worst.expected:.4f} "
            f"[{worst.low:.4f}, {worst.high:.4f}] (false-alarm rate {report.alpha:g}){then}"
        )

    def report(self) -> dict[str, Any]:
        return {"guard": self.guard_report()}

    def guard_report(self) -> GuardReport:
        """What has been seen so far."""
        sides = self._wager.sides.max(axis=1)
        mean = self._bottom + self._width * self._sum / np.maximum(self._number, 1)
        return GuardReport(
            action=self.guard.action,
            alpha=self.guard.expectation.alpha,
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
