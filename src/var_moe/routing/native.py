"""The model's own routing: every pair is executed. The control for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import Routing, Tier


class NativePolicy(RoutingPolicy):
    """Keep all: the router's decision, unchanged."""

    def route(self, layer: int, index: Tensor, weight: Tensor) -> Routing:
        tier = torch.full_like(index[:, 0], Tier.LEARNED, dtype=torch.uint8)
        return Routing(index=index, weight=weight, tier=tier)
