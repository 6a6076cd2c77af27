"""One sum per document: what a guard's units are made of.

A unit is a document as the session tells documents apart: a row of a forward, with all later
forwards that go on from its KV cache, or all rows that were announced under one number. It ends
with the first forward that has no part of it. Texts that take turns (several KV caches in one
session) count up to their first pause: the rest is no new document.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.departure import COLUMNS, summed

Sums = NDArray[np.float64]
"""(L, 13) sums of `departure.summed` over a unit."""

_GIVEN = 2**40
"""Numbers from here on are given by a session, ascending, and never again."""


class Units:
    """Adds up decisions by document.

    Args:
        layers: L.
        drops_only: whether decisions keep the router's slots.
    """

    def __init__(self, layers: int, *, drops_only: bool) -> None:
        self._layers = layers
        self._drops_only = drops_only
        self._open: dict[int, Sums] = {}
        self._running: list[Tensor | None] = [None] * layers  # (B, 13) of the running forward
        self._context: ForwardContext | None = None
        self._newest = _GIVEN - 1

    def begin(self, context: ForwardContext) -> list[Sums]:
        """Start a forward; returns the units that have ended (waits for the device)."""
        self._collect()
        going_on = {number for number in context.document if number >= 0}
        ended = self._close([number for number in self._open if number not in going_on])
        self._context = context
        return ended

    def add(
        self, layer: int, routing: Routing, index: Tensor, weight: Tensor, counted: Tensor
    ) -> None:
        """See a layer's decisions; the arguments of `departure.summed`."""
        assert self._context is not None
        self._running[layer] = summed(
            routing,
            index,
            weight,
            counted.to(index.device),
            drops_only=self._drops_only,
            rows=len(self._context.ids),
        )

    def end(self) -> list[Sums]:
        """Nothing goes on; returns the units that were open."""
        self._collect()
        return self._close(list(self._open))

    def _close(self, numbers: list[int]) -> list[Sums]:
        ended = [self._open.pop(number) for number in numbers]
        return [sums for sums in ended if sums[:, :3].any()]  # not of padding alone

    def _collect(self) -> None:
        """Add the last forward's rows to their documents."""
        context, self._context = self._context, None
        running, self._running = self._running, [None] * self._layers
        # Beams are drafts of one text: none of them is a document.
        if context is None or not context.inserting:
            return
        rows = [
            np.zeros((len(context.document), COLUMNS))
            if part is None
            else part.double().cpu().numpy()
            for part in running
        ]
        by_row = np.stack(rows, axis=1)  # (B, L, 13)
        newest = self._newest
        for row, number in enumerate(context.document):
            if number in self._open:
                self._open[number] += by_row[row]
            elif number <= self._newest and number >= _GIVEN:
                continue  # it has ended already, and comes back
            else:
                self._open[number] = by_row[row].copy()
            newest = max(newest, number)
        self._newest = newest
