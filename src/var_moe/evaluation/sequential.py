"""When a search may drop a configuration early: a test that holds however often it is looked at.

An asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2021,
arXiv:2103.06476, the one-sided normal-mixture boundary) holds at all sample sizes at once; an
ordinary interval that is looked at repeatedly does not. Documents must come in random order;
they are the units, never tokens.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from var_moe.evaluation.perplexity import DocumentLosses, Groups

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
    # The variance of the mixture that makes the bound tightest there (eq. 13 of the paper).
    level = -2 * math.log(2 * alpha)
    rho2 = (level + math.log(level + 1)) / best_at
    wide = n * rho2 + 1
    deviations = math.sqrt(2 * wide / (n**2 * rho2) * math.log1p(math.sqrt(wide) / (2 * alpha)))
    return float(values.mean() - values.std(ddof=1) * deviations)


def any_over(baseline: DocumentLosses, other: DocumentLosses, groups: Groups, limit: float) -> bool:
    """Whether the documents so far show that the degradation of a group is above a limit.

    With d_i the change of document i's summed loss and T_i its tokens, the degradation is above
    the limit when the mean of ``d_i - ln(1 + limit) T_i`` is above zero.

    Args:
        baseline, other: losses of all documents; those not scored yet have no tokens.
        groups: judged apart; empty judges all documents together.
        limit: on PPL(VAR) / PPL(baseline) - 1.
    """
    parts = list(groups.values()) or [np.arange(len(baseline.tokens))]
    excess = other.nll - baseline.nll - math.log1p(limit) * baseline.tokens
    return any(
        lower_bound(excess[own], alpha=FUTILE_ALPHA / len(parts)) > 0
        for own in (at[baseline.tokens[at] > 0] for at in parts)
    )
