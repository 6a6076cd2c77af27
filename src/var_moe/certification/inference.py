"""Tests with a known error rate: of one configuration, of several, and of a speedup.

The test of one configuration asks whether the corpus perplexity ratio is below a bound.

With ``d_u`` the change of unit u's summed loss and ``T_u`` its scored tokens, the hypothesis
that the ratio is at or over the bound is ``E[Z] >= 0`` for ``Z_u = d_u - ln(1 + bound) T_u``.
Units are independent pieces of text (pages), never tokens.

Three decisions, with figures in `benchmarks/results/certification`:

- The worst page is counted once more (`with_worst`). A sample of text whose losses have a long
  right tail usually holds too little of that tail, and then looks both better and less noisy than
  the text is. The chance that the next page is worse than all seen is 1 / (n + 1): one more page,
  as bad as the worst, stands for it. Its effect vanishes as n grows.
- The t test of the mean of Z. It is exact for normal Z and off by about skewness / sqrt(n).
- The studentised bootstrap (Efron 1979; Hall 1988). It learns that skewness from the sample, and
  is itself too bold where tails are heavy and symmetric.

*Both* tests must reject, with the worst page: the larger p-value decides. At exactly the bound,
either test alone, without that page, certifies up to 9% to 11% of heavy-tailed studies where 5%
were promised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from var_moe.errors import UsageError
from var_moe.evaluation.perplexity import log_ratio

Floats = NDArray[np.float64]

RESAMPLES = 9_999

QUALITY, SPEEDUP, LEARNED = "quality", "speedup", "learned_pct"
QUALITY_SHARE = 0.8
"""Quality's share of alpha where more is claimed: quality alone needs text, the other claims need
only more timed blocks."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A degradation with its confidence interval."""

    value: float
    low: float
    high: float
    upper: float  # one-sided

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "degradation": self.value,
            "degradation_interval": [self.low, self.high],
            "degradation_upper": self.upper,
        }


@dataclass(frozen=True, kw_only=True)
class QualityClaim:
    """The claim that a degradation is below a bound.

    Args:
        bound: on PPL(policy) / PPL(unmodified) - 1.
        alpha: error of the test, and of the one-sided upper bound.
        confidence: of two-sided intervals.
    """

    bound: float
    alpha: float
    confidence: float = 0.95

    def excess(self, change: Floats, tokens: NDArray[np.int64]) -> Floats:
        """Z of each unit: how far its loss rose above what the bound allows, in nats. (n,)"""
        return np.asarray(change - math.log1p(self.bound) * tokens)

    def interval(self, change: Floats, tokens: NDArray[np.int64]) -> Interval:
        """The degradation over all units, with t quantiles; see `log_ratio` for the arguments."""
        ratio, error = log_ratio(change, tokens)
        wide, one_sided = (
            error * float(stats.t.ppf(level, len(change) - 1))
            for level in ((1 + self.confidence) / 2, 1 - self.alpha)
        )
        return Interval(
            value=math.expm1(ratio),
            low=math.expm1(ratio - wide),
            high=math.expm1(ratio + wide),
            upper=math.expm1(ratio + one_sided),
        )


def with_worst(values: Floats) -> Floats:
    """The values, and the largest of them once more, along the first axis."""
    return np.concatenate([values, values.max(axis=0, keepdims=True)])


def t_statistic(values: Floats) -> Any:
    """mean / standard error along the first axis.

    Values without any spread give -inf, 0 or inf by the sign of their mean.
    """
    n = len(values)
    mean = values.mean(axis=0)
    error = values.std(axis=0, ddof=1) / math.sqrt(n)
    # Equal values leave a rounding error of a standard deviation, which must not count as spread.
    flat = error <= 1e-12 * np.abs(mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = mean / error
    return np.where(flat, np.where(mean == 0, 0.0, np.copysign(np.inf, mean)), ratio)


def t_p_value(values: Floats) -> Any:
    """P value of the one-sided t test that the mean is below zero, along the first axis."""
    return stats.t.cdf(t_statistic(values), len(values) - 1)


@lru_cache(maxsize=8)
def _counts(n: int, resamples: int, seed: int) -> NDArray[np.float32]:
    """How often each of n values is drawn in each resample. (resamples, n)"""
    rng = np.random.default_rng(seed)
    drawn = np.zeros((resamples, n), dtype=np.float32)
    for row in drawn:
        row += np.bincount(rng.integers(n, size=n), minlength=n)
    return drawn


def bootstrap_p_value(values: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Any:
    """P value of the studentised bootstrap that the mean is below zero, along the first axis.

    The resampled t statistics about the sample's own mean stand for those about zero under the
    hypothesis: p is the share of them that are at most the observed one, which counts itself.

    Args:
        values: (n,) or (n, studies).
        resamples: how many.
        seed: of the resamples.
    """
    one = values.ndim == 1
    table = values[:, None] if one else values
    n = len(table)
    observed = t_statistic(table)  # (studies,)
    spread = table.std(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = np.where(spread > 0, (table - table.mean(axis=0)) / spread, 0.0).astype(np.float32)
    counts = _counts(n, resamples, seed)
    mean = (counts @ unit).astype(np.float64) / n  # (resamples, studies)
    square = (counts @ np.square(unit)).astype(np.float64) / n
    error = np.sqrt(np.maximum(square - mean**2, 1e-12) / (n - 1))
    at_most = (mean / error <= observed).sum(axis=0)
    least = 1 / (resamples + 1)
    p = (at_most + 1) * least
    p = np.where(np.isinf(observed), np.where(observed < 0, least, 1.0), p)
    return float(p[0]) if one else p


def below_zero(values: Floats, *, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Test that the mean of independent values is below zero, the worst counted once more.

    Returns:
        P values of the t test and of the bootstrap; the larger one decides.

    Raises:
        UsageError: fewer than two values.
    """
    if len(values) < 2:
        raise UsageError(f"{len(values)} unit(s) of text: a test needs at least 2")
    tested = with_worst(values)
    return float(t_p_value(tested)), bootstrap_p_value(tested, resamples=resamples)


def split_alpha(alpha: float, claims: Sequence[str]) -> Mapping[str, float]:
    """Share alpha out over the claims that are made, so that all hold together (Bonferroni).

    Quality alone gets all of it; with others it keeps `QUALITY_SHARE`, and the others share the
    rest equally.
    """
    others = [claim for claim in claims if claim != QUALITY]
    if not others:
        return {QUALITY: alpha}
    rest = alpha * (1 - QUALITY_SHARE) / len(others)
    return {QUALITY: alpha * QUALITY_SHARE, **dict.fromkeys(others, rest)}


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
