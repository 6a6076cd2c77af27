"""The model's own routing: every pair is executed. The control for all others."""

from __future__ import annotations

from torch import Tensor

from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs


class NativePolicy(RoutingPolicy):
    """Keep all: the router's decision, unchanged."""

    cuts_only = True

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        return all_pairs(index, weight)
