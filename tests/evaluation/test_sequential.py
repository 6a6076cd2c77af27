"""The confidence sequence: by hand, and by simulation of what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest

from var_moe.evaluation.perplexity import DocumentLosses
from var_moe.evaluation.sequential import LEAST_DOCUMENTS, any_over, lower_bound


def test_the_boundary_by_hand() -> None:
    values = np.array([0.0, 2.0] * 10)
    # rho^2 for alpha = 0.1, tightest at 20: (l + ln(l + 1)) / 20 with l = -2 ln 0.2.
    level = -2 * math.log(0.2)
    rho2 = (level + math.log(level + 1)) / 20
    wide = 20 * rho2 + 1
    margin = math.sqrt(2 * wide / (400 * rho2) * math.log(1 + math.sqrt(wide) / 0.2))
    deviation = math.sqrt(20 / 19)  # of ten zeros and ten twos
    assert lower_bound(values, alpha=0.1, best_at=20) == pytest.approx(1 - deviation * margin)
    assert lower_bound(values[: LEAST_DOCUMENTS - 1], alpha=0.1) == -math.inf
    assert math.isfinite(lower_bound(values[:LEAST_DOCUMENTS], alpha=0.1))


@pytest.mark.parametrize("heavy", [False, True])
def test_it_is_seldom_wrong_at_any_time(heavy: bool) -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        values = rng.standard_t(4, size=200) if heavy else rng.normal(size=200)
        wrong += any(lower_bound(values[:n], alpha=0.05) > 0 for n in range(15, 201))
    # 20 are expected at most; an interval that is looked at each time is wrong in over 100.
    assert wrong <= 30


def test_what_is_clearly_over_is_seen_and_what_is_not_is_left_alone() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(100, 600, size=100)
    change = math.log1p(0.02) * tokens + rng.normal(scale=2.0, size=100)

    def over(limit: float, n: int = 100) -> bool:
        before = DocumentLosses(nll=3.0 * tokens[:n], tokens=tokens[:n])
        after = DocumentLosses(nll=before.nll + change[:n], tokens=tokens[:n])
        return any_over(before, after, {}, limit)

    assert over(0.01)
    assert over(0.01, 30)
    assert not over(0.01, LEAST_DOCUMENTS - 1)
    assert not over(0.02)
    assert not over(0.03)
