"""Components of a forward on tiny models: all time is somewhere, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch

from var_moe.analysis.components import (
    COMPONENTS,
    _where,
    attention_modules,
    profile_components,
    timed_backend,
)
from var_moe.analysis.spans import GPUProfiler
from var_moe.execution.session import routed
from var_moe.routing.fixed_k import FixedKPolicy
from var_moe.routing.native import NativePolicy

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


@pytest.mark.parametrize("backend", ["sorted", "grouped_mm", "eager"])
def test_a_timed_backend_computes_the_same(model, batches, backend):
    with torch.inference_mode(), routed(model, FixedKPolicy(1), backend=backend):
        expected = model(batches[0]).logits
    timed = timed_backend(backend, GPUProfiler("cpu"))
    with torch.inference_mode(), routed(model, FixedKPolicy(1), backend=timed):
        assert torch.equal(model(batches[0]).logits, expected)


def test_where_a_stretch_belongs():
    assert _where("forward") == ("other", None)
    assert _where("forward/policy") == ("policy", None)
    assert _where("forward/combine@2/compaction/experts") == ("experts", 2)
    assert _where("forward/head") == ("head", None)


def test_attention_is_found_once_per_layer(model):
    found = attention_modules(model)
    assert [layer for layer, _, _ in found] == [0, 1, 2]
    assert found[0][1] == "model.layers.0.self_attn"
