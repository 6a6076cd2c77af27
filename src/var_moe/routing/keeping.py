"""Ranking a token's experts, and from a choice of slots to a `Routing`.

Order among a token's experts is by weight descending, ties to the lower id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from var_moe.routing.arrays import TORCH, Array, Operations
from var_moe.routing.decision import Routing, Tier


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


def leading_slots(index: Tensor, weight: Tensor, count: int) -> Tensor:
    """Which slots hold the first ``count`` experts. (T, K) bool"""
    first = rank_slots(index, weight)[:, :count]
    return torch.zeros_like(index, dtype=torch.bool).scatter(1, first, True)


def routing_mass(leading_weight: Tensor, weight: Tensor) -> Tensor:
    """Routing mass of the leading experts: their share of the token's weights. (T,)"""
    if leading_weight.shape[1] == weight.shape[1]:
        return weight.new_ones(len(weight))
    return leading_weight.sum(dim=1) / weight.sum(dim=1)


def shares(weight: Array, ops: Operations = TORCH) -> Array:
    """Each weight's share of the token's sum; zeros where the sum is zero. (T, K)

    The sum is zero where the router of a family may skip all experts.
    """
    return weight / _not_zero(weight.sum(1), ops)[:, None]


def rescaled(weight: Array, kept: Array, total: Array, ops: Operations = TORCH) -> Array:
    """Weights (T, K) scaled so that a part that sums to ``kept`` (T,) sums to ``total`` (T,).

    Divided first, so that a lone expert gets exactly the sum, in any dtype.
    """
    return weight / _not_zero(kept, ops)[:, None] * total[:, None]


def _not_zero(divisor: Array, ops: Operations) -> Array:
    return ops.where(divisor == 0, 1.0, divisor)


def all_pairs(index: Tensor, weight: Tensor) -> Routing:
    """The router's own decision: (T, K) index and weight, unchanged."""
    return Routing(index=index, weight=weight, tier=learned_tier(index))


def kept_pairs(index: Tensor, weight: Tensor, keep: Tensor) -> Routing:
    """Execute the slots in ``keep`` (T, K) bool, rescaled to the full decision's sum.

    Slots stay where they are; a dropped one gets the index -1. A token that keeps all its pairs
    keeps its exact weights, and so does one whose kept weights are all zero.
    """
    kept_sum = weight.masked_fill(~keep, 0).sum(dim=1)
    scaled = rescaled(weight, kept_sum, weight.sum(dim=1))
    unchanged = (keep.all(dim=1) | (kept_sum == 0))[:, None]
    return Routing(
        index=index.masked_fill(~keep, -1),
        weight=torch.where(unchanged, weight, scaled),
        tier=learned_tier(index),
    )


def learned_tier(index: Tensor) -> Tensor:
    """`Tier.LEARNED` for each token of (T, K). (T,) uint8"""
    return torch.full_like(index[:, 0], Tier.LEARNED, dtype=torch.uint8)
