"""Control: cut a random share of decisions, blind to everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_moe.config import check_number
from var_moe.routing.base import Dial, RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import kept_pairs, leading_slots
from var_moe.routing.ranking import leading_count


class RandomSkipPolicy(RoutingPolicy):
    """Each (layer, token) runs only its leading experts with probability ``share``.

    Whatever a real policy gains must be more than this control at the same experts per token.

    Args:
        share: probability of a cut, in [0, 1].
        seed: of the dice; the same after each `reset`.

    Raises:
        UsageError: share is no probability.
    """

    cuts_only = True

    def __init__(self, share: float, *, seed: int = 0) -> None:
        check_number("RandomSkipPolicy.share", share, low=0, high=1)
        check_number("RandomSkipPolicy.seed", seed, integer=True, low=0)
        self.share = share
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        return {"share": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.5}}

    @classmethod
    def dials(cls, top_k: int) -> dict[str, Dial]:
        return {"": lambda strength: {"share": strength}}

    def reset(self) -> None:
        self._generators.clear()

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        device = index.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        dice = torch.rand(index.shape[0], generator=self._generators[device], device=device)
        spared = (dice >= self.share)[:, None]
        leading = leading_slots(index, weight, leading_count(index.shape[1]))
        return kept_pairs(index, weight, spared | leading)
