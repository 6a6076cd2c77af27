"""Counting tiers and executed pairs, on the device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from var_moe.routing.decision import Routing, Tier


@dataclass(frozen=True)
class RoutingReport:
    """What was executed, per layer and over all: padding and overlaps left out."""

    tokens: int  # counted tokens, per layer
    top_k: int
    tier_counts: tuple[tuple[int, int, int], ...]  # per layer: fast, cached, learned
    executed_pairs: tuple[int, ...]  # per layer

    def _share(self, tier: Tier) -> float:
        total = self.tokens * len(self.tier_counts)
        return 100.0 * sum(row[tier] for row in self.tier_counts) / total if total else 0.0

    @property
    def fast_pct(self) -> float:
        """Share of (layer, token) decided by the static table, in percent."""
        return self._share(Tier.FAST)

    @property
    def cached_pct(self) -> float:
        """Share decided by the context cache, in percent."""
        return self._share(Tier.CACHED)

    @property
    def learned_pct(self) -> float:
        """Share decided by the model's own router, in percent."""
        return self._share(Tier.LEARNED)

    @property
    def cache_hit_rate(self) -> float:
        """Of the (layer, token) not on the fast path, the share served by the cache."""
        cached = sum(row[Tier.CACHED] for row in self.tier_counts)
        asked = cached + sum(row[Tier.LEARNED] for row in self.tier_counts)
        return cached / asked if asked else 0.0

    @property
    def experts_per_token(self) -> float:
        """Executed pairs per layer and token: the only thing that saves time."""
        total = self.tokens * len(self.executed_pairs)
        return sum(self.executed_pairs) / total if total else 0.0

    def experts_per_layer(self) -> list[float]:
        """Executed pairs per token, layer by layer."""
        return [pairs / self.tokens if self.tokens else 0.0 for pairs in self.executed_pairs]

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "tokens": self.tokens,
            "top_k": self.top_k,
            "fast_pct": self.fast_pct,
            "cached_pct": self.cached_pct,
            "learned_pct": self.learned_pct,
            "cache_hit_rate": self.cache_hit_rate,
            "experts_per_token": self.experts_per_token,
            "experts_per_token_by_layer": self.experts_per_layer(),
            "tiers_by_layer": [list(row) for row in self.tier_counts],
        }


_AT_MOST = 4096  # tokens of a layer that wait to be counted


class TierCounts:
    """Running sums per layer, kept on the layer's device until a report is asked for.

    Small forwards, as in generation, are counted together: the count of each would cost as
    much as that of all.
    """

    def __init__(self, layers: int) -> None:
        self._sums: list[Tensor | None] = [None] * layers
        self._waiting: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(layers)]
        self._top_k = 0

    def add(self, layer: int, routing: Routing, counted: Tensor) -> None:
        """Count one layer of one forward: fast, cached, learned, executed pairs."""
        self._top_k = routing.index.shape[1]
        waiting = self._waiting[layer]
        waiting.append((routing.tier, routing.index, counted))
        if len(waiting) * len(counted) >= _AT_MOST:
            self._count(layer)

    def _count(self, layer: int) -> None:
        waiting = self._waiting[layer]
        if not waiting:
            return
        tier, index, counted = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        waiting.clear()
        counted = counted.to(tier.device)
        row = torch.zeros(4, dtype=torch.int64, device=tier.device)
        row.scatter_add_(0, tier.long(), counted.long())
        row[3] = ((index >= 0) & counted[:, None]).sum()
        before = self._sums[layer]
        self._sums[layer] = row if before is None else before + row

    def report(self) -> RoutingReport:
        """Read the sums (waits for the device)."""
        for layer in range(len(self._sums)):
            self._count(layer)
        rows = [[0, 0, 0, 0] if row is None else row.tolist() for row in self._sums]
        return RoutingReport(
            tokens=sum(rows[0][:3]) if rows else 0,
            top_k=self._top_k,
            tier_counts=tuple((row[0], row[1], row[2]) for row in rows),
            executed_pairs=tuple(row[3] for row in rows),
        )
