"""Counting tiers and executed pairs, on the device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from var_moe.routing.decision import Routing, Tier
from var_moe.routing.departure import COLUMNS, Departure, summed

if TYPE_CHECKING:
    from var_moe.routing.watch import GuardReport


@dataclass(frozen=True)
class RoutingReport:
    """What was executed, per layer and over all: padding and overlaps left out.

    Reports are equal where what was executed is: departure has sums of floats, and a guard its own
    stream.
    """

    tokens: int  # counted tokens, per layer
    top_k: int
    tier_counts: tuple[tuple[int, int, int], ...]  # per layer: fast, cached, learned
    executed_pairs: tuple[int, ...]  # per layer
    # From the router's own decisions, where they were seen.
    departure: Departure | None = field(default=None, compare=False)
    # Where one is set: its stream, which outlives `reset`.
    guard: GuardReport | None = field(default=None, compare=False)

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
            **({} if self.departure is None else {"departure": self.departure.to_dict()}),
            **({} if self.guard is None else {"guard": self.guard.to_dict()}),
        }


_Waiting = tuple[Routing, Tensor, Tensor, Tensor]
_AT_MOST = 4096  # tokens of a layer that wait to be counted


class TierCounts:
    """Running sums per layer, kept on the layer's device until a report is asked for.

    Small forwards, as in generation, are counted together: the count of each would cost as
    much as that of all.

    Args:
        layers: L.
        drops_only: whether the decisions keep the router's slots (`RoutingPolicy.drops_only`).
    """

    def __init__(self, layers: int, *, drops_only: bool = True) -> None:
        self._drops_only = drops_only
        self._sums: list[Tensor | None] = [None] * layers
        self._facts: list[Tensor | None] = [None] * layers
        self._waiting: list[list[_Waiting]] = [[] for _ in range(layers)]
        self._top_k = 0

    def add(
        self, layer: int, routing: Routing, counted: Tensor, index: Tensor, weight: Tensor
    ) -> None:
        """Count one layer of one forward.

        Args:
            layer: its number.
            routing: the decision.
            counted: (T,) bool, tokens that count.
            index: (T, K) the router's experts.
            weight: (T, K) the router's weights.
        """
        self._top_k = routing.index.shape[1]
        waiting = self._waiting[layer]
        waiting.append((routing, counted, index, weight))
        if len(waiting) * len(counted) >= _AT_MOST:
            self._count(layer)

    def _count(self, layer: int) -> None:
        waiting = self._waiting[layer]
        if not waiting:
            return
        routing, counted, router, weight = _joined(waiting)
        waiting.clear()
        tier, index = routing.tier, routing.index
        row = torch.zeros(4, dtype=torch.int64, device=tier.device)
        row.scatter_add_(0, tier.long(), counted.long())
        row[3] = ((index >= 0) & counted[:, None]).sum()
        before = self._sums[layer]
        self._sums[layer] = row if before is None else before + row
        found = summed(routing, router, weight, counted, drops_only=self._drops_only)
        total = found[0].double()  # float32 holds the counts of a forward, not those of many
        known = self._facts[layer]
        self._facts[layer] = total if known is None else known + total

    def report(self, guard: GuardReport | None = None) -> RoutingReport:
        """Read the sums (waits for the device)."""
        for layer in range(len(self._sums)):
            self._count(layer)
        rows = [[0, 0, 0, 0] if row is None else row.tolist() for row in self._sums]
        sums = [[0.0] * COLUMNS if row is None else row.tolist() for row in self._facts]
        return RoutingReport(
            tokens=sum(rows[0][:3]) if rows else 0,
            top_k=self._top_k,
            tier_counts=tuple((row[0], row[1], row[2]) for row in rows),
            executed_pairs=tuple(row[3] for row in rows),
            departure=Departure(tuple(tuple(row) for row in sums)),
            guard=guard,
        )


def _joined(waiting: list[_Waiting]) -> tuple[Routing, Tensor, Tensor, Tensor]:
    """Decisions of one layer and several forwards as one: without weights and residuals.

    Returns:
        The decisions; counted (T,), index (T, K) and weight (T, K) of the router.
    """
    tier = torch.cat([routing.tier for routing, *_ in waiting])
    offer = agrees = None
    if any(routing.offer is not None for routing, *_ in waiting):
        # A session may go over to the model's own routing, which offers nothing.
        offer = torch.cat([_or(r.offer, r.tier, Tier.LEARNED) for r, *_ in waiting])
        agrees = torch.cat([_or(r.agrees, r.tier, False).bool() for r, *_ in waiting])
    weight = torch.cat([entry[3] for entry in waiting])
    routing = Routing(
        index=torch.cat([routing.index for routing, *_ in waiting]),
        weight=weight,
        tier=tier,
        offer=offer,
        agrees=agrees,
    )
    counted = torch.cat([entry[1] for entry in waiting]).to(tier.device)
    return routing, counted, torch.cat([entry[2] for entry in waiting]), weight


def _or(values: Tensor | None, like: Tensor, default: int) -> Tensor:
    return torch.full_like(like, default) if values is None else values
