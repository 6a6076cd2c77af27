"""A lower confidence bound of the speedup from interleaved blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats


def blocks_needed(alpha: float) -> int:
    """The fewest blocks from which a bound at ``alpha`` exists."""
    return math.ceil(math.log(alpha) / math.log(0.5))


def median_lower_bound(ratios: Sequence[float], alpha: float) -> float | None:
    """The lower bound of the median of block ratios, at error ``alpha``; None with too few.

    An order statistic: the median lies below the k-th smallest of n blocks only if fewer than k
    blocks fell below it, which has binomial probability. Exact for any distribution of
    independent blocks, where the percentile bootstrap of a median over ten blocks is not.
    """
    n = len(ratios)
    # The largest k with P(Binomial(n, 1/2) <= k - 1) <= alpha.
    k = int(stats.binom.ppf(alpha, n, 0.5))
    if stats.binom.cdf(k, n, 0.5) <= alpha:
        k += 1
    return sorted(ratios)[k - 1] if k >= 1 else None
