"""The performance model against answers computed by hand."""

from __future__ import annotations

import pytest

from var_moe.analysis.performance import PerformanceModel, TierDistribution
from var_moe.errors import UsageError

# 100 tokens, 2 layers: fixed 10 ms + 0.2 ms * 100 + 0.1 ms * pairs; baseline 80 ms.
GEOMETRY = {"layers": 2, "experts": 4, "top_k": 2, "batch_size": 2, "sequence": 50}
SECONDS = {"fixed": 0.010, "rest": 0.0002, "pair": 0.0001}


@pytest.fixture
def model():
    return PerformanceModel().set_costs(seconds=SECONDS, baseline_s=0.080, **GEOMETRY)


def test_latency_and_speedup_by_hand(model):
    # All learned: 2 * 100 * 2 = 400 pairs.
    everything = TierDistribution()
    assert model.predict_latency(everything) == pytest.approx(10 + 20 + 40)
    assert model.predict_speedup(everything) == pytest.approx(80 / 70)
    # Half fast: 1.5 experts per token, 300 pairs.
    half = TierDistribution(fast=0.2, cached=0.3, learned=0.5)
    assert half.experts_per_token(2) == pytest.approx(1.5)
    assert model.predict_latency(half) == pytest.approx(60)
    assert model.predict_speedup(TierDistribution(fast=1, learned=0)) == pytest.approx(80 / 50)


def test_a_learned_decision_that_cuts_counts_by_its_pairs(model):
    cut = TierDistribution(learned=1.0, experts_learned=1.25)
    assert model.predict_latency(cut) == pytest.approx(10 + 20 + 25)


def test_breakeven_by_hand(model):
    # 80 / 1.25 = 64 ms = 30 + 0.02 * 1000 * (1 + x): x = 0.7.
    found = model.find_breakeven_distribution(1.25)
    assert found.learned == pytest.approx(0.7, abs=1e-6)
    assert found.fast == pytest.approx(0.3, abs=1e-6)
    assert model.predict_speedup(found) >= 1.25
    assert model.find_breakeven_distribution(1.25, max_learned=0.4).learned == 0.4
    assert model.find_breakeven_distribution(1.0).learned == 1.0


def test_a_target_beyond_the_leading_experts_is_refused(model):
    with pytest.raises(UsageError, match=r"target_speedup = 1.7: beyond the 1.600x that 1 of 2"):
        model.find_breakeven_distribution(1.7)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"fast": 0.5}, r"fast \+ cached \+ learned = 1.5"),
        ({"fast": -0.5, "learned": 1.0}, r"TierDistribution.fast = -0.5: expected a number in"),
        ({"experts_learned": -1.0}, "experts_learned = -1.0"),
    ],
)
def test_shares_that_are_none(values, said):
    with pytest.raises(UsageError, match=said):
        TierDistribution(**values)


def test_costs_that_are_none(model):
    with pytest.raises(UsageError, match=r"call set_costs\(...\)"):
        PerformanceModel().predict_latency(TierDistribution())
    with pytest.raises(UsageError, match="unknown term 'router'"):
        PerformanceModel().set_costs(seconds={"router": 1}, baseline_s=1, **GEOMETRY)
    with pytest.raises(UsageError, match="baseline_s = 0"):
        PerformanceModel().set_costs(seconds=SECONDS, baseline_s=0, **GEOMETRY)
    with pytest.raises(UsageError, match="3 experts per token, but the model runs 2"):
        model.predict_latency(TierDistribution(experts_learned=3))
