"""Predicted degradation of policies that run the first experts alone, against hand sums."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_replay import profile_like
from traces import OPTIONS, made_trace

from damages import damage_model
from var_moe.config import VARConfig
from var_moe.models.loading import LoadedModel
from var_moe.optimization.replay_sampler import pool_points
from var_moe.routing.naee import NAEEPolicy
from var_moe.routing.registry import policy_names, policy_spec
from var_moe.routing.simple import FixedKPolicy, NativePolicy, RandomSkipPolicy, TopPPolicy
from var_moe.routing.var import VARPolicy
from var_moe.tracing.policies import evaluate_policy
from var_moe.tracing.record import record_trace
from var_moe.tracing.replay import TraceReplay


class Ratios:
    """Calibrated thresholds as NAEE asks for them: one per layer."""

    layers, top_k = 1, 3

    def at(self, quantile):
        return torch.tensor([0.55])


@pytest.fixture
def trace():
    """Three tokens of one document, K = 3: shares 0.5, 0.3, 0.2; 0.6, 0.3, 0.1; 0.4, 0.35, 0.25."""
    router = [
        [((0, 1, 2), (0.5, 0.3, 0.2)), ((3, 1, 2), (0.6, 0.3, 0.1)), ((4, 5, 0), (0.4, 0.35, 0.25))]
    ]
    # By token: the damage of running one expert, and of running two.
    cut = torch.tensor([[[1.0, 0.5], [2.0, 0.25], [4.0, 0.125]]])
    return made_trace([[1, 2, 3]], router, damage={"cut": cut})


@pytest.mark.parametrize(
    ("policy", "damages"),
    [
        # 0.55 of the first: tokens keep (0.5, 0.3), (0.6), (0.4, 0.35, 0.25).
        (NAEEPolicy(0.5, ratios=Ratios()), (0.5, 2.0)),
        # Mass of 0.7: two experts, two, two.
        (TopPPolicy(0.7), (0.5, 0.25, 0.125)),
        # Mass of 0.55: two, one, two.
        (TopPPolicy(0.55), (0.5, 2.0, 0.125)),
        (FixedKPolicy(1), (1.0, 2.0, 4.0)),
        (NativePolicy(), ()),
    ],
)
def test_hand_sums(trace, policy, damages):
    found = evaluate_policy(trace, policy)
    assert found.first["cut"] == pytest.approx([sum(damages)])
    assert found.squares["cut"] == pytest.approx([sum(one**2 for one in damages)])
    expected = sum(one + one**2 / 2 for one in damages) / 2  # the first token has no loss
    assert found.degradation == pytest.approx(math.expm1(expected))


def test_unknown_where_a_decision_is_of_another_sort(recorded, trace):
    class Unscaled(FixedKPolicy):
        def route(self, context, layer, index, weight):
            routing = super().route(context, layer, index, weight)
            return type(routing)(index=routing.index, weight=weight, tier=routing.tier)

    class Last(NativePolicy):
        def route(self, context, layer, index, weight):
            index = index.clone()
            index[:, :-1] = -1
            weight = torch.ones_like(weight)
            return type(super().route(context, layer, index, weight))(
                index=index, weight=weight, tier=torch.full_like(index[:, 0], 2).to(torch.uint8)
            )

    class Nothing(NativePolicy):
        def route(self, context, layer, index, weight):
            return super().route(context, layer, torch.full_like(index, -1), weight)

    for policy in (Unscaled(1), Last(), Nothing()):
        found = evaluate_policy(trace, policy)
        assert found.degradation is None, policy
        assert found.report.tokens == 3
    assert evaluate_policy(recorded, RandomSkipPolicy(0.5)).degradation is not None
    plain = VARConfig(mode="plain", confidence_threshold=0.5, context_window_size=1)
    policy = VARPolicy(plain, profile_like(recorded))
    assert evaluate_policy(recorded, policy).degradation is None
    bare = made_trace([[1, 1]], [[((0, 1), (0.75, 0.25))] * 2])
    assert evaluate_policy(bare, FixedKPolicy(1)).degradation is None


@pytest.fixture(scope="module", params=[2, 3], ids=lambda k: f"K={k}")
def traced(request, make_tiny_mixtral, tiny_tokenizer, documents, make_profile):
    """A recorded trace of a model with K = 2 or 3, and its profile."""
    loaded = LoadedModel.of(make_tiny_mixtral(top_k=request.param), tiny_tokenizer, name="tiny")
    damage = damage_model(layers=3, experts=8, top_k=request.param, vocabulary=300)
    profile = replace(make_profile(loaded), damages={"none": damage})
    return record_trace(loaded, documents, profile=profile, **OPTIONS), profile


@pytest.mark.parametrize("name", policy_names())
def test_a_policy_says_whether_a_trace_tells_what_it_costs(traced, name):
    """What `cuts_only` promises, over the policy's whole search space."""
    trace, profile = traced
    spec, calibration = policy_spec(name), profile.calibration()
    space = spec.search_space(trace.top_k)
    points = pool_points(space, 0) if space else [{}]
    found = [
        evaluate_policy(trace, spec.make(point, calibration))
        for point in [*points[:9], *points[9 :: len(points) // 16 + 1]]
    ]
    assert all(one.degradation is not None for one in found) == spec.load().cuts_only
    kept = {one.report.experts_per_token for one in found}
    assert len(kept) > 1 or not space  # the settings do something


def test_verified_var_without_means_is_one_of_them(recorded):
    """Two ways to one figure: VAR's own code here, the vectorised replay there."""
    table = profile_like(recorded)
    config = VARConfig(confidence_threshold=0.7, context_window_size=2, residuals=False)
    expected = TraceReplay(recorded, table).evaluate(config).degradation
    found = evaluate_policy(recorded, VARPolicy(config, table)).degradation
    assert found == pytest.approx(expected, rel=1e-9)
