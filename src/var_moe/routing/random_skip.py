"""Control: cut a random share of decisions, blind to everything."""

from __future__ import annotations

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import Routing, Tier
from var_moe.routing.ranking import leading_count, rank_slots


class RandomSkipPolicy(RoutingPolicy):
    """Each (layer, token) runs only its leading experts with probability ``share``.

    Whatever a real policy gains must be more than this control at the same experts per token.

    Args:
        share: probability of a cut, in [0, 1].
        seed: of the dice; the same after each `reset`.

    Raises:
        UsageError: share is no probability.
    """

    def __init__(self, share: float, *, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise UsageError(f"RandomSkipPolicy.share = {share!r}: expected a number in [0, 1]")
        self.share = share
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def reset(self) -> None:
        self._generators.clear()

    def route(self, layer: int, index: Tensor, weight: Tensor) -> Routing:
        device = index.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        dice = torch.rand(index.shape[0], generator=self._generators[device], device=device)
        cut = dice < self.share
        rank = rank_slots(index, weight)
        lead = leading_count(index.shape[1])
        kept = rank[:, :lead]
        kept_sum = weight.gather(1, kept).sum(dim=1, keepdim=True)
        scaled = weight / kept_sum * weight.sum(dim=1, keepdim=True)
        dropped = torch.zeros_like(index, dtype=torch.bool).scatter(1, rank[:, lead:], True)
        out = torch.where(cut[:, None] & dropped, -1, index)
        return Routing(
            index=out,
            weight=torch.where(cut[:, None], scaled, weight),
            tier=torch.full_like(index[:, 0], Tier.LEARNED, dtype=torch.uint8),
        )
