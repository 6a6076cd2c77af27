"""Components of a forward on tiny models: all time is somewhere, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch

from var_moe.analysis.components import (
    COMPONENTS,
    attention_modules,
    component_statistics,
    parts_of,
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
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (2, 24), generator=rng) for _ in range(2)]


@pytest.mark.parametrize(
    ("policy", "backend"),
    [(None, "eager"), (NativePolicy(), "sorted"), (FixedKPolicy(1), "eager")],
)
def test_all_time_is_somewhere(model, batches, policy, backend):
    timed = profile_components(model, batches, policy=policy, backend=backend, rounds=2)
    assert timed["forward"]["count"] == 4
    components = timed["components"]
    assert set(components) == set(COMPONENTS)
    assert sum(row["share"] for row in components.values()) == pytest.approx(1)
    assert sum(row["mean_ms"] for row in components.values()) == pytest.approx(
        timed["forward"]["mean_ms"]
    )
    always = {"attention", "router", "experts", "head", "other"}
    ours = {"policy", "compaction", "combine"}
    for name in always if policy is None else always | ours:
        assert components[name]["share"] > 0, name
    if policy is None:
        assert all(components[name]["share"] == 0 for name in ours)
    for name in ("attention", "router", "experts"):
        assert sorted(timed["layers"][name]) == [str(layer) for layer in range(LAYERS)]
        assert all(row["count"] == 4 for row in timed["layers"][name].values())


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
    parts = parts_of(forward, wall=wall)
    assert sum(parts.values()) == pytest.approx(100)
    expected = {"policy": 4, "compaction": 4, "experts": 35}
    if wall:  # what lies between operators is time as well
        expected = {"policy": 6, "compaction": 7, "experts": 37}
    expected["combine"] = 60 - sum(expected.values())
    assert {name: ms for (name, layer), ms in parts.items() if layer == "3" and ms} == {
        "attention": 20,
        **expected,
    }
    assert parts["policy", ""] == 2
    assert parts["other", ""] == 18
    baseline = parts_of(span("forward", 0, 100, inner=[span("experts@3", 30, 90)]), wall=wall)
    assert baseline["experts", "3"] == 60


def test_a_part_that_one_forward_lacks_took_no_time_there():
    rows = component_statistics([{("head", ""): 2.0, ("experts", "0"): 2.0}, {("head", ""): 4.0}])
    assert rows["components"]["head"]["share"] == 0.75
    assert rows["layers"]["experts"]["0"]["mean_ms"] == 1.0


def test_attention_is_found_once_per_layer(model):
    found = attention_modules(model)
    assert [layer for layer, _ in found] == [0, 1, 2]
    assert found[0][1] is model.model.layers[0].self_attn
