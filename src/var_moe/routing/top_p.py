"""Top-p: as many experts as the router needs to be sure.

Source: Huang et al., "Harder Tasks Need More Experts: Dynamic Routing in MoE Models", 2024,
arXiv:2403.07652. There the model is trained with this routing; here it is applied to a model
trained with top-k, inside the K experts that its router chose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_moe.config import check_number
from var_moe.routing.base import Dial, RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs
from var_moe.routing.ranking import rank_slots


class TopPPolicy(RoutingPolicy):
    """The smallest set of first experts whose routing mass is at least p.

    The paper sums probabilities over all E experts and adds the chosen outputs unscaled. Routing
    mass is relative to the token's K weights, and the kept ones are rescaled to their sum.

    Args:
        p: routing mass to reach, in (0, 1]; 1 is the unmodified model.

    Raises:
        UsageError: p is out of its range.
    """

    cuts_only = True

    def __init__(self, p: float) -> None:
        check_number("TopPPolicy.p", p, low=0, high=1, open_low=True)
        self.p = p

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        # The first expert alone has at least 1/K: below that, nothing changes any more.
        low = 1 / top_k
        return {"p": {"type": "float", "low": low, "high": 1.0, "default": max(low, 0.8)}}

    @classmethod
    def dials(cls, top_k: int) -> dict[str, Dial]:
        return {"": lambda strength: {"p": 1 - strength * (1 - 1 / top_k)}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if self.p == 1:
            # Not left to the sums: a last weight may vanish in them.
            return all_pairs(index, weight)
        rank = rank_slots(index, weight)  # (T, K)
        reached = weight.gather(1, rank).float().cumsum(dim=1)
        # An expert is needed if those before it fall short of p; the first always is.
        needed = torch.ones_like(rank, dtype=torch.bool)
        needed[:, 1:] = reached[:, :-1] < self.p * reached[:, -1:]
        return kept_pairs(index, weight, torch.empty_like(needed).scatter_(1, rank, needed))
