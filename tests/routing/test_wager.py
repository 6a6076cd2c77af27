"""The test's promise, by simulation: alarms without drift are rare, drift is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from var_moe.routing.wager import Wager, mean_range, payoffs

ALPHA = 0.2  # large, so that a few hundred streams tell it from a broken promise
STREAMS, UNITS = 500, 100
# Three standard errors of the share of alarms, were the rate exactly alpha.
MOST = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / STREAMS)

DRAWS = {
    "even": lambda rng, size: rng.beta(5, 5, size),
    "skewed": lambda rng, size: rng.beta(0.5, 2, size),
    "rare": lambda rng, size: (rng.random(size) < 0.05).astype(float),
    "some missing": lambda rng, size: np.where(
        rng.random(size) < 0.3, np.nan, rng.beta(2, 2, size)
    ),
}
MEANS = {"even": 0.5, "skewed": 0.2, "rare": 0.05, "some missing": 0.5}


def alarms(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> int | None:
    """Units after which the money has grown by 1 / alpha; (N, J) values."""
    stakes = np.full(values.shape[1], 1 / values.shape[1])
    wager = Wager(low, high, stakes)
    for row in values:
        wager.see(row)
        if wager.wealth >= 1 / ALPHA:
            return wager.units
    return None


def test_payoffs_by_hand() -> None:
    found = payoffs(np.array([0.75, np.nan]), np.array([0.5, 0.5]), np.array([0.6, 0.6]))
    assert found[0, 0].tolist() == pytest.approx([1 + f * 0.25 for f in (0.05, 0.15, 0.4, 0.9)])
    assert found[0, 1].tolist() == pytest.approx([1 - f * 0.5 for f in (0.05, 0.15, 0.4, 0.9)])
    assert (found[1] == 1).all()


def test_money_by_hand() -> None:
    wager = Wager(np.array([0.5]), np.array([0.5]), np.array([1.0]))
    assert wager.wealth == 1
    wager.see(np.array([1.0]))
    won = np.mean([1.05, 1.15, 1.4, 1.9])
    lost = np.mean([0.95, 0.85, 0.6, 0.1])
    assert wager.sides[0].tolist() == pytest.approx([won / 2 + 1 / 2, lost / 2 + 1 / 2])
    assert wager.wealth == pytest.approx(1)  # one gains what the other loses
    wager.see(np.array([np.nan]))
    assert wager.wealth == pytest.approx(1)
    assert wager.units == 2


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["skewed", *(pytest.param(kind, marks=slow) for kind in DRAWS if kind != "skewed")]
)
def test_false_alarms_at_the_edge_of_the_range(kind: str) -> None:
    rng = np.random.default_rng(7)
    edge = np.full(2, MEANS[kind])
    found = [alarms(DRAWS[kind](rng, (UNITS, 2)), edge, edge) for _ in range(STREAMS)]
    rate = sum(at is not None for at in found) / STREAMS
    assert rate <= MOST
    assert rate > 0.005  # or the test would say nothing


@slow
def test_false_alarms_of_dependent_statistics() -> None:
    """All statistics are of the same documents."""
    rng = np.random.default_rng(8)
    edge = np.full(6, 0.5)
    found = [
        alarms(np.repeat(rng.beta(3, 3, (UNITS, 1)), 6, axis=1), edge, edge) for _ in range(STREAMS)
    ]
    assert sum(at is not None for at in found) / STREAMS <= MOST


@pytest.mark.parametrize("shift", [-0.15, 0.15])
def test_a_shift_of_one_standard_deviation_is_found(shift: float) -> None:
    rng = np.random.default_rng(9)
    low, high = np.array([0.47] * 4), np.array([0.53] * 4)
    found = [
        alarms(np.clip(rng.normal(0.5 + shift, 0.15, (UNITS, 4)), 0, 1), low, high)
        for _ in range(50)
    ]
    assert None not in found
    assert np.median([at for at in found if at]) < 30


def test_a_late_shift_is_found_soon() -> None:
    rng = np.random.default_rng(10)
    low, high = np.array([0.47]), np.array([0.53])
    calm = np.clip(rng.normal(0.5, 0.15, (3000, 1)), 0, 1)
    shifted = np.clip(rng.normal(0.8, 0.15, (200, 1)), 0, 1)
    at = alarms(np.concatenate((calm, shifted)), low, high)
    assert at is not None
    assert 3000 < at < 3080


def test_endless_drift_stays_a_number() -> None:
    wager = Wager(np.array([0.1]), np.array([0.2]), np.array([1.0]))
    for _ in range(2000):
        wager.see(np.array([1.0]))
    assert math.isfinite(wager.wealth)
    assert wager.wealth > 1e6


@pytest.mark.parametrize("kind", ["even", pytest.param("skewed", marks=slow)])
def test_range_of_a_mean(kind: str) -> None:
    rng = np.random.default_rng(11)
    missed, widths = 0, []
    for _ in range(100):
        low, high = mean_range(DRAWS[kind](rng, 40), ALPHA)
        missed += not low <= MEANS[kind] <= high
        widths.append(high - low)
    assert missed / 100 <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / 100)
    assert np.mean(widths) < 0.25


def test_range_of_equal_values() -> None:
    low, high = mean_range(np.full(200, 0.5), 0.01)
    assert low < 0.5 < high
    assert high - low < 0.2
    assert mean_range(np.zeros(0), 0.01) == (0.0, 1.0)
