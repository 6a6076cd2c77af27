"""Components of a forward on tiny models: all time is somewhere, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch

from var_moe.analysis.components import (
    COMPONENTS,
    ComponentTimings,
    attention_modules,
    profile_components,
    run_policy,
)
from var_moe.analysis.profiler import Span
from var_moe.routing.simple import FixedKPolicy, NativePolicy

LAYERS = 3


@pytest.fixture(scope="module")
def model(make_tiny_mixtral):
    return make_tiny_mixtral()


@pytest.fixture(scope="module")
def batches():
    dice = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (2, 24), generator=dice) for _ in range(2)]


@pytest.mark.parametrize("policy", [None, NativePolicy(), FixedKPolicy(1)])
@pytest.mark.parametrize("backend", ["sorted", "eager"])
def test_the_parts_sum_to_the_forward(model, batches, policy, backend):
    if policy is None:
        backend = "eager"
    found = profile_components(model, batches, policy=policy, backend=backend, rounds=3)
    assert len(found.forwards) == 6
    assert set(found.by_component) == set(COMPONENTS)
    for at, whole in enumerate(found.forwards):
        parts = [values[at] for values in found.by_component.values()]
        assert sum(parts) == pytest.approx(whole)
        assert min(parts) >= 0
    always = {"attention", "router", "experts", "head", "other"}
    ours = {"policy", "compaction", "combine"}
    for name in always if policy is None else always | ours:
        assert found.share(name) > 0, name
    if policy is None:
        assert all(found.share(name) == 0 for name in ours)
    for name in ("attention", "router", "experts"):
        assert sorted(found.by_layer[name]) == list(range(LAYERS))
        assert all(len(row) == 6 for row in found.by_layer[name].values())
    values = found.to_dict()
    assert values["components"]["experts"].keys() >= {"mean_ms", "std_ms", "p50_ms", "p99_ms"}
    assert set(values["layers"]["attention"]) == {"0", "1", "2"}


def test_the_model_is_left_as_it_was(model, batches):
    before = model(batches[0]).logits
    backend = model.get_experts_implementation()
    profile_components(model, batches, policy=FixedKPolicy(1), backend="auto", rounds=1)
    assert torch.equal(model(batches[0]).logits, before)
    assert model.get_experts_implementation() == backend
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def span(name, start, end, inner=(), operators=()):
    return Span(
        name=name, ms=end - start, start=start, end=end, inner=list(inner), operators=operators
    )


@pytest.mark.parametrize("wall", [True, False])
def test_where_the_time_of_a_forward_belongs(wall):
    """A forward of 100 ms: attention 20, and experts of which 5 are the policy's."""
    experts = span(
        "experts@3",
        30,
        90,
        inner=[span("policy", 31, 36)],
        operators=[
            span("aten::sort", 37, 41),
            span("aten::mm", 43, 60),
            span("aten::silu", 60, 62),
            span("aten::mm", 64, 80),
            span("aten::sum", 81, 88),
        ],
    )
    forward = span("forward", 0, 100, inner=[span("attention@3", 5, 25), experts])
    found = ComponentTimings()
    found.add(forward, is_routed=True, wall=wall)
    parts = {name: values for name, (values,) in found.by_component.items()}
    expected = {"attention": 20, "policy": 5, "other": 20}
    # On CPU what lies between operators is time as well.
    expected |= {"compaction": 7, "experts": 37} if wall else {"compaction": 4, "experts": 35}
    expected["combine"] = 55 - expected["compaction"] - expected["experts"]
    assert {name: ms for name, ms in parts.items() if ms} == expected
    assert found.by_layer["experts"] == {3: [expected["experts"]]}
    baseline = ComponentTimings()
    baseline.add(forward, is_routed=False, wall=wall)
    assert baseline.by_component["experts"] == [55]


def test_pairs_are_counted_by_expert(model):
    ids = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))]
    ran = run_policy(model, ids, FixedKPolicy(1), backend="auto", layers=3, experts=8)
    assert ran.report.executed_pairs == (32, 32, 32)
    assert 1 <= ran.imbalance <= 8


def test_attention_is_found_once_per_layer(model):
    found = attention_modules(model)
    assert [layer for layer, _, _ in found] == [0, 1, 2]
    assert found[0][1] == "model.layers.0.self_attn"
