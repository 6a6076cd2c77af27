"""Forecasts of other policies: hand sums, the cost model's part, grids, and what is refused."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from var_moe.errors import UsageError
from var_moe.evaluation.cost import TERMS, CostModel
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.optimization.replay_run import TraceForecaster
from var_moe.optimization.settings import TuneSettings
from var_moe.routing import registry
from var_moe.routing.naee import RatioQuantiles
from var_moe.routing.registry import PolicySpec
from var_moe.routing.simple import FixedKPolicy, TopPPolicy
from var_moe.tracing.policies import PolicyReplayer, evaluate_policy
from var_moe.tracing.trace import RoutingTrace

COST = CostModel(
    # A policy's own calls and tokens are dear here: it would show if they were counted.
    seconds=dict(zip(TERMS, (1e-3, 1e-6, 2e-6, 1e-4, 0.5, 1e-3, 3e-7), strict=True)),
    baseline=0.05,
    setting=SpeedSetting(),
    layers=1,
    experts=6,
    top_k=3,
    error=0.0,
)


@pytest.fixture
def trace():
    """Three tokens of one document, K = 3, with the damage of running one expert, and of two."""
    index = torch.tensor([[[0, 1, 2], [3, 1, 2], [4, 5, 0]]])
    weight = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.35, 0.25]]])
    return RoutingTrace(
        ids=torch.tensor([1, 2, 3]),
        starts=torch.tensor([0, 3]),
        documents=torch.tensor([0]),
        index=index.short(),
        weight=weight.half(),
        entropy=torch.zeros((1, 3)).half(),
        damage={"cut": torch.tensor([[[0.1, 0.05], [0.2, 0.025], [0.4, 0.0125]]])},
        head={"model": "made", "tokens": 3},
    )


def forecaster(trace, policy, **calibration):
    own = {"none": calibration}
    return TraceForecaster({"none": trace}, COST, policy=policy, calibrations=own)


def test_hand_sums(trace):
    # Mass of 0.55: two, one and two experts; the first token has no loss.
    safe, bold = forecaster(trace, "top_p").forecast([{"p": 1.0}, {"p": 0.55}])
    damages = (0.05, 0.2, 0.0125)
    assert bold.degradation == pytest.approx(math.expm1(sum(d + d * d / 2 for d in damages) / 2))
    assert bold.experts_per_token == pytest.approx(5 / 3)
    assert safe.degradation == 0
    assert safe.experts_per_token == 3
    assert (bold.fast_pct, bold.cached_pct, bold.learned_pct) == (0, 0, 100)
    report = evaluate_policy(trace, TopPPolicy(0.55)).report
    assert bold.speedup == COST.speedup(report, decided=False)
    assert bold.speedup > safe.speedup


def test_calibration_reaches_the_policy(trace):
    ratios = RatioQuantiles(top_k=3, tokens=1, quantiles=((0.0, 0.55, 1.0),))
    found = forecaster(trace, "naee", ratios=ratios, sensitivity=None)
    # 0.55 of the first: tokens keep two, one and three experts.
    assert found.forecast([{"quantile": 0.5}])[0].experts_per_token == pytest.approx(2.0)
    with pytest.raises(UsageError, match="'naee' needs 'ratios'"):
        forecaster(trace, "naee").forecast([{"quantile": 0.5}])


def test_progress_is_shown_point_by_point(trace):
    seen = []
    forecaster(trace, "fixed_k").forecast([{"k": 1}, {"k": 2}], lambda *step: seen.append(step))
    assert seen == [(PolicyReplayer.STAGE, 1, 2), (PolicyReplayer.STAGE, 2, 2)]


def test_a_grid_is_the_forecasts_of_its_points(trace):
    space = {
        "min_experts": {"type": "int", "low": 1, "high": 2, "default": 1},
        "threshold": {"type": "float", "low": 0.01, "high": 1.0, "default": 0.4, "log": True},
    }
    found = forecaster(trace, "ser")
    grid = found.grid(space, 3)
    assert grid.shape == (2, 3)
    assert grid.values["threshold"] == pytest.approx((0.01, 0.1, 1.0))
    points = [grid.point(number) for number in range(grid.size)]
    for number, one in enumerate(found.forecast(points)):
        figures = asdict(one)
        assert {name: grid.row(number)[name] for name in figures} == pytest.approx(figures)
    assert len(set(grid.columns["degradation"].ravel())) == 3


def test_a_trace_without_damages_is_refused(trace):
    bare = RoutingTrace(
        **{name: getattr(trace, name) for name in ("ids", "starts", "documents", "index")},
        **{name: getattr(trace, name) for name in ("weight", "entropy", "head")},
    )
    with pytest.raises(UsageError, match="damages"):
        forecaster(bare, "top_p")


class Unscaled(FixedKPolicy):
    """Keeps the router's weights as they are: no damage is recorded of that."""

    def route(self, context, layer, index, weight):
        routing = super().route(context, layer, index, weight)
        return type(routing)(index=routing.index, weight=weight, tier=routing.tier)


@pytest.mark.parametrize("cuts_only", [False, True], ids=["says so", "claims otherwise"])
def test_what_a_replay_can_not_tell_is_refused_in_one_line(trace, monkeypatch, tmp_path, cuts_only):
    monkeypatch.setattr(Unscaled, "cuts_only", cuts_only)
    spec = PolicySpec(name="unscaled", target=f"{__name__}:Unscaled", summary="for this test")
    monkeypatch.setitem(registry._SPECS, "unscaled", spec)
    with pytest.raises(UsageError) as caught:
        forecaster(trace, "unscaled").forecast([{"k": 3}, {"k": 1}])
    line = str(caught.value)
    assert "policy 'unscaled'" in line
    assert "--method bayesian" in line
    assert "\n" not in line
    settings = {"policy": "unscaled", "method": "replay", "output": tmp_path}
    if cuts_only:
        assert TuneSettings(**settings).by_replay
        return
    with pytest.raises(UsageError) as caught:  # before anything is measured
        TuneSettings(**settings)
    assert str(caught.value) == line
