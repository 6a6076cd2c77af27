"""Components of a forward on tiny models: all time is somewhere, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch

from var_moe.analysis.components import (
    COMPONENTS,
    ComponentTimings,
    attention_modules,
    profile_components,
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
    """A forward of 100 ms: attention 20, and experts; 8 of the policy, 2 of them before."""
    experts = span(
        "experts@3",
        30,
        90,
        inner=[span("decided", 36, 36)],
        operators=[
            span("aten::mm", 30, 34),
            span("aten::sort", 37, 41),
            span("aten::mm", 43, 60),
            span("aten::silu", 60, 62),
            span("aten::mm", 64, 80),
            span("aten::sum", 81, 88),
        ],
    )
    begun = [span("begun", 1, 1), span("other", 3, 4), span("attention@3", 5, 25)]
    lookup = [span("aten::gather", 1, 3)]
    forward = span("forward", 0, 100, inner=[*begun, experts], operators=lookup)
    found = ComponentTimings()
    found.add(forward, wall=wall)
    parts = {name: values for name, (values,) in found.by_component.items()}
    expected = {"attention": 20, "policy": 8 if wall else 6, "other": 18}
    # On CPU what lies between operators is time as well.
    expected |= {"compaction": 7, "experts": 37} if wall else {"compaction": 4, "experts": 35}
    expected["combine"] = 62 - sum(expected[name] for name in ("policy", "compaction", "experts"))
    assert {name: ms for name, ms in parts.items() if ms} == expected
    assert found.by_layer["experts"] == {3: [expected["experts"]]}
    baseline = ComponentTimings()
    baseline.add(span("forward", 0, 100, inner=[span("experts@3", 30, 90)]), wall=wall)
    assert baseline.by_component["experts"] == [60]


def test_attention_is_found_once_per_layer(model):
    found = attention_modules(model)
    assert [layer for layer, _ in found] == [0, 1, 2]
    assert found[0][1] is model.model.layers[0].self_attn
