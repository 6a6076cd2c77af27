"""The tests of a mean, against figures worked out by hand and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from var_moe.certification.inference import (
    QualityClaim,
    below_zero,
    bootstrap_p_value,
    t_p_value,
    with_worst,
)
from var_moe.certification.judging import judge
from var_moe.certification.ordering import chance, units_needed
from var_moe.certification.scoring import Measured
from var_moe.errors import UsageError
from var_moe.evaluation.perplexity import DocumentLosses, degradation


def test_what_a_document_lost_beyond_its_allowance():
    claim = QualityClaim(bound=0.01, alpha=0.05)
    z = claim.excess(np.array([1.0, -2.0]), np.array([100, 50]))
    assert z == pytest.approx([1 - 100 * math.log(1.01), -2 - 50 * math.log(1.01)])


def test_the_t_test_by_hand():
    values = np.array([-3.0, -1.0, -2.0, 2.0])  # mean -1, squares about it 4 + 0 + 1 + 9
    t = -1 / math.sqrt(14 / 3 / 4)
    assert t_p_value(values) == pytest.approx(stats.t.cdf(t, 3))
    expected = stats.ttest_1samp(values, 0, alternative="less").pvalue
    assert t_p_value(values) == pytest.approx(expected)


def test_the_worst_counts_once_more():
    values = np.array([-3.0, -1.0, -2.0, 2.0])
    assert with_worst(values).tolist() == [-3, -1, -2, 2, 2]
    p_t, _ = below_zero(values, resamples=99)
    assert p_t == pytest.approx(t_p_value(np.array([-3.0, -1, -2, 2, 2])))


def test_the_larger_p_value_decides():
    rng = np.random.default_rng(3)
    for values in (rng.lognormal(size=40) - 2.2, -rng.lognormal(size=40) + 1.2):
        tokens = np.ones(len(values), dtype=int)
        measured = Measured(
            change=values,
            baseline_nll=values,
            tokens=tokens,
            documents=tokens,
            learned=tokens,
            decisions=tokens,
            executed=tokens,
        )
        verdict = judge("x", measured, {"": np.arange(40)}, QualityClaim(bound=0.01, alpha=0.05))
        (test,) = verdict.tests
        assert verdict.p == max(test.p_t, test.p_bootstrap)
        assert test.p_t != pytest.approx(test.p_bootstrap, abs=0.002)


def test_the_bootstrap_is_the_studentised_one():
    """The definition, in a loop, on resamples of its own."""
    values = np.random.default_rng(5).exponential(size=30) - 0.95
    rng, n = np.random.default_rng(6), 30
    observed = values.mean() / (values.std(ddof=1) / math.sqrt(n))
    count = 0
    for _ in range(4000):
        drawn = rng.choice(values, size=n)
        error = drawn.std(ddof=1) / math.sqrt(n)
        count += (drawn.mean() - values.mean()) / error <= observed
    assert bootstrap_p_value(values) == pytest.approx((count + 1) / 4001, abs=0.012)
    # Skewed to the right, a sample looks better than it is: the bootstrap knows.
    assert bootstrap_p_value(values) > t_p_value(values) + 0.01


def test_on_normal_values_both_agree():
    values = np.random.default_rng(7).normal(-0.15, 1, size=200)
    assert bootstrap_p_value(values) == pytest.approx(t_p_value(values), abs=0.01)


def test_many_studies_at_once_are_as_one_by_one():
    table = np.random.default_rng(8).normal(size=(20, 3))
    together = bootstrap_p_value(table, resamples=199)
    alone = [bootstrap_p_value(table[:, i].copy(), resamples=199) for i in range(3)]
    assert together == pytest.approx(alone)


@pytest.mark.parametrize(("value", "p"), [(-0.1, 0.0001), (0.0, 1.0), (0.1, 1.0)])
def test_values_without_spread(value, p):
    """0.1 repeated leaves a rounding error of a standard deviation: it is none."""
    p_values = below_zero(np.full(7, value))
    assert p_values[1] == pytest.approx(p)
    assert (max(p_values) < 0.05) is (value < 0)


def test_a_single_value_is_no_sample():
    with pytest.raises(UsageError, match="at least 2"):
        below_zero(np.array([1.0]))


def test_the_interval_agrees_with_the_paired_comparison():
    rng = np.random.default_rng(9)
    tokens = rng.integers(50, 500, size=60)
    base = 3.0 * tokens
    change = 0.005 * tokens + rng.normal(size=60)
    known = degradation(
        DocumentLosses(nll=base, tokens=tokens), DocumentLosses(nll=base + change, tokens=tokens)
    )
    found = QualityClaim(bound=0.01, alpha=0.05, confidence=0.9).interval(change, tokens)
    assert found.value == pytest.approx(known.value)
    assert found.upper == pytest.approx(known.upper)
    assert found.high == pytest.approx(known.upper)  # two-sided 90% ends at one-sided 95%
    assert math.log1p(found.high) + math.log1p(found.low) == pytest.approx(
        2 * math.log1p(found.value)
    )


def pilot(mean=-1.0, deviation=10.0, worst=-1.0):
    """Values with this mean, standard deviation and largest value."""
    others = np.random.default_rng(1).normal(size=200)
    others = np.minimum(others, 1.0)
    n, above = 201, worst - mean
    # The worst and the others together: mean 0, squares (n - 1) deviation^2.
    low = -above / (n - 1)
    rest = others - others.mean()
    rest *= math.sqrt(((n - 1) * deviation**2 - above**2 - (n - 1) * low**2) / (rest @ rest))
    z = mean + np.append(rest + low, above)
    assert (z.mean(), z.std(ddof=1)) == pytest.approx((mean, deviation))
    return z


def test_units_needed_by_hand():
    # Nothing much worse than the mean: (1.645 + 0.842)^2 10^2 = 618.3, and more for the worst.
    z = pilot(worst=20.0)
    assert 618 < units_needed(z, alpha=0.05) < 700
    assert chance(z, units_needed(z, alpha=0.05), alpha=0.05) == pytest.approx(0.8, abs=0.001)
    half = units_needed(z, alpha=0.05, power=0.5)
    assert chance(z, half, alpha=0.05) >= 0.5 > chance(z, half - 1, alpha=0.05)
    assert chance(z, 10, alpha=0.05) < 0.2


def test_a_bad_worst_page_needs_more_units():
    mild, bad = pilot(worst=20.0), pilot(worst=100.0)
    assert units_needed(mild, alpha=0.05) < units_needed(bad, alpha=0.05)


def test_the_chance_by_hand():
    # A hundredth unit of 20: mean (-99 + 20) / 100, variance 10^2 + 21^2 / 100.
    shift = 0.79 / math.sqrt(104.41) * 10
    expected = stats.norm.cdf(shift - stats.norm.ppf(0.95))
    assert chance(pilot(worst=20.0), 99, alpha=0.05) == pytest.approx(expected)


@pytest.mark.parametrize("mean", [0.0, -1e-5])  # at the bound; too close below it to be shown
def test_no_number_of_units_shows_what_is_not_so(mean):
    z = pilot(mean=mean, deviation=1.0, worst=3.0)
    assert units_needed(z - z.mean() + mean, alpha=0.05) is None


def test_the_planned_power_is_the_power():
    values = np.random.default_rng(4).normal(-0.2, 1, size=5000)
    units = units_needed(values[:500], alpha=0.05)
    rng = np.random.default_rng(5)
    drawn = values[rng.integers(5000, size=(units, 500))]
    share = float((t_p_value(with_worst(drawn)) <= 0.05).mean())
    assert share == pytest.approx(chance(values, units, alpha=0.05), abs=0.08)
