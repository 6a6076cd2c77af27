"""Clocks for the cache's time to live, in whole ticks so that results repeat exactly."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Self


class Clock(ABC):
    """Gives the time of each token of a forward: token i is at ``start + i * step`` ticks."""

    ticks_per_second: int
    step: int  # ticks from one counted token to the next within a forward

    @abstractmethod
    def advance(self, tokens: int) -> int:
        """Ticks at the first of the next ``tokens`` counted tokens; moves on past them."""

    def reset(self) -> None:  # noqa: B027 - wall time can't be reset
        """Start again, where the clock can."""

    def of_document(self) -> Self:
        """A clock for one document, whose time no other text moves on."""
        return self


class TokenClock(Clock):
    """Virtual time for evaluation: a thousand non-padding tokens are a second."""

    ticks_per_second = 1000
    step = 1

    def __init__(self) -> None:
        self._tokens = 0

    def advance(self, tokens: int) -> int:
        start = self._tokens
        self._tokens += tokens
        return start

    def reset(self) -> None:
        self._tokens = 0

    def of_document(self) -> Self:
        return type(self)()


class WallClock(Clock):
    """Wall time for serving, read once per row of a forward."""

    ticks_per_second = 1_000_000_000
    step = 0

    def advance(self, tokens: int) -> int:
        return time.monotonic_ns()
