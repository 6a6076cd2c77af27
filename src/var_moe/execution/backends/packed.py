"""Our experts backend on CPU: the loop over experts, on weights laid out for oneDNN.

A matrix product by a weight that oneDNN has reordered once, for its own kernels, is faster than
one by the plain weight, most of all for the few rows that an expert gets; and the activation, and
the gate's product, are done where the product is written. PyTorch's Inductor serves frozen models
so (``torch/_inductor/mkldnn_lowerings.py``); these are the same operators.

The reordered weights are a second copy, kept as long as the backend. So this is the choice of
``"auto"`` only where the experts take little of the memory that there is; and rounding differs from
``grouped_mm``'s, as between any two kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from var_moe.execution.backends.base import ExpertsBackend, activate, is_plain_silu
from var_moe.execution.backends.copies import WeightCopies, can_copy, worth_copying
from var_moe.execution.backends.sorted import (
    Scratch,
    SortedBackend,
    SortedPairs,
    lone_token,
    pieces,
    sort_pairs,
    sum_pairs,
)
from var_moe.models.moe_layers import biases_of, weights_of

_ROWS = 256  # that oneDNN lays weights out for; other numbers of rows run on the same layout


class PackedBackend(ExpertsBackend):
    """Runs experts on weights laid out for oneDNN; where that is impossible, on plain ones."""

    name = "packed"

    def __init__(self) -> None:
        self._plain = SortedBackend()
        self._scratch = Scratch()
        self._copies = WeightCopies(_pack_all)

    def exact(self) -> ExpertsBackend:
        return self._plain

    def begin(self) -> None:
        self._copies.begin()

    def close(self) -> None:
        self._plain.close()
        self._scratch = Scratch()
        self._copies.clear()

    def run(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if not _serves(module, hidden):
            return self._plain.run(module, hidden, index, weight)
        experts = self._copies.of(module)
        if len(index) == 1:
            return lone_token(
                lambda number, target: target.copy_(experts[number].run(module, hidden)),
                *(hidden, index, weight),
            )
        found = sort_pairs(index, module.num_experts)
        size = len(found.token)
        # With room for the padding of the last expert's rows.
        rows = self._scratch.take("rows", hidden, size + _step(size), hidden.shape[1])
        torch.index_select(hidden, 0, found.token, out=rows[:size])
        out = self._scratch.take("out", hidden, size, hidden.shape[1])
        for number, a, b in pieces(module, found.counts):
            # Padded by rows of the next expert, or by what was there before.
            padding = rows[a : a + padded(b - a)]
            out[a:b] = experts[number].run(module, padding)[: b - a]
        if not size:
            return torch.zeros_like(hidden)
        if {hidden.dtype, weight.dtype} == {torch.float32}:
            return _sum_as_bags(found, out, index, weight)
        return sum_pairs(found, out, index, weight, self._scratch)


def _serves(module: Any, hidden: Tensor) -> bool:
    """Whether the layer can run on copies of its weights."""
    return can_copy(module, hidden) and has_kernels(hidden.dtype)


def _sum_as_bags(found: SortedPairs, out: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`sum_pairs` in one kernel: a token is a bag of its executed pairs' rows."""
    runs = index.numpy() >= 0  # (T, K)
    place = np.empty(runs.size, dtype=np.int64)  # a slot's row
    place[found.kept.numpy()] = np.arange(len(found.kept))
    ends = runs.sum(axis=1).cumsum()
    return F.embedding_bag(
        torch.from_numpy(place[runs.reshape(-1)]),
        out,
        torch.from_numpy(np.concatenate(([0], ends[:-1]))),
        mode="sum",
        per_sample_weights=torch.from_numpy(weight.numpy()[runs]),
    )


@dataclass(frozen=True)
class _PackedExpert:
    """One expert's weights. ``first`` are gate and up apart, or both in one."""

    first: tuple[Tensor, ...]
    first_bias: tuple[Tensor | None, ...]
    second: Tensor
    second_bias: Tensor | None

    def run(self, module: Any, rows: Tensor) -> Tensor:
        """(P, D) -> (P, D)."""
        product = torch.ops.mkldnn._linear_pointwise
        if len(self.first) == 2:
            (gate, up), (gate_bias, up_bias) = self.first, self.first_bias
            inner = product(rows, gate, gate_bias, "swish", [], "")
            inner = product.binary(rows, inner, up, up_bias, "mul")
        else:
            inner = product(rows, self.first[0], self.first_bias[0], "none", [], "")
            inner = activate(module, inner, in_place=True)
        out: Tensor = product(inner, self.second, self.second_bias, "none", [], "")
        return module.post_expert_norm(out) if module.has_post_expert_norm else out


def padded(rows: int) -> int:
    """The number of rows that are run for ``rows``: at most 3% more.

    oneDNN makes a kernel for every number of rows that it sees and keeps the last 1,024. Experts
    get other numbers of rows in every forward: without this, most would be made anew each time,
    which takes longer than the products.
    """
    return -(-rows // _step(rows)) * _step(rows)


def _step(rows: int) -> int:
    return int(1 << max(rows.bit_length() - 6, 0))


def can_pack(modules: list[Any]) -> bool:
    """Whether there are kernels for these experts here, and memory for their copies."""
    return worth_copying(modules, has_kernels)


@cache
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN's products are there for a dtype, and right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    rng = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 64, generator=rng).to(dtype) for n in (8, 32))
    try:
        if dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported():
            return False
        packed = ops._reorder_linear_weight(weight, _ROWS)
        gate = ops._linear_pointwise(rows, packed, None, "swish", [], "")
        got = ops._linear_pointwise.binary(rows, gate, packed, None, "mul")
    except (AttributeError, RuntimeError):  # another build or version of torch
        return False
    product = rows.double() @ weight.double().t()
    expected = F.silu(product) * product
    distance = (got.double() - expected).norm() / expected.norm()
    return bool(distance < (1e-5 if dtype == torch.float32 else 2e-2))


def _pack_all(module: Any) -> tuple[_PackedExpert, ...]:
    return tuple(_pack(module, number) for number in range(module.num_experts))


def _pack(module: Any, number: int) -> _PackedExpert:
    first, second = (weight[number].detach() for weight in weights_of(module))
    if module.is_transposed:
        first, second = first.t(), second.t()
    bias: list[Tensor | None] = [one[number].detach() for one in biases_of(module)] or [None, None]
    parts: tuple[Tensor, ...] = (first,)
    biases: tuple[Tensor | None, ...] = (bias[0],)
    if module.has_gate and is_plain_silu(module):
        parts = first.chunk(2, dim=0)
        biases = (None, None) if bias[0] is None else bias[0].chunk(2, dim=0)
    return _PackedExpert(
        first=tuple(_reordered(part) for part in parts),
        first_bias=tuple(None if one is None else one.contiguous() for one in biases),
        second=_reordered(second),
        second_bias=bias[1],
    )


def _reordered(weight: Tensor) -> Tensor:
    """(O, I) as oneDNN's kernels read it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return packed
