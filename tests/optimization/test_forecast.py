"""Grids of VAR's forecasts equal forecasts one by one, and the front."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import grid_points

from var_moe.config import SEARCH_SPACE
from var_moe.evaluation.cost import TERMS, CostModel
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.optimization.forecast import non_dominated
from var_moe.optimization.replay_run import TraceForecaster
from var_moe.routing.var import RoutingTable
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
def parts():
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 12, (TOKENS,), generator=rng)
    index = torch.rand((LAYERS, TOKENS, EXPERTS), generator=rng).topk(2, dim=2).indices
    first = 0.5 + 0.5 * torch.rand((LAYERS, TOKENS), generator=rng)
    damage = torch.randn((LAYERS, TOKENS), generator=rng)
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
        count=torch.randint(0, 200, (LAYERS, 12), generator=rng).double(),
        entropy=1.5 * torch.rand((LAYERS, 12), generator=rng).double(),
        index=torch.randint(0, EXPERTS, (LAYERS, 12, 1), generator=rng),
        weight=torch.ones((LAYERS, 12, 1)),
    )
    return trace, table


@pytest.mark.parametrize("mode", ["verified", "plain"])
def test_every_point_is_its_own_forecast(parts, mode):
    space = {
        **SEARCH_SPACE,
        "cache_size": {"type": "int", "low": 5, "high": 40},
        "cache_ttl_seconds": {"type": "float", "low": 0.05, "high": 0.5},
        "context_window_size": {"type": "int", "low": 1, "high": 2},
    }
    trace, table = parts
    calibrations, fixed = {"none": {"table": table}}, {"mode": mode}
    forecaster = TraceForecaster(
        {"none": trace}, COST, policy="var", calibrations=calibrations, fixed=fixed, decided=True
    )
    grid = forecaster.grid(space, 2)
    points = grid_points(space, 2)
    assert grid.size == len(points) == 2**6
    assert len(set(grid.columns["experts_per_token"].ravel())) > 10
    for number, (point, one) in enumerate(zip(points, forecaster.forecast(points), strict=True)):
        assert grid.point(number) == point
        row = grid.row(number)
        for name in ("degradation", "speedup", "experts_per_token", "fast_pct", "learned_pct"):
            assert row[name] == pytest.approx(getattr(one, name), rel=1e-9, abs=1e-12), name
    table = grid.table()
    assert list(table)[:6] == list(SEARCH_SPACE)
    assert [{name: table[name][i] for name in SEARCH_SPACE} for i in range(grid.size)] == points
    # Some of the thresholds, in any order; the others have their defaults.
    some = {name: space[name] for name in ("context_window_size", "confidence_threshold")}
    grid = forecaster.grid(some, 3)
    assert grid.shape == (2, 3)
    for number, one in enumerate(forecaster.forecast([grid.point(n) for n in range(grid.size)])):
        assert grid.row(number)["degradation"] == pytest.approx(one.degradation, rel=1e-9)


def test_front_is_what_no_other_beats():
    cost = np.array([3.0, 1.0, 2.0, 2.0, 4.0, 1.0])
    gain = np.array([5.0, 1.0, 3.0, 4.0, 5.0, 0.5])
    assert non_dominated(cost, gain) == [1, 3, 0]
    rng = np.random.default_rng(0)
    cost, gain = rng.random(200), rng.random(200)
    by_hand = [
        i
        for i in np.argsort(cost)
        if not any((cost < cost[i]) & (gain >= gain[i]) | (cost <= cost[i]) & (gain > gain[i]))
    ]
    assert non_dominated(cost, gain) == by_hand
