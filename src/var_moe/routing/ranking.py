"""Order among a token's experts: by weight descending, ties to the lower id."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_count(top_k: int) -> int:
    """How many of K experts lead: ``ceil(K / 2)``."""
    return (top_k + 1) // 2


def rank_slots(index: Tensor, weight: Tensor) -> Tensor:
    """Slots by rank: ``out[t, 0]`` is the slot of token t's first expert. (T, K) int64."""
    if index.shape[1] == 2:
        second = (weight[:, 1] > weight[:, 0]) | (
            (weight[:, 1] == weight[:, 0]) & (index[:, 1] < index[:, 0])
        )
        first = second.long()
        return torch.stack((first, 1 - first), dim=1)
    by_id = index.argsort(dim=1, stable=True)
    by_weight = weight.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    return by_id.gather(1, by_weight)


def routing_mass(leading_weight: Tensor, weight: Tensor) -> Tensor:
    """Routing mass of the leading experts: their share of the token's weights. (T,)"""
    if leading_weight.shape[1] == weight.shape[1]:
        return torch.ones_like(weight[:, 0])
    return leading_weight.sum(dim=1) / weight.sum(dim=1)


def shares(weight: Tensor) -> Tensor:
    """Each weight's share of the token's sum; zeros where the sum is zero. (T, K)

    A router may give a token no weight at all, as one does that can skip the experts.
    """
    return weight / _not_zero(weight.sum(dim=1, keepdim=True))


def rescaled(weight: Tensor, kept: Tensor, total: Tensor) -> Tensor:
    """Weights (T, K) whose kept part, now summing to ``kept`` (T,), sums to ``total`` (T,).

    Divided first, so that a lone expert gets exactly the sum, in any dtype.
    """
    return weight / _not_zero(kept)[:, None] * total[:, None]


def _not_zero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)
