"""Damage models with made-up numbers."""

from __future__ import annotations

import torch

from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel


def damage_model(
    *,
    layers: int,
    experts: int,
    top_k: int,
    vocabulary: int,
    hidden: int = 0,
    seed: int = 0,
    compensation: Compensation | None = None,
) -> DamageModel:
    """Random tables; it looks at the layers' inputs where ``hidden`` is not zero."""
    dice = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice)

    width = 3 if hidden else 0
    pairs, singles = (experts**2, 0) if top_k == 2 else (0, experts)
    return DamageModel(
        base=some(layers, top_k - 1) - 6,
        slope=2 + 0.1 * some(layers, top_k - 1),
        curve=0.01 * some(layers, top_k - 1),
        pair=some(layers, pairs),
        first=some(layers, singles),
        dropped=some(layers, singles),
        token=some(layers, vocabulary),
        inner=some(layers, width, hidden),
        bias=some(layers, width),
        out=some(layers, width),
        compensation=compensation,
    )
