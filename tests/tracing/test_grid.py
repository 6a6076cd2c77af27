"""A grid of thresholds, replayed at once, equals its points replayed one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_replay import ENTROPY, SETTINGS, cases, configs, profile_like, table_of
from traces import made_trace

from var_moe.config import VARConfig
from var_moe.tracing.grid import ThresholdGrid
from var_moe.tracing.policies import FIGURES
from var_moe.tracing.replay import TraceReplay


def assert_equal(replay, config, frequencies, entropies):
    found = ThresholdGrid(replay, frequencies, entropies).evaluate(config)
    figures = found.figures()
    damages = bool(replay.trace.damage)
    assert ("degradation" in figures) == damages
    for i, j in product(range(len(frequencies)), range(len(entropies))):
        one = replay.evaluate(
            config.replace(frequency_threshold=frequencies[i], entropy_threshold=entropies[j])
        )
        report = one.report
        assert tuple(map(tuple, found.tiers[i, j].tolist())) == report.tier_counts
        assert tuple(found.pairs[i, j].tolist()) == report.executed_pairs
        for name in FIGURES:
            assert figures[name][i, j] == pytest.approx(getattr(report, name)), name
        if damages:
            assert set(found.first) == set(one.first)
            for kind, sums in one.first.items():
                assert found.first[kind][i, j] == pytest.approx(sums, rel=1e-9, abs=1e-9)
                squares = one.squares[kind]
                assert found.squares[kind][i, j] == pytest.approx(squares, rel=1e-9, abs=1e-9)
            predicted = figures["degradation"][i, j]
            assert predicted == pytest.approx(one.degradation, rel=1e-9, abs=1e-12)


def with_damages(trace, seed):
    rng = torch.Generator().manual_seed(seed)
    shape = (trace.layers, trace.tokens)
    damage = {k: torch.randn(shape, generator=rng) for k in ("cut_residual", "next", "foreign")}
    damage["cut"] = torch.randn((*shape, trace.top_k - 1), generator=rng)
    return damage


@pytest.mark.slow
@SETTINGS
@given(
    cases(),
    configs(),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.lists(st.sampled_from(ENTROPY), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([False, None]),
)
def test_random_streams(case, config, frequencies, entropies, damages, residuals):
    """Both modes, thresholds in any order and equal ones too, K of 1, 2 and 4."""
    documents, router, table = case
    trace = made_trace(documents, router)
    if damages:
        trace = made_trace(documents, router, damage=with_damages(trace, 1))
    replay = TraceReplay(trace, table_of(table, len(router), trace.top_k))
    assert_equal(replay, config.replace(residuals=residuals), frequencies, entropies)


@pytest.mark.parametrize("mode", ["plain", "verified"])
@pytest.mark.parametrize("residuals", [False, None])
def test_a_recorded_trace(recorded, mode, residuals):
    replay = TraceReplay(recorded, profile_like(recorded))
    grid = ThresholdGrid(replay, [30, 0, 20], [0.6, 0.3])
    for confidence, size in product((0.6, 0.9), (0, 60)):
        config = VARConfig(
            confidence_threshold=confidence,
            cache_size=size,
            context_window_size=2,
            mode=mode,
            residuals=residuals,
        )
        assert_equal(replay, config, [30, 0, 20], [0.6, 0.3])
        # One grid for all of them, which keeps what they share.
        again = ThresholdGrid(replay, [30, 0, 20], [0.6, 0.3]).evaluate(config)
        assert np.array_equal(grid.evaluate(config).pairs, again.pairs)
        for name, sums in grid.evaluate(config).first.items():
            assert np.array_equal(sums, again.first[name])
