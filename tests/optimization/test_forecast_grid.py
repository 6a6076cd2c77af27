"""Grids of forecasts equal forecasts one by one; sensitivity with known indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from var_moe.config import SEARCH_SPACE, VARConfig
from var_moe.errors import UsageError
from var_moe.evaluation.cost import TERMS, CostModel
from var_moe.evaluation.evaluator import SpeedSetting
from var_moe.optimization.forecast_grid import (
    AXES,
    grid_values,
    non_dominated,
)
from var_moe.optimization.replay_forecast import ReplayForecaster
from var_moe.optimization.search_space import grid_points
from var_moe.routing.fast_path import RoutingTable
from var_moe.tracing.replay import TraceReplay
from var_moe.tracing.trace import RoutingTrace

LAYERS, TOKENS, EXPERTS = 2, 600, 4
COST = CostModel(
    seconds=dict(zip(TERMS, (1e-3, 1e-6, 2e-6, 1e-4, 2e-4, 1e-7, 3e-7), strict=True)),
    baseline=0.05,
    setting=SpeedSetting(),
    layers=LAYERS,
    experts=EXPERTS,
    top_k=2,
    error=0.0,
)


@pytest.fixture(scope="module")
def replay():
    dice = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 12, (TOKENS,), generator=dice)
    index = torch.rand((LAYERS, TOKENS, EXPERTS), generator=dice).topk(2, dim=2).indices
    first = 0.5 + 0.5 * torch.rand((LAYERS, TOKENS), generator=dice)
    damage = torch.randn((LAYERS, TOKENS), generator=dice)
    trace = RoutingTrace(
        ids=ids,
        starts=torch.tensor([0, 250, TOKENS]),
        documents=torch.arange(2),
        index=index.short(),
        weight=torch.stack((first, 1 - first), dim=2).half(),
        entropy=torch.zeros((LAYERS, TOKENS)).half(),
        damage={
            "cut": damage[..., None] / 4,
            "cut_residual": damage / 5,
            "next": damage,
            "foreign": 2 * damage,
        },
        head={"model": "made", "tokens": TOKENS},
    )
    table = RoutingTable(
        count=torch.randint(0, 200, (LAYERS, 12), generator=dice).double(),
        entropy=1.5 * torch.rand((LAYERS, 12), generator=dice).double(),
        index=torch.randint(0, EXPERTS, (LAYERS, 12, 1), generator=dice),
        weight=torch.ones((LAYERS, 12, 1)),
    )
    return TraceReplay.of_table(trace, table)


@pytest.mark.parametrize("mode", ["verified", "plain"])
def test_every_point_is_its_own_forecast(replay, mode):
    space = {
        **SEARCH_SPACE,
        "cache_size": {"type": "int", "low": 5, "high": 40},
        "cache_ttl_seconds": {"type": "float", "low": 0.05, "high": 0.5},
        "context_window_size": {"type": "int", "low": 1, "high": 2},
    }
    forecaster = ReplayForecaster(replay, COST, mode=mode)
    grid = forecaster.grid(space, 2)
    points = list(grid_points(space, 2))
    assert grid.size == len(points) == 2**6
    assert len(set(grid.columns["experts_per_token"].ravel())) > 10
    for number, (point, one) in enumerate(zip(points, forecaster.forecast(points), strict=True)):
        assert grid.point(number) == point
        row = grid.row(number)
        for name in ("degradation", "speedup", "experts_per_token", "fast_pct", "learned_pct"):
            assert row[name] == pytest.approx(getattr(one, name), rel=1e-9, abs=1e-12), name
    table = grid.table()
    assert list(table)[:6] == list(AXES)
    assert [{name: table[name][i] for name in AXES} for i in range(grid.size)] == points


def test_values_of_a_grid():
    values = grid_values(n_points=5)
    assert [len(found) for found in values.values()] == [5] * 6
    assert values["cache_size"] == (100, 1325, 2550, 3775, 5000)
    only = grid_values({"cache_size": SEARCH_SPACE["cache_size"]}, 3)
    assert [len(only[name]) for name in AXES] == [1, 1, 1, 3, 1, 1]
    assert only["entropy_threshold"] == (VARConfig().entropy_threshold,)
    with pytest.raises(UsageError, match="expected names among"):
        grid_values({"quantile": {"type": "float", "low": 0, "high": 1}}, 3)


def test_front_is_what_no_other_beats():
    cost = np.array([3.0, 1.0, 2.0, 2.0, 4.0, 1.0])
    gain = np.array([5.0, 1.0, 3.0, 4.0, 5.0, 0.5])
    assert non_dominated(cost, gain) == [1, 3, 0]
    dice = np.random.default_rng(0)
    cost, gain = dice.random(200), dice.random(200)
    by_hand = [
        i
        for i in np.argsort(cost)
        if not any((cost < cost[i]) & (gain >= gain[i]) | (cost <= cost[i]) & (gain > gain[i]))
    ]
    assert non_dominated(cost, gain) == by_hand
