"""SER, Smart Expert Reduction: later experts run only if they come close to the first.

Source: I. Kawrakow, ik_llama.cpp, pull request #239 (2025), option ``-ser Kmin,t``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from var_moe.config import check_number
from var_moe.routing.base import Dial, RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots
from var_moe.routing.ranking import leading_count


class SERPolicy(RoutingPolicy):
    """Keep the first Kmin experts, of the others those with ``w_j > t * w_1``.

    As its source says, t = 0 is the unmodified model and t = 1 runs exactly Kmin experts. Here
    the weights that the router hands to the experts stand for the probabilities; the kept ones
    are rescaled to the full decision's sum.

    Args:
        min_experts: Kmin, at least 1; from the model's own K on, nothing changes.
        threshold: t, relative to the first expert's weight, in [0, 1].

    Raises:
        UsageError: a value is out of its range.
    """

    cuts_only = True

    def __init__(self, min_experts: int, threshold: float) -> None:
        check_number("SERPolicy.min_experts", min_experts, integer=True, low=1)
        check_number("SERPolicy.threshold", threshold, low=0, high=1)
        self.min_experts = min_experts
        self.threshold = threshold

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        # Kmin = K would leave nothing for the threshold to decide.
        high, default = max(1, top_k - 1), leading_count(top_k)
        return {
            "min_experts": {"type": "int", "low": 1, "high": high, "default": default},
            "threshold": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.4},
        }

    @classmethod
    def dials(cls, top_k: int) -> dict[str, Dial]:
        return {"": lambda strength: {"min_experts": 1, "threshold": strength}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if self.threshold == 0 or self.min_experts >= index.shape[1]:
            return all_pairs(index, weight)
        full = weight.float()
        close = full > self.threshold * full.amax(dim=1, keepdim=True)
        return kept_pairs(index, weight, close | leading_slots(index, weight, self.min_experts))
