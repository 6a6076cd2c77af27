"""Timing what a policy's decisions cost, apart from what they save."""

from __future__ import annotations

from torch import Tensor

from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots


class Overhead(RoutingPolicy):
    """Decides as another policy does, and then runs the first ``count`` experts of every token.

    Args:
        policy: whose work is done, compensation included.
        count: experts per token that run.
    """

    def __init__(self, policy: RoutingPolicy, count: int) -> None:
        self._policy, self._count = policy, count
        self.context_window, self.compensation = policy.context_window, policy.compensation

    def begin(self, context: ForwardContext) -> None:
        self._policy.begin(context)

    def see(self, layer: int, hidden: Tensor) -> None:
        self._policy.see(layer, hidden)

    def reset(self) -> None:
        self._policy.reset()

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        self._policy.route(context, layer, index, weight)
        if self._count >= index.shape[1]:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, self._count))
