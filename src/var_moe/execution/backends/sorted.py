"""Our experts backend: a loop over experts on rows sorted by expert.

One sort serves as compaction too: dropped slots (-1) come first and are left out. Large
intermediate results go into buffers that live as long as the session: on CPU, fresh
allocations of megabytes cost more in page faults than what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BUFFER_ELEMENTS = 2**25
"""Largest intermediate result; an expert with more rows is run in equal pieces."""


@dataclass(frozen=True)
class Gathered:
    """The executed pairs of a layer, by expert.

    Args:
        rows: (P, D) inputs, sorted by expert.
        counts: rows of each expert.
        kept: (P,) which slots of the flat (T * K) index they are.
        dropped: (T * K - P,) the other slots.
    """

    rows: Tensor
    counts: list[int]
    kept: Tensor
    dropped: Tensor


class SortedExperts:
    """Runs the pairs of experts modules, expert by expert. One instance per session."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def weighted(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The layer's output: executed pairs, summed by (T, K) weights. (T, D)

        Where all pairs are kept, bit-identical to transformers' ``grouped_mm``.
        """
        if torch.is_grad_enabled() or len(index) == 1:
            return weighted_sum(self(module, hidden, index), weight, hidden.dtype)
        found = self.gathered(module, hidden, index)
        out = self.products(module, found.rows, found.counts)
        full = self._scattered(
            found, out, self._buffer("full", hidden, index.numel(), out.shape[1])
        )
        full = full.view(*index.shape, -1)
        if weight.dtype == full.dtype:
            return full.mul_(weight.unsqueeze(-1)).sum(dim=1)
        return weighted_sum(full, weight, hidden.dtype)

    def __call__(self, module: Any, hidden: Tensor, index: Tensor) -> Tensor:
        """Unweighted output of every pair, zero where it was dropped.

        Args:
            module: an experts module as `use_experts_implementation` makes it.
            hidden: (T, D) inputs.
            index: (T, K) expert ids, -1 where the pair is dropped.

        Returns:
            (T, K, D) outputs.
        """
        if len(index) == 1 and not torch.is_grad_enabled():
            return self._one_token(module, hidden, index)
        found = self.gathered(module, hidden, index)
        out = self.products(module, found.rows, found.counts)
        full = self._scattered(found, out, hidden.new_empty((index.numel(), hidden.shape[1])))
        return full.view(*index.shape, -1)

    def gathered(self, module: Any, hidden: Tensor, index: Tensor) -> Gathered:
        """Sort the executed pairs by expert, and gather their inputs."""
        flat, top_k = index.reshape(-1), index.shape[1]
        if flat.device.type == "cpu":
            # numpy sorts small integers by their digits.
            small = flat.numpy().astype(np.int16)
            order = torch.from_numpy(small.argsort(kind="stable"))
            counts = np.bincount(small + 1, minlength=module.num_experts + 1).tolist()
        else:
            order = flat.argsort(stable=True)
            # The one wait for the device. Number 0 counts the dropped pairs.
            counts = torch.bincount(flat + 1, minlength=module.num_experts + 1).tolist()
        dropped, kept = order[: counts[0]], order[counts[0] :]
        return Gathered(self._gather(hidden, kept // top_k), counts[1:], kept, dropped)

    def _gather(self, hidden: Tensor, token: Tensor) -> Tensor:
        return hidden.index_select(0, token)

    @staticmethod
    def _scattered(found: Gathered, out: Tensor, full: Tensor) -> Tensor:
        """Outputs back in their slots of (T * K, D), zero where a pair was dropped."""
        return full.index_copy_(0, found.kept, out).index_fill_(0, found.dropped, 0.0)

    def _one_token(self, module: Any, hidden: Tensor, index: Tensor) -> Tensor:
        """The same for T = 1, as in generation, where sorting would cost as much as an expert."""
        full = hidden.new_zeros((*index.shape, hidden.shape[1]))
        for slot, expert in enumerate(index[0].tolist()):
            if expert >= 0:
                self._one_expert(module, hidden, expert, full[0, slot : slot + 1])
        return full

    def products(self, module: Any, rows: Tensor, counts: list[int]) -> Tensor:
        """The experts' own work: (P, D) rows sorted by expert, so many for each -> (P, D)."""
        # Where gradients are wanted, nothing may be overwritten.
        buffered = not torch.is_grad_enabled()
        whole = self._buffer("out", rows, *rows.shape) if buffered else None
        outputs = [
            self._one_expert(module, rows[a:b], number, None if whole is None else whole[a:b])
            for number, a, b in pieces(module, counts)
        ]
        if whole is not None:
            return whole
        return torch.cat(outputs) if outputs else rows

    def _one_expert(self, module: Any, rows: Tensor, number: int, target: Tensor | None) -> Tensor:
        """One expert's rows; into ``target`` where there is one."""
        first, second = (weight[number] for weight in weights_of(module))
        if not module.is_transposed:
            first, second = first.t(), second.t()
        first_bias, second_bias = [bias[number] for bias in biases_of(module)] or (None, None)
        wide = None if target is None else self._buffer("wide", rows, len(rows), first.shape[1])
        inner = _product(rows, first, first_bias, wide)
        inner = activate(module, inner, in_place=wide is not None)
        out = _product(inner, second, second_bias, target)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
            if target is not None:
                target.copy_(out)
        return out

    def _buffer(self, name: str, like: Tensor, rows: int, width: int) -> Tensor:
        """(rows, width) of scratch memory, grown when needed."""
        key, size = (name, like.dtype, like.device), rows * width
        found = self._buffers.get(key)
        if found is None or found.numel() < size:
            # An ordinary tensor, so that it can be used inside and outside inference mode.
            with torch.inference_mode(False):
                found = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[key] = found
        return found[:size].view(rows, width)


def weights_of(module: Any) -> tuple[Tensor, Tensor]:
    """All experts' first (gate and up in one, where there is a gate) and second weights."""
    return (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj


def biases_of(module: Any) -> tuple[Tensor, ...]:
    """The biases of `weights_of`, or none."""
    if not module.has_bias:
        return ()
    first = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
    return first, module.down_proj_bias


def pieces(module: Any, counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row after the last) of what is run at once, for rows by expert."""
    for number, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        parts = -(-count * _width(module) // _BUFFER_ELEMENTS)
        start = end - count
        for part in range(parts):
            yield number, start + count * part // parts, start + count * (part + 1) // parts


def weighted_sum(outputs: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (T, K, D) by (T, K) weights as transformers' ``grouped_mm`` does. (T, D)"""
    return (outputs * weight.unsqueeze(-1)).sum(dim=1).to(dtype)


def _product(rows: Tensor, right: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """(P, I) @ (I, O) + (O,)."""
    product = F.linear(rows, right.t()) if out is None else torch.mm(rows, right, out=out)
    if bias is None:
        return product
    # Added after rounding, as `grouped_mm` does: `addmm` rounds once, which is not the same.
    return product.add_(bias)


def activate(module: Any, inner: Tensor, *, in_place: bool) -> Tensor:
    """What an expert makes of its first product, (P, I) or with a gate (P, 2 I) -> (P, I)."""
    if not module.has_gate:
        activated: Tensor = module.act_fn(inner)
    elif in_place and is_plain_silu(module):
        gate, up = inner.chunk(2, dim=-1)
        activated = F.silu(gate, inplace=True).mul_(up)
    else:
        activated = module._apply_gate(inner)
    return activated


def is_plain_silu(module: Any) -> bool:
    """silu(gate) * up, and nothing else."""
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    if type(module)._apply_gate is not _default_apply_gate:
        return False  # such a class need not have an act_fn
    return isinstance(module.act_fn, (SiLUActivation, nn.SiLU))


def _width(module: Any) -> int:
    first, _ = weights_of(module)
    width: int = first.shape[1 if not module.is_transposed else 2]
    return width
