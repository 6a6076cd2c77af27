"""Our experts backend on CPU: a loop over experts on rows sorted by expert.

One sort serves as compaction too: dropped slots (-1) come first and are left out. Large
intermediate results go into scratch memory that lives as long as the backend: on CPU, fresh
allocations of megabytes cost more in page faults than what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from var_moe.execution.backends.base import ExpertsBackend, activate, weighted_sum
from var_moe.models.moe_layers import biases_of, weights_of

_SCRATCH_ELEMENTS = 2**25
"""Largest intermediate result; an expert with more rows is run in equal pieces."""


class SortedBackend(ExpertsBackend):
    """Runs experts one after another. Keeping all pairs is bit-identical to ``grouped_mm``."""

    name = "sorted"

    def __init__(self) -> None:
        self._scratch = Scratch()

    def run(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._differentiable(module, hidden, index, weight)
        scratch = self._scratch
        if len(index) == 1:
            return lone_token(
                lambda number, target: run_expert(module, hidden, number, scratch, target),
                *(hidden, index, weight),
            )
        found = sort_pairs(index, module.num_experts)
        rows = hidden.index_select(0, found.token)
        out = scratch.take("out", rows, *rows.shape)
        for number, a, b in pieces(module, found.counts):
            run_expert(module, rows[a:b], number, scratch, out[a:b])
        return sum_pairs(found, out, index, weight, scratch)

    def _differentiable(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The same where gradients are wanted, and nothing may be overwritten."""
        found = sort_pairs(index, module.num_experts)
        rows = hidden.index_select(0, found.token)
        outputs = [
            run_expert(module, rows[a:b], number) for number, a, b in pieces(module, found.counts)
        ]
        full = hidden.new_empty((index.numel(), hidden.shape[1]))
        full = found.put_back(torch.cat(outputs) if outputs else rows, full)
        return weighted_sum(full.view(*index.shape, hidden.shape[1]), weight, hidden.dtype)

    def close(self) -> None:
        self._scratch = Scratch()


@dataclass(frozen=True)
class SortedPairs:
    """The executed pairs of a layer, by expert."""

    kept: Tensor  # (P,) their slots of the flat (T * K) index
    dropped: Tensor  # (T * K - P,) the other slots
    token: Tensor  # (P,) their tokens
    counts: list[int]  # pairs of each expert

    def put_back(self, out: Tensor, full: Tensor) -> Tensor:
        """(P, D) outputs in their slots of ``full`` (T * K, D), zero in the others."""
        return full.index_copy_(0, self.kept, out).index_fill_(0, self.dropped, 0.0)


def sort_pairs(index: Tensor, experts: int) -> SortedPairs:
    """Sort the executed pairs of (T, K) by expert."""
    flat, top_k = index.reshape(-1), index.shape[1]
    if flat.device.type == "cpu":
        # numpy sorts small integers by their digits.
        small = flat.numpy().astype(np.int16)
        order = torch.from_numpy(small.argsort(kind="stable"))
        counts = np.bincount(small + 1, minlength=experts + 1).tolist()
    else:
        order = flat.argsort(stable=True)
        # The one wait for the device. Number 0 counts the dropped pairs.
        counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()
    kept = order[counts[0] :]
    return SortedPairs(kept, order[: counts[0]], kept // top_k, counts[1:])


def lone_token(
    run: Callable[[int, Tensor], Tensor], hidden: Tensor, index: Tensor, weight: Tensor
) -> Tensor:
    """A layer's output for T = 1, as in generation, where sorting would cost as much as an expert.

    Args:
        run: runs the expert of a number on the token, into a tensor (1, D).
        hidden, index, weight: see `ExpertsBackend.run`.
    """
    full = hidden.new_zeros((*index.shape, hidden.shape[1]))
    for slot, expert in enumerate(index[0].tolist()):
        if expert >= 0:
            run(expert, full[0, slot : slot + 1])
    return weighted_sum(full, weight, hidden.dtype)


def pieces(module: Any, counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row after the last) of what is run at once, for rows by expert."""
    width = weights_of(module)[0].shape[2 if module.is_transposed else 1]
    for number, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        parts = -(-count * width // _SCRATCH_ELEMENTS)
        start = end - count
        for part in range(parts):
            yield number, start + count * part // parts, start + count * (part + 1) // parts


def run_expert(
    module: Any,
    rows: Tensor,
    number: int,
    scratch: Scratch | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """One expert's output for (P, D) rows; into ``target``, by way of ``scratch``, or fresh."""
    first, second = (weight[number] for weight in weights_of(module))
    if not module.is_transposed:
        first, second = first.t(), second.t()
    first_bias, second_bias = [bias[number] for bias in biases_of(module)] or (None, None)
    wide = None if scratch is None else scratch.take("wide", rows, len(rows), first.shape[1])
    inner = _product(rows, first, first_bias, wide)
    inner = activate(module, inner, in_place=wide is not None)
    out = _product(inner, second, second_bias, target)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
        if target is not None:
            target.copy_(out)
    return out


def _product(rows: Tensor, right: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """(P, I) @ (I, O) + (O,)."""
    product = F.linear(rows, right.t()) if out is None else torch.mm(rows, right, out=out)
    if bias is None:
        return product
    # Added after rounding, as `grouped_mm` does: `addmm` rounds once, which is not the same.
    return product.add_(bias)


def sum_pairs(
    found: SortedPairs, out: Tensor, index: Tensor, weight: Tensor, scratch: Scratch
) -> Tensor:
    """The weighted sum of (P, D) outputs that are sorted by expert. (T, D)"""
    full = found.put_back(out, scratch.take("full", out, index.numel(), out.shape[1]))
    full = full.view(*index.shape, out.shape[1])
    if weight.dtype == full.dtype:
        return full.mul_(weight.unsqueeze(-1)).sum(dim=1)
    return weighted_sum(full, weight, out.dtype)


class Scratch:
    """Memory for intermediate results that is used again in every layer."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, like: Tensor, rows: int, width: int) -> Tensor:
        """(rows, width) of the dtype and device of ``like``; grown when needed."""
        key, size = (name, like.dtype, like.device), rows * width
        held = self._held.get(key)
        if held is None or held.numel() < size:
            # An ordinary tensor, so that it can be used inside and outside inference mode.
            with torch.inference_mode(False):
                held = torch.empty(size, dtype=like.dtype, device=like.device)
            self._held[key] = held
        return held[:size].view(rows, width)
