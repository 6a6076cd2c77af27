"""Experts on reordered weights against the same experts on their own."""

from __future__ import annotations

import weakref

import pytest
import torch

from var_moe.execution.backends import automatic, open_backend
from var_moe.execution.backends import packed as room
from var_moe.execution.backends.packed import PackedBackend, can_pack, has_kernels
from var_moe.execution.backends.sorted import SortedBackend
from var_moe.execution.session import routed
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.simple import NativePolicy

pytestmark = pytest.mark.skipif(
    not has_kernels(torch.float32), reason="this build of torch has no oneDNN products"
)


@pytest.fixture
def prompt_ids():
    return torch.randint(8, 300, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layer(pairs):
    """hidden (T, D), index (T, K) with dropped pairs, weight (T, K)."""
    hidden, index = pairs
    return hidden, index, torch.rand(index.shape, generator=torch.Generator().manual_seed(5))


def both(module, layer):
    return (backend.run(module, *layer) for backend in (PackedBackend(), SortedBackend()))


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
    before = PackedBackend().run(module, *layer)
    change(getattr(module, name))
    got, expected = both(module, layer)
    assert not torch.allclose(before, expected, rtol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_change_within_a_session_is_seen(module, layer):
    backend = PackedBackend()
    backend.run(module, *layer)
    module.down_proj.mul_(3.0)
    expected = SortedBackend().run(module, *layer)
    torch.testing.assert_close(backend.run(module, *layer), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sessions_on_one_backend_share_copies(make_tiny_mixtral, prompt_ids, monkeypatch):
    """And each looks whether the weights are still those, also where PyTorch does not know."""
    model, made = make_tiny_mixtral(top_k=2), []
    own = room._pack
    monkeypatch.setattr(room, "_pack", lambda *given: made.append(given[1]) or own(*given))
    module = experts_modules(model)[0][1]
    with open_backend("auto", model) as backend:
        for _ in range(3):
            with routed(model, NativePolicy(), backend=backend):
                before = model(prompt_ids).logits
        assert len(made) == 3 * module.num_experts
        module.down_proj.data.mul_(2.0)
        with routed(model, NativePolicy(), backend=backend):
            after = model(prompt_ids).logits
        assert len(made) == 4 * module.num_experts
        assert not torch.allclose(before, after, rtol=1e-2)
        torch.testing.assert_close(after, model(prompt_ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False])
def test_copies_go_with_the_session_or_the_handle(
    make_tiny_mixtral, prompt_ids, named, monkeypatch
):
    model, made = make_tiny_mixtral(top_k=2), []
    own = room._pack

    def pack(module, number):
        expert = own(module, number)
        made.append(weakref.ref(expert))
        return expert

    monkeypatch.setattr(room, "_pack", pack)
    backend = None if named else open_backend("packed")
    with routed(model, NativePolicy(), backend=backend or "packed"):
        model(prompt_ids)
    assert len(made) == 3 * 8
    assert {one() is None for one in made} == {named}
    if backend is not None:
        backend.close()
        assert all(one() is None for one in made)


@torch.no_grad()
def test_rows_are_padded_to_few_numbers(module, monkeypatch):
    ran = []
    own = room._PackedExpert.run

    def run(expert, of, rows):
        ran.append(len(rows))
        return own(expert, of, rows)

    monkeypatch.setattr(room._PackedExpert, "run", run)
    dice = torch.Generator().manual_seed(4)
    backend = PackedBackend()
    for tokens in range(700, 760, 6):
        hidden = torch.randn(tokens, module.gate_up_proj.shape[2], generator=dice)
        index = torch.rand(tokens, module.num_experts, generator=dice).argsort(dim=1)[:, :2]
        layer = hidden, index, torch.rand(tokens, 2, generator=dice)
        got = backend.run(module, *layer)
        expected = SortedBackend().run(module, *layer)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(ran) == 10 * module.num_experts
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
    for backend in (PackedBackend(), SortedBackend()):
        leaf = hidden.clone().requires_grad_()
        backend.run(module, leaf, index, weight).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


class TestTheChoice:
    def test_it_is_taken_where_there_is_room(self, make_tiny_mixtral):
        model = make_tiny_mixtral(top_k=2)
        assert automatic(model) == "packed"
        assert isinstance(open_backend("packed"), PackedBackend)

    def test_a_containers_limit_counts(self, tmp_path):
        """Control groups of version 2 and 1: its own limit, and those of the groups above."""
        machine = room.memory_limit(tmp_path)
        assert machine == room.os.sysconf("SC_PHYS_PAGES") * room.os.sysconf("SC_PAGE_SIZE")
        for place, value in {
            "proc/self/cgroup": "12:cpu,cpuacct:/a\n4:cpuset,memory:/a/b\n0::/pod/box\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": "5000\n",
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
        }.items():
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_text(value)
        assert room.memory_limit(tmp_path) == 5000
        (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("4000\n")
        assert room.memory_limit(tmp_path) == 4000
        (tmp_path / "sys/fs/cgroup/pod/box/memory.max").write_text("3000\n")
        assert room.memory_limit(tmp_path) == 3000
        (tmp_path / "proc/self/cgroup").write_text("0::/../elsewhere\n4:memory:/gone\n")
        assert room.memory_limit(tmp_path) == 4000  # the container's own group is at the top

    def test_large_experts_stay_as_they_are(self, make_tiny_mixtral, monkeypatch):
        model = make_tiny_mixtral(top_k=2)
        modules = [module for _, module in experts_modules(model)]
        size = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
        monkeypatch.setattr(room, "_memory", lambda: 4 * size)
        assert can_pack(modules)
        monkeypatch.setattr(room, "_memory", lambda: 4 * size - 4)
        assert automatic(model) == "sorted"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_other_dtypes_stay_as_they_are(self, make_tiny_mixtral, dtype):
        assert automatic(make_tiny_mixtral(top_k=2).to(dtype)) == "sorted"

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
