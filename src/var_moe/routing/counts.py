"""Counts of a session: tiers, executed pairs, and how far decisions leave the router's own.

The model's router is always asked, so each token's K experts are known beside those that run.
Per decision (layer, token) there are three facts:

- dropped mass: the routing mass of the router's experts that do not run;
- cut: whether there is one;
- agreement: whether the first expert that the static table or the context cache named is among
  the router's leading ones; none where neither named one.

They are summed on the device, without waiting for it, until a report is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from var_moe.routing.decision import ForwardContext, Observer, Routing, Tier

if TYPE_CHECKING:
    from var_moe.routing.watch import GuardReport


TIERS = tuple(tier.name.lower() for tier in Tier)
OFFERING = TIERS[:2]  # tiers that name a first expert
# Columns of `summed`: three for each tier, two for each that offers, executed pairs.
_DECISIONS, _DROPPED, _CUT, _OFFERED, _AGREED, PAIRS = 0, 3, 6, 9, 11, 13
COLUMNS = 14

Sums = NDArray[np.float64]
"""(L, 14) sums of `summed` over a text."""


def summed(
    routing: Routing,
    index: Tensor,
    weight: Tensor,
    counted: Tensor,
    *,
    drops_only: bool,
    rows: int = 1,
) -> Tensor:
    """Sums of the facts of one layer's decisions.

    Args:
        routing: the decisions.
        index: (T, K) the router's experts.
        weight: (T, K) the router's weights.
        counted: (T,) bool, tokens that count.
        drops_only: whether the decisions keep the router's slots.
        rows: B parts of equal length, each summed apart.

    Returns:
        (B, 14) float32: decisions, dropped mass and cuts, each of the three tiers; offers and
        agreements, each of the table and the cache; executed pairs.
    """
    if drops_only:
        runs = routing.index >= 0
    else:
        runs = (index[:, :, None] == routing.index[:, None, :]).any(2)
    full = weight.float()
    total = full.sum(1)
    # A router may give a token no weight at all; padding may have any, NaN as well.
    lost = full.masked_fill(runs, 0).sum(1) / total.masked_fill(total == 0, 1)
    lost = lost.masked_fill(~counted, 0)
    number = torch.arange(len(Tier), device=index.device, dtype=torch.uint8)[:, None]
    own = (routing.tier == number) & counted  # (3, T)
    each = torch.stack((torch.ones_like(lost), lost, (~runs).any(1).float()))  # (3, T)
    parts = (each[:, None] * own).view(9, rows, -1).sum(2)
    pairs = ((routing.index >= 0).sum(1) * counted).view(1, rows, -1).sum(2)
    if routing.offer is None or routing.agrees is None:
        both = parts.new_zeros((PAIRS - len(parts), rows))
    else:
        offered = (routing.offer == number[: len(OFFERING)]) & counted  # (2, T)
        both = torch.cat((offered, offered & routing.agrees)).view(4, rows, -1).sum(2)
    return torch.cat((parts, both, pairs)).t()


class ForwardSums(Observer):
    """Base of observers that sum a forward's decisions, layers of one kind at once.

    In generation, summing each layer apart would cost as much as deciding it. ``drops_only`` is
    that of the policy.
    """

    def __init__(self, layers: int, *, drops_only: bool = True) -> None:
        self._layers, self._drops_only = layers, drops_only
        self._context: ForwardContext | None = None
        self._held: dict[Any, list[tuple[int, Routing, Tensor, Tensor]]] = {}

    def begin(self, context: ForwardContext) -> None:
        self._context = context
        self._held.clear()

    def see(
        self, layer: int, context: ForwardContext, routing: Routing, index: Tensor, weight: Tensor
    ) -> None:
        # Layers of one kind are summed in one tensor; they may lie on several devices.
        kind = (index.device, index.shape, routing.index.shape, routing.offer is None)
        self._held.setdefault(kind, []).append((layer, routing, index, weight))

    def _take(self, context: ForwardContext, rows: int = 1) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the numbers of N held layers and their `summed` (N, rows, 14), and forget them."""
        held, self._held = self._held, {}
        for entries in held.values():
            layers, routings, index, weight = zip(*entries, strict=True)
            offers = [one.offer for one in routings if one.offer is not None]
            agrees = [one.agrees for one in routings if one.agrees is not None]
            together = Routing(
                index=torch.cat([one.index for one in routings]),
                weight=routings[0].weight,  # not used
                tier=torch.cat([one.tier for one in routings]),
                offer=torch.cat(offers) if offers else None,
                agrees=torch.cat(agrees) if agrees else None,
            )
            sums = summed(
                together,
                torch.cat(index),
                torch.cat(weight),
                context.counted_on(index[0].device).repeat(len(layers)),
                drops_only=self._drops_only,
                rows=len(layers) * rows,
            )
            yield list(layers), sums.view(len(layers), rows, -1)


def statistic_names(layers: int) -> tuple[str, ...]:
    """Names of what `statistics` returns, in its order."""
    return (
        "dropped_mass",
        "cut_share",
        *(f"dropped_mass.{tier}" for tier in TIERS),
        *(f"agreement.{tier}" for tier in OFFERING),
        *(f"dropped_mass.layer{layer}" for layer in range(layers)),
        *(f"cut_share.layer{layer}" for layer in range(layers)),
    )


def statistics(sums: Sums) -> Sums:
    """Means over a text's decisions by `statistic_names`, (2 L + 7,); NaN where there are none."""
    decisions, dropped, cut = (sums[:, at : at + 3] for at in (_DECISIONS, _DROPPED, _CUT))
    offered, agreed = (sums[:, at : at + 2] for at in (_OFFERED, _AGREED))
    with np.errstate(invalid="ignore"):
        return np.concatenate(
            (
                [dropped.sum() / decisions.sum(), cut.sum() / decisions.sum()],
                dropped.sum(0) / decisions.sum(0),
                agreed.sum(0) / offered.sum(0),
                dropped.sum(1) / decisions.sum(1),
                cut.sum(1) / decisions.sum(1),
            )
        )


def _drift(sums: Sums) -> dict[str, Any]:
    """How far decisions leave the router's own, for a report; None for a mean of nothing."""

    def means(part: Sums) -> list[float | None]:
        return [None if math.isnan(value) else value for value in statistics(part).tolist()]

    def agreements(part: Sums) -> dict[str, float | None]:
        return dict(zip(OFFERING, means(part)[5:7], strict=True))

    all_means, layers = means(sums), len(sums)
    return {
        "dropped_mass": all_means[0],
        "cut_share": all_means[1],
        "dropped_mass_by_tier": dict(zip(TIERS, all_means[2:5], strict=True)),
        "agreement_by_tier": agreements(sums),
        "dropped_mass_by_layer": all_means[7 : 7 + layers],
        "cut_share_by_layer": all_means[7 + layers :],
        "agreement_by_layer": [agreements(sums[[layer]]) for layer in range(layers)],
    }


@dataclass(frozen=True)
class RoutingReport:
    """What was executed, per layer and over all, without padding and overlaps.

    Reports are equal where tokens, tiers and executed pairs are; `drift` and `guard` are not
    compared.
    """

    tokens: int  # counted tokens, per layer
    top_k: int
    tier_counts: tuple[tuple[int, int, int], ...]  # per layer: fast, cached, learned
    executed_pairs: tuple[int, ...]  # per layer
    # How far decisions leave the router's own: dropped mass, cuts, agreement.
    drift: dict[str, Any] | None = field(default=None, compare=False)
    # Of the session's guard, whose counts a `reset` does not clear.
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
            **({} if self.drift is None else {"departure": self.drift}),
            **({} if self.guard is None else {"guard": asdict(self.guard)}),
        }


_LARGE = 4096  # a forward of so many tokens is summed layer by layer, to hold no decisions


class TierCounts(ForwardSums):
    """Running sums per layer, kept on the layer's device until a report is asked for."""

    def __init__(self, layers: int, *, drops_only: bool = True) -> None:
        super().__init__(layers, drops_only=drops_only)
        # (N, 14) of N layers that are summed together, on their device.
        self._sums: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._top_k = 0

    def see(
        self, layer: int, context: ForwardContext, routing: Routing, index: Tensor, weight: Tensor
    ) -> None:
        self._top_k = routing.index.shape[1]
        super().see(layer, context, routing, index, weight)
        if context.size >= _LARGE:
            self._count(context)

    def end(self) -> None:
        if self._context is not None:
            self._count(self._context)

    def _count(self, context: ForwardContext) -> None:
        for layers, sums in self._take(context):
            total = sums[:, 0].double()  # float32 holds the counts of a forward, not those of many
            key = (tuple(layers), sums.device)
            self._sums[key] = total + self._sums.get(key, 0)

    def reset(self) -> None:
        self._sums.clear()

    def report(self) -> dict[str, Any]:
        """Read the sums (waits for the device): the fields of a `RoutingReport`."""
        sums = torch.zeros((self._layers, COLUMNS), dtype=torch.float64)
        for (layers, _), part in self._sums.items():
            sums[list(layers)] += part.cpu()
        counts = sums.long()
        return {
            "tokens": int(counts[0, :3].sum()),
            "top_k": self._top_k,
            "tier_counts": tuple(map(tuple, counts[:, :3].tolist())),
            "executed_pairs": tuple(counts[:, PAIRS].tolist()),
            "drift": _drift(sums.numpy()),
        }
