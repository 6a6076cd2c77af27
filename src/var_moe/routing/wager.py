"""Betting against the calibrated means: a test that may be looked at after every unit.

For a unit's statistic y in [0, 1] whose mean, given all before it, is at most h, a bet of the
share f of one's money on "more than h" pays 1 + f (y - h) / h, which is never negative and
gains nothing on average. Whoever starts with 1 and owns at least 1 / alpha at any time has
therefore seen something that happens with probability alpha at most (Ville's inequality): no
approximation, at every look, over an endless stream (Waudby-Smith, Ramdas 2024,
arXiv:2010.09686). Money is spread over

- both sides of the range [low, high] that the mean may lie in,
- several shares f, as the best one depends on the size of the drift,
- the statistics, by their stakes,
- the time at which a drift begins: 1 / (n (n + 1)) of it enters with the n-th unit, so that a
  long time without drift does not use it up (the e-detectors of Shin, Ramdas, Rinaldo 2022,
  arXiv:2203.03532, with a prior over the time of change, which bounds false alarms over the whole
  stream instead of their frequency).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SHARES = (0.05, 0.15, 0.4, 0.9)
"""f: of the money at stake, what is bet on one unit."""
_SHARES = np.array(SHARES)
_ENOUGH = 1e30  # nobody asks for more, and a float holds it


def payoffs(values: Floats, low: Floats, high: Floats) -> Floats:
    """What each bet makes of 1.

    Args:
        values: (..., J) in [0, 1]; NaN where a unit has none, which no bet is made on.
        low: (J,) lower end of the range of the mean, below 1.
        high: (J,) upper end, above 0.

    Returns:
        (..., J, 2, 4): on a mean above the range, and below it.
    """
    above = (values - high) / high
    below = (low - values) / (1 - low)
    edge = np.stack((above, below), axis=-1)[..., None]
    found: Floats = 1 + _SHARES * np.where(np.isnan(edge), 0.0, edge)
    return found


class Wager:
    """The money of one stream.

    Args:
        low: (J,) lower end of the range of each statistic's mean.
        high: (J,) upper end.
        stakes: (J,) parts of the money bet on each statistic, summing to 1.
    """

    def __init__(self, low: Floats, high: Floats, stakes: Floats) -> None:
        self._low, self._high, self._stakes = low, high, stakes
        self._money = np.zeros((len(stakes), 2, len(SHARES)))  # per unit of stake and bet
        self.units = 0

    def see(self, values: Floats) -> None:
        """Bet on the next unit's statistics, (J,) in [0, 1] or NaN."""
        self.units += 1
        entering = 1 / (self.units * (self.units + 1))
        grown = (self._money + entering) * payoffs(values, self._low, self._high)
        self._money = np.minimum(grown, _ENOUGH)

    @property
    def sides(self) -> Floats:
        """(J, 2) the money on each statistic's mean being above and below its range, if all had
        been put there."""
        found: Floats = self._money.mean(axis=2) + 1 / (self.units + 1)
        return found

    @property
    def wealth(self) -> float:
        """All money. Its inverse is a p-value that may be looked at at any time."""
        return float(self._stakes @ self.sides.mean(axis=1))


def mean_range(values: Floats, alpha: float) -> tuple[float, float]:
    """Confidence interval of the mean of independent values in [0, 1], valid at any size.

    All means against which betting on these values, in their order, has not multiplied the money
    by 2 / alpha on either side.

    Args:
        values: (N,).
        alpha: probability that the mean lies outside.
    """
    grid = np.linspace(0, 1, 501)[1:-1]
    money = np.zeros((len(grid), 2, len(SHARES)))  # logarithms
    most = np.full((len(grid), 2), -np.inf)
    for value in values:
        money += np.log(payoffs(np.full(len(grid), value), grid, grid))
        top = money.max(axis=2)
        mean = top + np.log(np.exp(money - top[..., None]).mean(axis=2))
        most = np.maximum(most, mean)
    limit = np.log(2 / alpha)
    # "Above m" is ever harder to win as m grows, "below m" ever easier.
    low = grid[most[:, 0] < limit].min(initial=1.0)
    high = grid[most[:, 1] < limit].max(initial=0.0)
    step = grid[0]  # outwards, to the next mean that was tried and refuted
    return float(max(low - step, 0.0)), float(min(high + step, 1.0))
