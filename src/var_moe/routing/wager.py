"""Betting against calibrated means: a test that may be looked at after every document.

Let y in [0, 1] be a statistic of the next document, whose mean, given all before it, is at most
h. A bet of the fraction f on "above h" multiplies the wealth by 1 + f (y - h) / h, which is never
negative and at most 1 on average. From 1, the wealth ever reaches 1 / alpha with probability alpha
at most (Ville's inequality), however often one looks (Waudby-Smith, Ramdas 2024,
arXiv:2010.09686). The wealth is divided among

- both sides of the range [low, high] that the mean may lie in,
- several fractions f, as the best one depends on the size of the drift,
- the statistics, by their stakes,
- the documents at which a drift may begin: a share of 1 / (n (n + 1)) is first bet at document n,
  so that some remains for a late drift (the e-detectors of Shin, Ramdas, Rinaldo 2022,
  arXiv:2203.03532, with a prior over the time of change, which bounds false alarms over the whole
  stream instead of their frequency).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_FRACTIONS = np.array((0.05, 0.15, 0.4, 0.9))  # f
_MOST_WEALTH = 1e30  # far above any 1 / alpha, and no overflow


def payoffs(values: Floats, low: Floats, high: Floats) -> Floats:
    """The factor by which each bet multiplies its wealth.

    Args:
        values: (..., J) in [0, 1]; NaN where a document has no value, so no bet is made.
        low: (J,) lower end of the range of the mean, below 1.
        high: (J,) upper end, above 0.

    Returns:
        (..., J, 2, 4): bets on a mean above the range, and below it, for each fraction.
    """
    above = (values - high) / high
    below = (low - values) / (1 - low)
    edge = np.stack((above, below), axis=-1)[..., None]
    factors: Floats = 1 + _FRACTIONS * np.where(np.isnan(edge), 0.0, edge)
    return factors


class Wager:
    """The wealth of one stream.

    Args:
        low: (J,) lower end of the range of each statistic's mean.
        high: (J,) upper end.
        stakes: (J,) parts of the wealth bet on each statistic, summing to 1.
    """

    def __init__(self, low: Floats, high: Floats, stakes: Floats) -> None:
        self._low, self._high, self._stakes = low, high, stakes
        self._wealths = np.zeros((len(stakes), 2, len(_FRACTIONS)))  # per stake and bet
        self.units = 0

    def see(self, values: Floats) -> None:
        """Bet on the next document's statistics, (J,) in [0, 1] or NaN."""
        self.units += 1
        entering = 1 / (self.units * (self.units + 1))
        grown = (self._wealths + entering) * payoffs(values, self._low, self._high)
        self._wealths = np.minimum(grown, _MOST_WEALTH)

    @property
    def sides(self) -> Floats:
        """(J, 2) wealth of one who bets only on this mean being above, or below, its range."""
        wealth: Floats = self._wealths.mean(axis=2) + 1 / (self.units + 1)
        return wealth

    @property
    def wealth(self) -> float:
        """The total; its inverse is a p-value, valid at any time."""
        return float(self._stakes @ self.sides.mean(axis=1))


def mean_range(values: Floats, alpha: float) -> tuple[float, float]:
    """Confidence interval of the mean of independent values in [0, 1], valid at any size.

    It holds the means against which betting on these values in their order never multiplied the
    wealth by 2 / alpha, on either side.

    Args:
        values: (N,).
        alpha: probability that the mean lies outside.
    """
    grid = np.linspace(0, 1, 501)[1:-1]
    wealth = np.zeros((len(grid), 2, len(_FRACTIONS)))  # logarithms
    most = np.full((len(grid), 2), -np.inf)
    for value in values:
        wealth += np.log(payoffs(np.full(len(grid), value), grid, grid))
        top = wealth.max(axis=2)
        mean = top + np.log(np.exp(wealth - top[..., None]).mean(axis=2))
        most = np.maximum(most, mean)
    limit = np.log(2 / alpha)
    # The bet "above m" wins less as m grows, "below m" more.
    low = grid[most[:, 0] < limit].min(initial=1.0)
    high = grid[most[:, 1] < limit].max(initial=0.0)
    step = grid[0]  # outwards, to the next refuted mean of the grid
    return float(max(low - step, 0.0)), float(min(high + step, 1.0))
