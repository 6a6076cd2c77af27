"""Sequential inference about a mean: valid however often it is looked at.

An asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2021,
arXiv:2103.06476, the one-sided normal-mixture boundary) holds at all sample sizes at once; an
ordinary interval that is looked at repeatedly does not. Documents must come in random order;
they are the units, never tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_DOCUMENTS = 15
"""Documents before the first look: the boundary is asymptotic."""

FUTILE_ALPHA = 0.01
"""Chance that a search drops a configuration that keeps the bound; small, as nobody sees it."""


def lower_boundary(
    values: NDArray[np.float64], *, alpha: float, best_at: int = 50
) -> NDArray[np.float64]:
    """Lower confidence bound of the mean after each of the values so far.

    Args:
        values: (N,) in random order.
        alpha: probability that the mean lies below any of the bounds.
        best_at: number of values at which the boundary is to be tightest.

    Returns:
        (N,) bounds, minus infinity where there are too few values for one.
    """
    count, mean, deviation = _running(values)
    bound: NDArray[np.float64] = mean - deviation * margin(count, alpha=alpha, best_at=best_at)
    bound[: LEAST_DOCUMENTS - 1] = -np.inf
    return bound


def margin(
    count: NDArray[np.float64], *, alpha: float, best_at: NDArray[np.float64] | int = 50
) -> NDArray[np.float64]:
    """How many standard deviations the boundary lies below the mean of so many values."""
    rho2 = _mixture(alpha, best_at)
    wide = count * rho2 + 1
    return np.asarray(np.sqrt(2 * wide / (count**2 * rho2) * np.log1p(np.sqrt(wide) / (2 * alpha))))


def anytime_p_values(
    values: NDArray[np.float64], *, alpha: float, best_at: int = 50
) -> NDArray[np.float64]:
    """P value of a mean that is not above zero, after each of the values so far.

    The smallest level at which `lower_boundary` is above zero there, with the mixture of
    ``alpha``; at most ``alpha`` exactly where that of ``alpha`` is. The smallest of any number of
    looks is a p-value again.

    Returns:
        (N,) in [0, 1]; 1 where there are too few values.
    """
    count, mean, deviation = _running(values)
    rho2 = _mixture(alpha, best_at)
    wide = count * rho2 + 1
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(mean > 0, mean / deviation, 0.0)
        level = np.sqrt(wide) / (2 * np.expm1(ratio**2 * count**2 * rho2 / (2 * wide)))
    p: NDArray[np.float64] = np.where(mean > 0, np.minimum(level, 1.0), 1.0)
    p[: LEAST_DOCUMENTS - 1] = 1.0
    return p


def _running(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Number, mean and standard deviation of the values so far."""
    count = np.arange(1, len(values) + 1, dtype=np.float64)
    mean = np.cumsum(values) / count
    square = np.cumsum(np.square(values)) / count
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0) * count / np.maximum(count - 1, 1))
    return count, mean, deviation


def _mixture(alpha: float, best_at: NDArray[np.float64] | int) -> Any:
    """Variance of the mixture that makes the boundary tightest at so many values (eq. 13 there)."""
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
    if len(change) < LEAST_DOCUMENTS:
        return False
    excess = change - math.log1p(limit) * tokens
    return bool(lower_boundary(excess, alpha=alpha)[-1] > 0)
