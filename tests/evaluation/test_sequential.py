"""The confidence sequence: by hand, and by simulation of what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest

from var_moe.evaluation.sequential import LEAST_DOCUMENTS, anytime_p_value, is_over, lower_bound


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
    noise = rng.normal(scale=2.0, size=100)
    change = math.log1p(0.02) * tokens + noise
    assert is_over(change, tokens, 0.01)
    assert is_over(change[:30], tokens[:30], 0.01)
    assert not is_over(change[: LEAST_DOCUMENTS - 1], tokens[: LEAST_DOCUMENTS - 1], 0.01)
    assert not is_over(change, tokens, 0.02)
    assert not is_over(change, tokens, 0.03)


def test_the_p_value_is_at_most_alpha_where_the_boundary_is_crossed() -> None:
    values = np.random.default_rng(4).normal(0.3, 1, size=200)
    looks = [values[:n] for n in range(2, 201)]
    p = [anytime_p_value(look, alpha=0.05, best_at=80) for look in looks]
    crossed = [lower_bound(look, alpha=0.05, best_at=80) > 0 for look in looks]
    assert [one <= 0.05 for one in p] == crossed
    assert set(crossed) == {False, True}
    assert p[: LEAST_DOCUMENTS - 2] == [1.0] * (LEAST_DOCUMENTS - 2)
    assert min(p) >= 0
    assert max(p) == 1


def test_the_p_value_by_hand() -> None:
    values = np.array([0.0, 2.0] * 10)
    level = -2 * math.log(0.2)
    rho2 = (level + math.log(level + 1)) / 20
    wide = 20 * rho2 + 1
    # margin(p) = mean / deviation, solved for p.
    ratio2 = 1 / (20 / 19)
    expected = math.sqrt(wide) / (2 * math.expm1(ratio2 * 400 * rho2 / (2 * wide)))
    assert anytime_p_value(values, alpha=0.1, best_at=20) == pytest.approx(expected)


def test_a_mean_that_is_not_above_zero_has_no_evidence() -> None:
    assert anytime_p_value(-np.ones(30), alpha=0.05) == 1
    assert anytime_p_value(np.ones(30), alpha=0.05) == 0  # without any spread
