"""Counting tiers and executed pairs, on the device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from var_moe.routing.decision import ForwardContext, Observer, Routing, Tier
from var_moe.routing.departure import COLUMNS, PAIRS, Departure, ForwardDecisions

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


_LARGE = 4096  # tokens of a forward from which on each layer is counted when it is decided


class TierCounts(Observer):
    """Running sums per layer, kept on the layer's device until a report is asked for.

    Args:
        layers: L.
        drops_only: whether the decisions keep the router's slots (`RoutingPolicy.drops_only`).
    """

    def __init__(self, layers: int, *, drops_only: bool = True) -> None:
        self._number, self._drops_only = layers, drops_only
        self._decisions = ForwardDecisions()
        self._context: ForwardContext | None = None
        # (N, 14) of layers that are summed together, on their device.
        self._sums: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._top_k = 0

    def begin(self, context: ForwardContext) -> None:
        self._decisions.clear()
        self._context = context

    def see(
        self, layer: int, context: ForwardContext, routing: Routing, index: Tensor, weight: Tensor
    ) -> None:
        self._top_k = routing.index.shape[1]
        self._decisions.add(layer, routing, index, weight)
        if context.size >= _LARGE:
            self._count(context)

    def end(self) -> None:
        if self._context is not None:
            self._count(self._context)

    def _count(self, context: ForwardContext) -> None:
        for layers, sums in self._decisions.take(context, drops_only=self._drops_only):
            total = sums[:, 0].double()  # float32 holds the counts of a forward, not those of many
            key = (tuple(layers), sums.device)
            known = self._sums.get(key)
            self._sums[key] = total if known is None else known + total

    def reset(self) -> None:
        self._sums.clear()

    def report(self) -> dict[str, Any]:
        """Read the sums (waits for the device): the fields of a `RoutingReport`."""
        sums = torch.zeros((self._number, COLUMNS), dtype=torch.float64)
        for (layers, _), part in self._sums.items():
            sums[list(layers)] += part.cpu()
        rows = tuple(tuple(row) for row in sums.tolist())
        tiers = tuple((int(row[0]), int(row[1]), int(row[2])) for row in rows)
        return {
            "tokens": sum(tiers[0]) if tiers else 0,
            "top_k": self._top_k,
            "tier_counts": tiers,
            "executed_pairs": tuple(int(row[PAIRS]) for row in rows),
            "departure": Departure(rows),
        }
