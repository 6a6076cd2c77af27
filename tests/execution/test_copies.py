"""Backends that run on copies of the weights: against the same experts on plain weights."""

from __future__ import annotations

import weakref

import pytest
import torch

from var_moe.execution.backends import automatic, build, open_backend
from var_moe.execution.backends import copies as room
from var_moe.execution.backends.fused import FusedBackend, can_run
from var_moe.execution.backends.packed import PackedBackend, has_kernels
from var_moe.execution.backends.sorted import SortedBackend
from var_moe.execution.session import routed
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.simple import NativePolicy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=[PackedBackend, FusedBackend], ids=lambda kind: kind.name)
def kind(request):
    compiled = not isinstance(build.library(), str)
    if not (has_kernels(torch.float32) if request.param is PackedBackend else compiled):
        pytest.skip(f"{request.param.name}: neither kernels nor a compiler here")
    return request.param


@pytest.fixture
def prompt_ids():
    return torch.randint(8, 300, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layer(pairs):
    """hidden (T, D), index (T, K) with dropped pairs, weight (T, K)."""
    hidden, index = pairs
    return hidden, index, torch.rand(index.shape, generator=torch.Generator().manual_seed(5))


def both(kind, module, layer):
    return (backend.run(module, *layer) for backend in (kind(), SortedBackend()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_output_as_on_plain_weights(kind, module, layer, dtype):
    hidden, index, weight = layer
    cast = module.to(dtype), (hidden.to(dtype), index, weight.to(dtype))
    got, expected = both(kind, *cast)
    assert (got - expected).float().norm() <= TOLERANCE[dtype] * expected.float().norm()
    assert got.dtype == dtype
    assert (got[7] == 0).all()  # nothing runs for it


@torch.no_grad()
def test_a_lone_token_and_no_pair_at_all(kind, module, layer):
    hidden, index, weight = layer
    for rows in (slice(0, 1), slice(7, 8)):
        got, expected = both(kind, module, (hidden[rows], index[rows], weight[rows]))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got, _ = both(kind, module, (hidden, torch.full_like(index, -1), weight))
    assert (got == 0).all()


@torch.no_grad()
def test_one_broken_row_spoils_no_other_token(kind, module, layer):
    hidden, index, weight = layer
    hidden[0] = float("inf")
    got, expected = both(kind, module, (hidden, index, weight))
    assert not got[0].isfinite().all()
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2.0),
        lambda weight: weight.data.mul_(2.0),  # of which PyTorch's version counter knows nothing
        lambda weight: setattr(weight, "data", weight.data * 2.0),
    ],
    ids=["in place", "behind its back", "another tensor"],
)
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_changed_weights_are_packed_again(kind, module, layer, name, change):
    before = kind().run(module, *layer)
    change(getattr(module, name))
    got, expected = both(kind, module, layer)
    assert not torch.allclose(before, expected, rtol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_change_within_a_session_is_seen(kind, module, layer):
    backend = kind()
    backend.run(module, *layer)
    module.down_proj.mul_(3.0)
    expected = SortedBackend().run(module, *layer)
    torch.testing.assert_close(backend.run(module, *layer), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sessions_on_one_backend_share_copies(kind, make_tiny_mixtral, prompt_ids, monkeypatch):
    """And each looks whether the weights are still those, also where PyTorch does not know."""
    model, made = make_tiny_mixtral(top_k=2), []
    module = experts_modules(model)[0][1]
    with open_backend(kind.name) as backend:
        own = backend._copies._make
        monkeypatch.setattr(backend._copies, "_make", lambda of: made.append(of) or own(of))
        for _ in range(3):
            with routed(model, NativePolicy(), backend=backend):
                before = model(prompt_ids).logits
        assert len(made) == 3
        module.down_proj.data.mul_(2.0)
        with routed(model, NativePolicy(), backend=backend):
            after = model(prompt_ids).logits
        assert len(made) == 4
        assert not torch.allclose(before, after, rtol=1e-2)
        torch.testing.assert_close(after, model(prompt_ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False])
def test_copies_go_with_the_session_or_the_handle(
    kind, make_tiny_mixtral, prompt_ids, named, monkeypatch
):
    model, made = make_tiny_mixtral(top_k=2), []

    class Noted(room._Copy):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(weakref.ref(self))

    monkeypatch.setattr(room, "_Copy", Noted)
    backend = None if named else open_backend(kind.name)
    with routed(model, NativePolicy(), backend=backend or kind.name):
        model(prompt_ids)
    assert len(made) == 3
    assert {one() is None for one in made} == {named}
    if backend is not None:
        backend.close()
        assert all(one() is None for one in made)


def test_gradients_flow_where_they_are_wanted(kind, module, layer):
    hidden, index, weight = layer
    found = []
    for backend in (kind(), SortedBackend()):
        leaf = hidden.clone().requires_grad_()
        backend.run(module, leaf, index, weight).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


class TestTheChoice:
    def test_the_fastest_that_there_is(self, make_tiny_mixtral, monkeypatch):
        model = make_tiny_mixtral(top_k=2)
        assert automatic(model) == ("fused" if can_run(torch.float32) else "packed")
        monkeypatch.setattr(build, "library", lambda: "no compiler")
        assert automatic(model) == ("packed" if has_kernels(torch.float32) else "sorted")

    def test_large_experts_stay_as_they_are(self, make_tiny_mixtral, monkeypatch):
        model = make_tiny_mixtral(top_k=2)
        modules = [module for _, module in experts_modules(model)]
        size = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
        monkeypatch.setattr(room, "memory_limit", lambda: 4 * size)
        assert automatic(model) != "sorted"
        monkeypatch.setattr(room, "memory_limit", lambda: 4 * size - 4)
        assert automatic(model) == "sorted"

    def test_other_dtypes_stay_as_they_are(self, make_tiny_mixtral, monkeypatch):
        assert automatic(make_tiny_mixtral(top_k=2).to(torch.float64)) == "sorted"
        monkeypatch.setattr(build, "library", lambda: "no compiler")
        assert automatic(make_tiny_mixtral(top_k=2).to(torch.float16)) == "sorted"
