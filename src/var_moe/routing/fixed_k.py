"""Run the first k experts of every token: the plainest way to execute fewer."""

from __future__ import annotations

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import Routing, Tier
from var_moe.routing.ranking import rank_slots


class FixedKPolicy(RoutingPolicy):
    """The k experts of largest weight, rescaled to the full decision's sum.

    Args:
        k: experts per token, at least 1; from the model's own K on, nothing changes.

    Raises:
        UsageError: k is below 1.
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise UsageError(f"FixedKPolicy.k = {k!r}: expected an integer in [1, ∞)")
        self.k = k

    def route(self, layer: int, index: Tensor, weight: Tensor) -> Routing:
        tier = torch.full_like(index[:, 0], Tier.LEARNED, dtype=torch.uint8)
        if self.k >= index.shape[1]:
            return Routing(index=index, weight=weight, tier=tier)
        kept = rank_slots(index, weight)[:, : self.k]
        kept_sum = weight.gather(1, kept).sum(dim=1, keepdim=True)
        scaled = weight / kept_sum * weight.sum(dim=1, keepdim=True)
        out = torch.full_like(index, -1).scatter(1, kept, index.gather(1, kept))
        return Routing(index=out, weight=scaled, tier=tier)
