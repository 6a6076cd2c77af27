"""Damage models and compensations with made-up numbers."""

from __future__ import annotations

import torch

from var_moe.routing.compensation import Compensation, LayerCompensation
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


def compensation_of(
    *, layers: int, experts: int, hidden: int, top_k: int, rank: int = 0, seed: int = 0
) -> Compensation:
    """Random vectors, by pair where K = 2, and a random map where there is a rank."""
    dice = torch.Generator().manual_seed(seed)
    rows = experts**2 if top_k == 2 else experts

    def part() -> LayerCompensation:
        vectors = torch.randn((rows + 1, hidden), generator=dice)
        vectors[-1] = 0
        if not rank:
            return LayerCompensation(vectors)
        shapes = ((rank, hidden), (rank,), (hidden, rank))
        return LayerCompensation(vectors, *(torch.randn(s, generator=dice) / 4 for s in shapes))

    parts = tuple(part() for _ in range(layers))
    return Compensation(layers=parts, by_pair=top_k == 2, experts=experts)
