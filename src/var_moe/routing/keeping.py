"""From a choice of slots to a `Routing`: what every policy that only drops pairs has in common."""

from __future__ import annotations

import torch
from torch import Tensor

from var_moe.routing.decision import Routing, Tier
from var_moe.routing.ranking import rank_slots, rescaled


def all_pairs(index: Tensor, weight: Tensor) -> Routing:
    """The router's own decision: (T, K) index and weight, unchanged."""
    tier = torch.full_like(index[:, 0], Tier.LEARNED, dtype=torch.uint8)
    return Routing(index=index, weight=weight, tier=tier)


def leading_slots(index: Tensor, weight: Tensor, count: int) -> Tensor:
    """Which slots hold the first ``count`` experts. (T, K) bool"""
    first = rank_slots(index, weight)[:, :count]
    return torch.zeros_like(index, dtype=torch.bool).scatter(1, first, True)


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
        tier=torch.full_like(index[:, 0], Tier.LEARNED, dtype=torch.uint8),
    )
