"""Order among a token's experts: by weight descending, ties to the lower id."""

from __future__ import annotations

from torch import Tensor

from var_moe.routing.arrays import TORCH, Array, Operations


def leading_count(top_k: int) -> int:
    """How many of K experts lead: ``ceil(K / 2)``."""
    return (top_k + 1) // 2


def rank_slots(index: Array, weight: Array, ops: Operations = TORCH) -> Array:
    """Slots by rank: ``out[t, 0]`` is the slot of token t's first expert. (T, K) int64."""
    if index.shape[1] == 2:
        heavier, equal = weight[:, 1] > weight[:, 0], weight[:, 1] == weight[:, 0]
        first = ops.where(heavier | (equal & (index[:, 1] < index[:, 0])), 1, 0)
        return ops.stack(first, 1 - first)
    by_id = ops.order(index)
    by_weight = ops.order(ops.take(weight, by_id), descending=True)
    return ops.take(by_id, by_weight)


def routing_mass(leading_weight: Tensor, weight: Tensor) -> Tensor:
    """Routing mass of the leading experts: their share of the token's weights. (T,)"""
    if leading_weight.shape[1] == weight.shape[1]:
        return weight.new_ones(len(weight))
    return leading_weight.sum(dim=1) / weight.sum(dim=1)


def shares(weight: Array, ops: Operations = TORCH) -> Array:
    """Each weight's share of the token's sum; zeros where the sum is zero. (T, K)

    A router may give a token no weight at all, as one does that can skip the experts.
    """
    return weight / _not_zero(weight.sum(1), ops)[:, None]


def rescaled(weight: Array, kept: Array, total: Array, ops: Operations = TORCH) -> Array:
    """Weights (T, K) whose kept part, now summing to ``kept`` (T,), sums to ``total`` (T,).

    Divided first, so that a lone expert gets exactly the sum, in any dtype.
    """
    return weight / _not_zero(kept, ops)[:, None] * total[:, None]


def _not_zero(divisor: Array, ops: Operations) -> Array:
    return ops.where(divisor == 0, 1.0, divisor)
