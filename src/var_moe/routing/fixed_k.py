"""Run the first k experts of every token: the plainest way to execute fewer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from var_moe.config import check_number
from var_moe.routing.base import Dial, RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots
from var_moe.routing.ranking import leading_count


class FixedKPolicy(RoutingPolicy):
    """The k experts of largest weight, rescaled to the full decision's sum.

    Args:
        k: experts per token, at least 1; from the model's own K on, nothing changes.

    Raises:
        UsageError: k is below 1.
    """

    cuts_only = True

    def __init__(self, k: int) -> None:
        check_number("FixedKPolicy.k", k, integer=True, low=1)
        self.k = k

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        return {"k": {"type": "int", "low": 1, "high": top_k, "default": leading_count(top_k)}}

    @classmethod
    def dials(cls, top_k: int) -> dict[str, Dial]:
        return {"": lambda strength: {"k": top_k - round(strength * (top_k - 1))}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if self.k >= index.shape[1]:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, self.k))
