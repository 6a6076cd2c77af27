"""Several tests under one error rate, and the bound of the speedup."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from var_moe.certification.inference import (
    blocks_needed,
    median_lower_bound,
    split_alpha,
)


def test_all_claims_share_alpha():
    assert split_alpha(0.05, ["quality"]) == {"quality": 0.05}
    found = split_alpha(0.05, ["quality", "speedup", "learned_pct"])
    assert found == pytest.approx({"quality": 0.04, "speedup": 0.005, "learned_pct": 0.005})
    assert sum(found.values()) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("blocks", "alpha", "place"),
    [
        (20, 0.025, 6),  # P(Bin(20, 1/2) <= 5) = 0.0207, <= 6: 0.0577
        (20, 0.01, 5),  # <= 4: 0.0059
        (6, 0.025, 1),  # 1/64 = 0.0156
        (5, 0.025, None),  # 1/32 = 0.0313
        (1, 0.5, 1),
    ],
)
def test_the_lower_bound_is_an_order_statistic(blocks, alpha, place):
    ratios = [float(i) for i in range(1, blocks + 1)][::-1]
    expected = None if place is None else float(place)
    assert median_lower_bound(ratios, alpha) == expected
    if place is not None:
        assert stats.binom.cdf(place - 1, blocks, 0.5) <= alpha
        assert stats.binom.cdf(place, blocks, 0.5) > alpha


def test_blocks_needed_are_those_where_a_bound_begins():
    for alpha in (0.01, 0.025, 0.05):
        n = blocks_needed(alpha)
        assert median_lower_bound([1.0] * n, alpha) is not None
        assert median_lower_bound([1.0] * (n - 1), alpha) is None


def test_the_bound_errs_as_seldom_as_it_says():
    rng = np.random.default_rng(1)
    ratios = np.exp(rng.standard_t(2, size=(2000, 12)))  # median 1
    wrong = sum(median_lower_bound(row.tolist(), 0.05) > 1 for row in ratios)
    assert wrong <= 0.05 * 2000 + 20
