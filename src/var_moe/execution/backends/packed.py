"""Our experts backend on CPU: the loop over experts, on weights laid out for oneDNN.

A matrix product by a weight that oneDNN has reordered once, for its own kernels, is faster than
one by the plain weight, most of all for the few rows that an expert gets; and the activation, and
the gate's product, are done where the product is written. PyTorch's Inductor serves frozen models
so (``torch/_inductor/mkldnn_lowerings.py``); these are the same operators.

The reordered weights are a second copy, kept as long as the model's own. So this is the choice of
``"auto"`` only where the experts take little of the machine's memory; and rounding differs from
``grouped_mm``'s, as between any two kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

from var_moe.execution.backends.sorted import (
    SortedExperts,
    activate,
    biases_of,
    is_plain_silu,
    pieces,
    weights_of,
)

MEMORY_SHARE = 0.25
"""Of the machine's memory, at most so much is taken for copies."""
_ROWS = 256  # that oneDNN lays weights out for; other numbers of rows run on the same layout
_SAMPLE = 1024

# Experts module -> its copies. A copy belongs to the values that it was made of.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


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


@dataclass(frozen=True)
class _Copy:
    """All experts of a module, and what tells that its own weights are still the same."""

    experts: tuple[_PackedExpert, ...]
    state: tuple[tuple[int, int], ...]
    sample: Tensor


class PackedExperts(SortedExperts):
    """Runs the pairs of experts modules on weights laid out for oneDNN. One per session."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, _Copy] = {}

    def weighted(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The layer's output: executed pairs, summed by (T, K) weights. (T, D)"""
        plain = torch.is_grad_enabled() or len(index) == 1 or hidden.device.type != "cpu"
        if plain or {hidden.dtype, weight.dtype} != {torch.float32}:
            return super().weighted(module, hidden, index, weight)
        found = self.gathered(module, hidden, index)
        if not len(found.kept):
            return torch.zeros_like(hidden)
        out = self.products(module, found.rows, found.counts)
        # One kernel gathers, weighs and sums: a token is a bag of its executed pairs' rows.
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

    def _gather(self, hidden: Tensor, token: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super()._gather(hidden, token)
        # With room for the padding of the last expert's rows.
        rows = self._buffer("rows", hidden, len(token) + _step(len(token)), hidden.shape[1])
        return torch.index_select(hidden, 0, token, out=rows[: len(token)])

    def products(self, module: Any, rows: Tensor, counts: list[int]) -> Tensor:
        """The experts' own work: (P, D) rows sorted by expert, so many for each -> (P, D)."""
        if not self._serves(module, rows):
            return super().products(module, rows, counts)
        experts = self._copy(module).experts
        whole = self._buffer("out", rows, *rows.shape)
        width, start = rows.shape[1], rows.storage_offset()
        there = rows.untyped_storage().nbytes() // rows.element_size() - start
        for number, a, b in pieces(module, counts):
            # Rows of the next expert, or what was there before: theirs is not copied.
            more = min(padded(b - a), there // width - a)
            padding = rows.as_strided((more, width), (width, 1), start + a * width)
            whole[a:b] = experts[number].run(module, padding)[: b - a]
        return whole

    def _one_expert(self, module: Any, rows: Tensor, number: int, target: Tensor | None) -> Tensor:
        """A lone token's; `products` serves all others."""
        if target is None or not self._serves(module, rows):
            return super()._one_expert(module, rows, number, target)
        return target.copy_(self._copy(module).experts[number].run(module, rows))

    @staticmethod
    def _serves(module: Any, rows: Tensor) -> bool:
        right = rows.device.type == "cpu" and rows.dtype == module.down_proj.dtype
        # An adapter on experts makes their weights anew for each forward.
        own = right and not parametrize.is_parametrized(module)
        return own and not torch.is_grad_enabled() and has_kernels(rows.dtype)

    def _copy(self, module: Any) -> _Copy:
        """The module's copies, made anew where its weights have changed."""
        state = _state(module)
        found = self._seen.get(id(module))
        if found is not None and found.state == state:
            return found
        found = _copies.get(module)
        if found is None or found.state != state or not torch.equal(found.sample, _sample(module)):
            # Ordinary tensors, so that they serve inside and outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                experts = tuple(_pack(module, number) for number in range(module.num_experts))
            found = _Copy(experts, state, _sample(module))
            _copies[module] = found
        self._seen[id(module)] = found
        return found


def padded(rows: int) -> int:
    """So many rows are run for so many: at most 3% more.

    oneDNN makes a kernel for every number of rows that it sees and keeps the last 1,024. Experts
    get other numbers of rows in every forward: without this, most would be made anew each time,
    which takes longer than the products.
    """
    return -(-rows // _step(rows)) * _step(rows)


def _step(rows: int) -> int:
    step: int = 1 << max(rows.bit_length() - 6, 0)
    return step


def can_pack(modules: list[Any]) -> bool:
    """Whether this machine has the kernels for these experts, and the memory for their copies."""
    weights = [weight for module in modules for weight in weights_of(module)]
    if not weights or any(weight.device.type != "cpu" for weight in weights):
        return False
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    fits = size <= MEMORY_SHARE * _machine_memory()
    return fits and all(has_kernels(dtype) for dtype in {weight.dtype for weight in weights})


@cache
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN's products are there for a dtype, and right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    dice = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 64, generator=dice).to(dtype) for n in (8, 32))
    try:
        if dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported():
            return False
        packed = ops._reorder_linear_weight(weight, _ROWS)
        plain = ops._linear_pointwise(rows, packed, None, "swish", [], "")
        got = ops._linear_pointwise.binary(rows, plain, packed, None, "mul")
    except (AttributeError, RuntimeError):  # another build or version of torch
        return False
    product = rows.double() @ weight.double().t()
    expected = F.silu(product) * product
    distance = (got.double() - expected).norm() / expected.norm()
    return bool(distance < (1e-5 if dtype == torch.float32 else 2e-2))


@cache
def _machine_memory() -> int:
    """Bytes; of the machine, not of what is free now, so that the same choice is made each time."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a Unix
        return 0


def _state(module: Any) -> tuple[tuple[int, int], ...]:
    """Changes with every change of the weights that PyTorch knows of."""
    tensors = (*weights_of(module), *biases_of(module))
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)


def _sample(module: Any) -> Tensor:
    """Some of the values: those changed through ``.data`` are not known to PyTorch."""
    parts = [tensor.detach().reshape(-1) for tensor in (*weights_of(module), *biases_of(module))]
    return torch.cat([part[:: max(len(part) // _SAMPLE, 1)] for part in parts])


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
