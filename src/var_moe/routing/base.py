"""The one extension point for routing: a policy turns the router's decision into a Routing."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from var_moe.routing.decision import Routing, TokenBatch


class RoutingPolicy(ABC):
    """Decides, per layer and token, which of the router's pairs are executed.

    A policy sees a forward as ``begin(batch)`` once, then ``route(layer, ...)`` for each MoE
    layer in order. It looks at no future token and changes neither the model nor its inputs.
    """

    context_window: int = 1
    """Token ids that a decision depends on, the token's own included."""

    @abstractmethod
    def route(self, layer: int, index: Tensor, weight: Tensor) -> Routing:
        """Decide one layer.

        Args:
            layer: number of the MoE layer, 0..L-1 (dense layers are not counted).
            index: (T, K) expert ids from the router, in any slot order.
            weight: (T, K) the router's weights for them.
        """

    def begin(self, batch: TokenBatch) -> None:  # noqa: B027 - optional by design
        """See the tokens of the forward that starts, once for all layers."""

    def reset(self) -> None:  # noqa: B027 - optional by design
        """Forget everything that earlier forwards left (caches, clocks)."""
