"""Sequential inference about a mean: valid however often it is looked at.

An asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2021,
arXiv:2103.06476, the one-sided normal-mixture boundary) holds at all sample sizes at once; an
ordinary interval that is looked at repeatedly does not. Documents must come in random order;
they are the units, never tokens.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LEAST_DOCUMENTS = 15
"""Documents before the first look: the boundary is asymptotic."""

FUTILE_ALPHA = 0.01
"""Chance that a search drops a configuration that keeps the bound; small, as nobody sees it."""


def lower_bound(values: NDArray[np.float64], *, alpha: float, best_at: int = 50) -> float:
    """Lower confidence bound of the mean, after the values so far; -inf where there are too few.

    Args:
        values: (n,) in random order.
        alpha: probability that the mean lies below the bound at any n.
        best_at: number of values at which the bound is to be tightest.
    """
    n = len(values)
    if n < LEAST_DOCUMENTS:
        return -math.inf
    return float(values.mean() - values.std(ddof=1) * margin(n, alpha=alpha, best_at=best_at))


def margin(n: int, *, alpha: float, best_at: int = 50) -> float:
    """How many standard deviations the bound lies below the mean of n values."""
    rho2 = _mixture(alpha, best_at)
    wide = n * rho2 + 1
    return math.sqrt(2 * wide / (n**2 * rho2) * math.log1p(math.sqrt(wide) / (2 * alpha)))


def anytime_p_value(values: NDArray[np.float64], *, alpha: float, best_at: int = 50) -> float:
    """P value of a mean that is not above zero, after the values so far; 1 for too few.

    The smallest level at which `lower_bound` is above zero, with the mixture of ``alpha``; at
    most ``alpha`` exactly where that of ``alpha`` is. The smallest of any number of looks is a
    p-value again.
    """
    n, mean, deviation = len(values), values.mean(), values.std(ddof=1)
    if n < LEAST_DOCUMENTS or mean <= 0:
        return 1.0
    rho2 = _mixture(alpha, best_at)
    wide = n * rho2 + 1
    with np.errstate(divide="ignore", over="ignore"):  # without any spread
        odds = np.expm1((mean / deviation * n) ** 2 * rho2 / (2 * wide))
    return min(1.0, float(math.sqrt(wide) / (2 * odds)))


def _mixture(alpha: float, best_at: int) -> float:
    """Variance of the mixture that makes the bound tightest at so many values (eq. 13 there)."""
    level = -2 * math.log(2 * alpha)
    return (level + math.log(level + 1)) / best_at


def is_over(
    change: NDArray[np.float64],
    tokens: NDArray[np.int64],
    limit: float,
    *,
    alpha: float = FUTILE_ALPHA,
) -> bool:
    """Whether the documents so far show that a relative perplexity change is above a limit.

    With ``d_i`` the change of document i's summed loss and ``T_i`` its tokens, the change is
    above the limit when the mean of ``d_i - ln(1 + limit) T_i`` is above zero.

    Args:
        change: (n,) d_i in nats, documents in random order.
        tokens: (n,) T_i.
        limit: on PPL / PPL - 1.
        alpha: probability of saying so wrongly, however often it is asked.
    """
    return lower_bound(change - math.log1p(limit) * tokens, alpha=alpha) > 0
