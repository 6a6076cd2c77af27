"""A budget of experts per token, shared out over the layers by what each of them loses.

After LExI (Chitty-Venkata et al., "LExI: Layer-Adaptive Active Experts for Efficient MoE Model
Inference", 2025, arXiv:2509.02753), which measures how much a layer's output changes for every
k and searches the allocation, and the layer level of Alloc-MoE (Liu et al., "Alloc-MoE:
Budget-Aware Expert Activation Allocation for Efficient Mixture-of-Experts Inference", 2026,
arXiv:2604.08133), which finds it by dynamic programming over sensitivities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from var_moe.config import check_number
from var_moe.routing.base import Dial, RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots
from var_moe.routing.layer_sensitivity import LayerSensitivity, allocate_experts
from var_moe.routing.shapes import check_calibrated


class PerLayerKPolicy(RoutingPolicy):
    """The first k_l experts in layer l, all tokens alike, rescaled to the full decision's sum.

    Args:
        experts_per_token: the budget, a mean over layers, in [1, K]. A fraction gives some
            layers one expert more; what is not a whole number over all layers is left unspent.
        sensitivity: of the same model.

    Raises:
        UsageError: the budget is out of its range.
    """

    cuts_only = True

    def __init__(self, experts_per_token: float, *, sensitivity: LayerSensitivity) -> None:
        name = "PerLayerKPolicy.experts_per_token"
        check_number(name, experts_per_token, low=1, high=sensitivity.top_k)
        self.experts_per_token = experts_per_token
        self.sensitivity = sensitivity
        # A budget such as 5/3 over three layers must not lose an expert to rounding.
        total = math.floor(experts_per_token * sensitivity.layers + 1e-9)
        self.k = allocate_experts(sensitivity.loss, total)  # (L,)

    @property
    def made_for(self) -> Mapping[str, int]:
        return {"layers": self.sensitivity.layers}

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        high = float(top_k)
        entry = {"type": "float", "low": 1.0, "high": high, "default": (1 + high) / 2}
        return {"experts_per_token": entry}

    @classmethod
    def dials(cls, top_k: int) -> dict[str, Dial]:
        return {"": lambda strength: {"experts_per_token": top_k - strength * (top_k - 1)}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        own = self.sensitivity
        check_calibrated(self, layer, index, layers=own.layers, top_k=own.top_k)
        k = self.k[layer]
        if k == own.top_k:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, k))
