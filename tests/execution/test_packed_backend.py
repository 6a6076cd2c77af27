"""Experts on weights that oneDNN has reordered."""

from __future__ import annotations

import pytest
import torch

from var_moe.execution.backends import packed as room
from var_moe.execution.backends.packed import PackedBackend, has_kernels
from var_moe.execution.backends.sorted import SortedBackend

pytestmark = pytest.mark.skipif(
    not has_kernels(torch.float32), reason="this build of torch has no oneDNN products"
)


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


def test_a_build_without_the_products(monkeypatch):
    class Nothing:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    assert not has_kernels.__wrapped__(torch.float32)


def test_products_that_are_wrong_are_not_used(monkeypatch):
    own = torch.ops.mkldnn

    class Wrong:
        _reorder_linear_weight = staticmethod(own._reorder_linear_weight)

        @staticmethod
        def _linear_pointwise(*given):
            return own._linear_pointwise(*given) + 1

    Wrong._linear_pointwise.binary = lambda *given: own._linear_pointwise.binary(*given)
    monkeypatch.setattr(torch.ops, "mkldnn", Wrong)
    assert not has_kernels.__wrapped__(torch.float32)
