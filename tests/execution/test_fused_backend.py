"""The compiled kernel: what it does beside what every backend on copies does."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_experts import as_gpt_oss, concatenated, decision, experts, in_float64, inputs, silu

from var_moe.execution.backends import build
from var_moe.execution.backends import fused as room
from var_moe.execution.backends.fused import FusedBackend, can_run
from var_moe.execution.backends.sorted import SortedBackend
from var_moe.routing.compensation import Compensation, LayerCompensation, StandIn

pytestmark = pytest.mark.skipif(isinstance(build.library(), str), reason="no C++ compiler here")


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(
    hidden=st.integers(1, 90).map(lambda half: 2 * half),
    inner=st.integers(1, 90).map(lambda half: 2 * half),
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 4),
    gate=st.sampled_from([silu, as_gpt_oss, concatenated]),
    bias=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_layer_is_what_the_definition_says(
    hidden, inner, tokens, top_k, gate, bias, transposed, dtype
):
    module = experts(
        gate, hidden=hidden, inner=inner, bias=bias, transposed=transposed, dtype=dtype
    )
    index, weight = decision(tokens, top_k, 5, tokens)
    rows = inputs(tokens, hidden, dtype)
    got = FusedBackend().run(module, rows, index, weight)
    expected = in_float64(module, rows, index, weight)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert got.dtype == dtype
    assert (got.double() - expected).norm() <= tolerance * expected.norm() + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [32, 5000])
def test_a_token_is_the_same_whatever_is_beside_it(dtype, hidden):
    """5,000 inputs are more than are multiplied at once. With AMX, bfloat16 has two ways to sum."""
    if build.library().sums_in_two_ways(dtype.itemsize):
        pytest.skip("few rows and many are summed in another order")
    module = experts(hidden=hidden, inner=40, dtype=dtype)
    index, weight = decision(50, 2, 5, seed=1)
    rows, backend = inputs(50, hidden, dtype), FusedBackend()
    whole = backend.run(module, rows, index, weight)
    for token in (0, 7, 49):
        alone = slice(token, token + 1)
        assert torch.equal(
            backend.run(module, rows[alone], index[alone], weight[alone])[0], whole[token]
        )


@torch.no_grad()
def test_the_number_of_threads_changes_nothing():
    module, rows = experts(hidden=96, inner=200), inputs(300, 96)
    index, weight = decision(300, 2, 5, seed=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(FusedBackend().run(module, rows, index, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_large_forwards_run_in_pieces(monkeypatch):
    module, rows = experts(), inputs(41, 32)
    index, weight = decision(41, 2, 5, seed=3)
    whole = FusedBackend().run(module, rows, index, weight)
    monkeypatch.setattr(room, "_ELEMENTS", 1000)
    assert torch.equal(FusedBackend().run(module, rows, index, weight), whole)


@torch.no_grad()
@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 60])
def test_weights_that_16_bits_hold_take_no_more_and_change_nothing(short, tokens):
    if not can_run(short):
        pytest.skip(f"no {short} weights here")
    module = experts(dtype=short)
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, getattr(module, name).float())
    index, weight = decision(tokens, 2, 5, seed=4)
    backend = FusedBackend()
    got = backend.run(module, inputs(tokens, 32), index, weight)
    layer = backend._copies.of(module)
    assert {layer._first._weight.dtype, layer._second._weight.dtype} == {short}
    module.gate_up_proj[0, 0, 0] = 1 / 3  # which neither of them holds
    module.down_proj[0, 0, 0] = 1 / 3
    index[:] = index.clamp(min=1)  # an expert whose weights are as they were
    long = FusedBackend()
    expected = long.run(module, inputs(tokens, 32), index, weight)
    assert long._copies.of(module)._first._weight.dtype == torch.float32
    assert torch.equal(backend.run(module, inputs(tokens, 32), index, weight), expected)
    assert got.isfinite().all()


def test_it_is_right_here():
    """A kernel that computes its example wrong would be passed over without a word."""
    assert all(map(can_run, (torch.float32, torch.bfloat16)))
    assert can_run(torch.float16) == bool(build.library().serves(2))


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    own = build.library()

    class Wrong:
        def __getattr__(self, name):
            return getattr(own, name)

        def run_layer(self, layer, call):
            call.weight = 0  # as a processor that does something else
            call.tokens = 1
            own.run_step(layer, call, 0, (ctypes.c_int64 * 2)())

    wrong = Wrong()
    monkeypatch.setattr(build, "library", lambda: wrong)
    assert not any(map(can_run, (torch.float32, torch.bfloat16, torch.float16)))


@torch.no_grad()
def test_only_what_behaves_as_gpt_oss_is_run_as_such():
    kinds = {gate: room._gate_of(experts(gate), 48)[0] for gate in (silu, as_gpt_oss, concatenated)}
    assert kinds == {silu: room._GATED_SILU, as_gpt_oss: room._CLAMPED, concatenated: room._PLAIN}


@torch.no_grad()
def test_odd_sizes_in_bfloat16_run_on_plain_weights():
    for hidden, inner in ((31, 24), (32, 23)):
        module = experts(hidden=hidden, inner=inner, dtype=torch.bfloat16)
        index, weight = decision(9, 2, 5, seed=5)
        rows = inputs(9, hidden, torch.bfloat16)
        got = FusedBackend().run(module, rows, index, weight)
        assert torch.equal(got, SortedBackend().run(module, rows, index, weight))


def compensation(top_k, hidden, rank, number=5, dtype=torch.float32):
    rng = torch.Generator().manual_seed(rank)
    by_pair = top_k == 2
    rows = number**2 if by_pair else number
    low = [torch.randn(size, generator=rng) for size in ((rank, hidden), (rank,), (hidden, rank))]
    layer = LayerCompensation(
        torch.cat((torch.randn(rows, hidden, generator=rng), torch.zeros(1, hidden))),
        *(low if rank else ()),
    )
    whole = Compensation((layer,), by_pair=by_pair, experts=number)
    return StandIn(whole, layer.to(torch.device("cpu"), dtype))


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 60).map(lambda half: 2 * half),
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 4),
    rank=st.sampled_from([0, 1, 8, 70]),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_stands_in_is_added_as_the_definition_says(
    hidden, tokens, top_k, rank, dropped, dtype
):
    module, rows = experts(hidden=hidden, dtype=dtype), inputs(tokens, hidden, dtype)
    index, weight = decision(tokens, top_k, 5, tokens, dropped=0.0)
    kept = decision(tokens, top_k, 5, tokens, dropped=dropped)[0]
    stand_in = compensation(top_k, hidden, rank, dtype=dtype)
    got = FusedBackend().run_with(module, rows, index, weight, kept, stand_in)
    wide = compensation(top_k, hidden, rank, dtype=torch.float64)
    expected = wide.added_to(
        in_float64(module, rows, kept, weight), rows.double(), index, weight.double(), kept >= 0
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 2e-3}[dtype]
    assert got.dtype == dtype
    assert (got.double() - expected).norm() <= tolerance * expected.norm() + 1e-6


@torch.no_grad()
def test_a_stand_in_is_packed_once_and_goes_with_its_session():
    module, rows, backend = experts(), inputs(9, 32), FusedBackend()
    index, weight = decision(9, 2, 5, seed=6, dropped=0.0)
    kept = index.masked_fill(weight < 0.3, -1)
    stand_in = compensation(2, 32, 8)
    backend.run_with(module, rows, index, weight, kept, stand_in)
    made = backend._copies.of(module)._layers[stand_in][0]
    backend.run_with(module, rows, index, weight, kept, stand_in)
    assert backend._copies.of(module)._layers[stand_in][0] is made
    without = backend.run(module, rows, kept, weight)
    torch.testing.assert_close(without, SortedBackend().run(module, rows, kept, weight))
    del stand_in
    assert len(backend._copies.of(module)._layers) == 1


@torch.no_grad()
def test_the_profiler_sees_the_products():
    module, rows = experts(), inputs(9, 32)
    index, weight = decision(9, 2, 5, seed=7)
    plain = FusedBackend().run(module, rows, index, weight)
    with torch.profiler.profile() as run:
        got = FusedBackend().run(module, rows, index, weight)
    assert sum(event.name == "fused_mm" for event in run.events()) == 2
    assert torch.equal(got, plain)
