"""Experts on reordered weights against the same experts on their own."""

from __future__ import annotations

import gc

import pytest
import torch

from var_moe.execution.backends import packed as room
from var_moe.execution.backends.packed import PackedExperts, can_pack, has_kernels
from var_moe.execution.backends.sorted import SortedExperts
from var_moe.execution.dispatch import execute, experts_modules, pair_backend
from var_moe.execution.session import automatic

pytestmark = pytest.mark.skipif(
    not has_kernels(torch.float32), reason="this build of torch has no oneDNN products"
)


@pytest.fixture
def layer(pairs):
    """hidden (T, D), index (T, K) with dropped pairs, weight (T, K)."""
    hidden, index = pairs
    return hidden, index, torch.rand(index.shape, generator=torch.Generator().manual_seed(5))


def both(module, layer):
    return (execute(module, *layer, backend) for backend in (PackedExperts(), SortedExperts()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_output_as_on_plain_weights(module, layer, dtype):
    if not has_kernels(dtype):
        pytest.skip(f"no oneDNN products in {dtype} here")
    hidden, index, weight = layer
    cast = module.to(dtype), (hidden.to(dtype), index, weight.to(dtype))
    got, expected = both(*cast)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - expected).float().norm() <= tolerance * expected.float().norm()
    assert got.dtype == dtype
    assert (got[7] == 0).all()  # nothing runs for it


@torch.no_grad()
def test_a_lone_token_and_no_pair_at_all(module, layer):
    hidden, index, weight = layer
    for rows in (slice(0, 1), slice(7, 8)):
        got, expected = both(module, (hidden[rows], index[rows], weight[rows]))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got, _ = both(module, (hidden, torch.full_like(index, -1), weight))
    assert (got == 0).all()


@torch.no_grad()
def test_one_broken_row_spoils_no_other_token(module, layer):
    hidden, index, weight = layer
    hidden[0] = float("inf")
    got, expected = both(module, (hidden, index, weight))
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
def test_changed_weights_are_packed_again(module, layer, name, change):
    before = execute(module, *layer, PackedExperts())
    change(getattr(module, name))
    got, expected = both(module, layer)
    assert not torch.allclose(before, expected, rtol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_change_within_a_session_is_seen(module, layer):
    backend = PackedExperts()
    execute(module, *layer, backend)
    module.down_proj.mul_(3.0)
    expected = execute(module, *layer, SortedExperts())
    torch.testing.assert_close(execute(module, *layer, backend), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sessions_share_copies_which_go_with_the_model(make_tiny_mixtral, layer, monkeypatch):
    model = make_tiny_mixtral(top_k=2)
    made = []
    own = room._pack
    monkeypatch.setattr(room, "_pack", lambda *given: made.append(given[1]) or own(*given))
    module = experts_modules(model)[0][1]
    for _ in range(3):
        execute(module, *layer, PackedExperts())
    assert made == list(range(module.num_experts))
    kept = len(room._copies)
    made.clear()
    del model, module
    gc.collect()
    assert len(room._copies) < kept


@torch.no_grad()
def test_rows_are_padded_to_few_numbers(module, monkeypatch):
    ran = []
    own = room._PackedExpert.run

    def run(expert, of, rows):
        ran.append(len(rows))
        return own(expert, of, rows)

    monkeypatch.setattr(room._PackedExpert, "run", run)
    dice = torch.Generator().manual_seed(4)
    backend = PackedExperts()
    for tokens in range(700, 760, 3):
        hidden = torch.randn(tokens, module.gate_up_proj.shape[2], generator=dice)
        index = torch.rand(tokens, module.num_experts, generator=dice).argsort(dim=1)[:, :2]
        layer = hidden, index, torch.rand(tokens, 2, generator=dice)
        got = execute(module, *layer, backend)
        expected = execute(module, *layer, SortedExperts())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(ran) == 20 * module.num_experts
    # A few experts are the last of their buffer, which has room for their padding too.
    assert {rows == room.padded(rows) for rows in ran} == {True}
    assert len(set(ran)) < 40


@pytest.mark.parametrize(
    ("rows", "more"), [(0, 0), (1, 1), (63, 63), (64, 64), (65, 66), (129, 132), (1000, 1008)]
)
def test_padding(rows, more):
    assert room.padded(rows) == more
    assert more <= 1.032 * rows


def test_gradients_flow_where_they_are_wanted(module, layer):
    hidden, index, weight = layer
    found = []
    for backend in (PackedExperts(), SortedExperts()):
        leaf = hidden.clone().requires_grad_()
        execute(module, leaf, index, weight, backend).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


class TestTheChoice:
    def test_it_is_taken_where_there_is_room(self, make_tiny_mixtral):
        model = make_tiny_mixtral(top_k=2)
        assert automatic(model, "auto") == "packed"
        assert automatic(model, "eager") == "eager"
        assert isinstance(pair_backend("packed"), PackedExperts)

    def test_large_experts_stay_as_they_are(self, make_tiny_mixtral, monkeypatch):
        model = make_tiny_mixtral(top_k=2)
        modules = [module for _, module in experts_modules(model)]
        size = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
        monkeypatch.setattr(room, "_machine_memory", lambda: 4 * size)
        assert can_pack(modules)
        monkeypatch.setattr(room, "_machine_memory", lambda: 4 * size - 4)
        assert automatic(model, "auto") == "sorted"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_other_dtypes_stay_as_they_are(self, make_tiny_mixtral, dtype):
        assert automatic(make_tiny_mixtral(top_k=2).to(dtype), "auto") == "sorted"

    def test_a_build_without_the_products(self, monkeypatch):
        class Nothing:
            pass

        monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
        assert not has_kernels.__wrapped__(torch.float32)

    def test_products_that_are_wrong_are_not_used(self, monkeypatch):
        own = torch.ops.mkldnn

        class Wrong:
            _reorder_linear_weight = staticmethod(own._reorder_linear_weight)

            @staticmethod
            def _linear_pointwise(*given):
                return own._linear_pointwise(*given) + 1

        Wrong._linear_pointwise.binary = lambda *given: own._linear_pointwise.binary(*given)
        monkeypatch.setattr(torch.ops, "mkldnn", Wrong)
        assert not has_kernels.__wrapped__(torch.float32)
