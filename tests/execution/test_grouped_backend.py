"""The backend for a GPU: its values on CPU against the sorted one, and that nothing waits."""

from __future__ import annotations

import copy

import pytest
import torch

from families import find_families, tiny_model
from var_moe.execution.backends import grouped as room
from var_moe.execution.backends import open_backend
from var_moe.execution.backends.grouped import GroupedBackend
from var_moe.execution.backends.sorted import SortedBackend
from var_moe.models.moe_layers import experts_modules

FEW = {"few tokens": 5, "many": 30}


@pytest.fixture(params=["mixtral", "gpt_oss", "nemotron_h"], scope="module")
def experts(request):
    """Experts with a gate, with biases and transposed weights, and without a gate."""
    family = next(f for f in find_families() if f.module == request.param)
    return experts_modules(tiny_model(family))[0][1]


@pytest.fixture(params=FEW.values(), ids=FEW)
def layer(request, experts, monkeypatch):
    monkeypatch.setattr(room, "DECODE_TOKENS", 10)
    rng, tokens = torch.Generator().manual_seed(3), request.param
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    hidden = torch.randn(tokens, width, generator=rng)
    index = torch.rand(tokens, experts.num_experts, generator=rng).argsort(dim=1)[:, :2]
    index[::3, 1] = -1
    index[1, 0] = -1
    index[2] = -1  # a token without any expert
    return hidden, index, torch.rand(tokens, 2, generator=rng)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_of_the_sorted_backend(experts, layer, dtype):
    hidden, index, weight = layer
    module = copy.deepcopy(experts).to(dtype)
    given = module, hidden.to(dtype), index, weight.to(dtype)
    got, expected = (kind().run(*given) for kind in (GroupedBackend, SortedBackend))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - expected).float().norm() <= tolerance * expected.float().norm()
    assert got.dtype == dtype
    assert (got[2] == 0).all()


@torch.no_grad()
def test_keeping_all_is_transformers_own(experts, layer):
    hidden, index, weight = layer
    index = index.clamp(min=0)
    name = "batched_mm" if len(hidden) == FEW["few tokens"] else "grouped_mm"
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    expected = ALL_EXPERTS_FUNCTIONS[name](experts, hidden, index, weight)
    assert torch.equal(GroupedBackend().run(experts, hidden, index, weight), expected)


@torch.no_grad()
def test_nothing_waits_for_the_device(experts, layer):
    """Meta tensors hold no values: reading one on the host would raise."""
    module = copy.deepcopy(experts).to("meta", torch.bfloat16)
    hidden, index, weight = (tensor.to("meta") for tensor in layer)
    given = hidden.bfloat16(), index, weight.bfloat16()
    assert GroupedBackend().run(module, *given).shape == layer[0].shape
    with pytest.raises((NotImplementedError, RuntimeError)):
        open_backend("grouped_mm").run(module, *given)


@torch.no_grad()
def test_dropped_rows_reach_no_product(experts, layer, monkeypatch):
    """They stand behind the last offset, whatever they hold."""
    from transformers.integrations import moe

    hidden, index, weight = layer
    seen, own = [], moe._grouped_linear

    def linear(rows, weights, ends, **options):
        seen.append((len(rows), int(ends[-1])))
        out = own(rows, weights, ends, **options)
        out[int(ends[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(moe, "_grouped_linear", linear)
    monkeypatch.setattr(room, "DECODE_TOKENS", 0)
    got = GroupedBackend().run(experts, hidden, index, weight)
    torch.testing.assert_close(
        got, SortedBackend().run(experts, hidden, index, weight), rtol=1e-4, atol=1e-5
    )
    assert set(seen) == {(index.numel(), int((index >= 0).sum()))}


def test_gradients_are_those_of_the_sorted_backend(experts, layer):
    hidden, index, weight = layer
    found = []
    for backend in (GroupedBackend(), SortedBackend()):
        leaf = hidden.clone().requires_grad_()
        backend.run(experts, leaf, index, weight).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_copies_of_weights_stay_small(experts, layer, monkeypatch):
    hidden, index, weight = layer
    monkeypatch.setattr(room, "_COPY_BYTES", 0)
    called = []
    monkeypatch.setattr(room, "_batched", lambda *given: called.append(given))
    GroupedBackend().run(experts, hidden, index, weight)
    assert not called


def test_auto_takes_it_where_there_is_no_cpu(make_tiny_mixtral):
    assert open_backend("auto", make_tiny_mixtral().to("meta")).name == "grouped"
