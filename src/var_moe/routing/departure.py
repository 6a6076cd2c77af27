"""How far decisions leave the router's own: agreement and dropped mass, counted on the device.

The model's router is always asked, so that for every token its K experts are known beside those
that run. Per decision (layer, token) there are three facts:

- dropped mass: the routing mass of the router's experts that do not run;
- cut: whether there is one;
- agreement: where the static table or the context cache named a first expert, whether that is
  among the router's leading ones. A decision that neither of them offered has no agreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from var_moe.routing.decision import ForwardContext, Routing, Tier

TIERS = tuple(tier.name.lower() for tier in Tier)
OFFERING = TIERS[:2]  # those that can offer an expert
# Columns of `summed`: three per tier, two per tier that offers, executed pairs.
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
        rows: B, parts of equal length to be summed apart.

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


class ForwardDecisions:
    """The decisions of the running forward, held until all its layers are summed at once.

    In generation, summing each layer apart would cost as much as deciding it.
    """

    def __init__(self) -> None:
        self._layers: dict[Any, list[tuple[int, Routing, Tensor, Tensor]]] = {}

    def clear(self) -> None:
        """Forget them."""
        self._layers.clear()

    def add(self, layer: int, routing: Routing, index: Tensor, weight: Tensor) -> None:
        """Hold a layer's decision; ``index`` and ``weight`` (T, K) are the router's."""
        # What is alike stands in one tensor: layers may lie on several devices.
        kind = (index.device, index.shape, routing.index.shape, routing.offer is None)
        self._layers.setdefault(kind, []).append((layer, routing, index, weight))

    def take(
        self, context: ForwardContext, *, drops_only: bool, rows: int = 1
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The layers that are alike, and forget them.

        Args:
            context: the forward's.
            drops_only: whether decisions keep the router's slots.
            rows: B, parts of the forward to be summed apart.

        Yields:
            Numbers of N layers, and `summed` of each (N, B, 14).
        """
        held, self._layers = self._layers, {}
        for entries in held.values():
            numbers = [layer for layer, *_ in entries]
            parts = [routing for _, routing, *_ in entries]
            index = torch.cat([entry[2] for entry in entries])
            offered = parts[0].offer is not None and parts[0].agrees is not None
            routing = Routing(
                index=torch.cat([one.index for one in parts]),
                weight=parts[0].weight,  # not looked at
                tier=torch.cat([one.tier for one in parts]),
                offer=torch.cat([one.offer for one in parts if one.offer is not None])
                if offered
                else None,
                agrees=torch.cat([one.agrees for one in parts if one.agrees is not None])
                if offered
                else None,
            )
            sums = summed(
                routing,
                index,
                torch.cat([entry[3] for entry in entries]),
                context.counted_on(index.device).repeat(len(numbers)),
                drops_only=drops_only,
                rows=len(numbers) * rows,
            )
            yield numbers, sums.view(len(numbers), rows, -1)


def statistic_names(layers: int) -> tuple[str, ...]:
    """What `statistics` finds, in its order."""
    return (
        "dropped_mass",
        "cut_share",
        *(f"dropped_mass.{tier}" for tier in TIERS),
        *(f"agreement.{tier}" for tier in OFFERING),
        *(f"dropped_mass.layer{layer}" for layer in range(layers)),
        *(f"cut_share.layer{layer}" for layer in range(layers)),
    )


def statistics(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the decisions of a text, by `statistic_names`, each in [0, 1].

    Args:
        sums: (L, 14) sums of `summed`.

    Returns:
        (2 L + 7,); NaN where there is no such decision.
    """
    whole = sums.sum(axis=0)
    by_layer = sums[:, :_DROPPED].sum(axis=1)
    above = np.concatenate(
        (
            [whole[_DROPPED:_CUT].sum(), whole[_CUT:_OFFERED].sum()],
            whole[_DROPPED:_CUT],
            whole[_AGREED:PAIRS],
            sums[:, _DROPPED:_CUT].sum(axis=1),
            sums[:, _CUT:_OFFERED].sum(axis=1),
        )
    )
    below = np.concatenate(
        (
            [by_layer.sum(), by_layer.sum()],
            whole[_DECISIONS:_DROPPED],
            whole[_OFFERED:_AGREED],
            by_layer,
            by_layer,
        )
    )
    found: NDArray[np.float64] = np.full(len(above), np.nan)
    np.divide(above, below, out=found, where=below > 0)
    return found


@dataclass(frozen=True)
class Departure:
    """The counted decisions' departure from the router's own.

    Args:
        sums: (L, 14) sums of `summed`.
    """

    sums: tuple[tuple[float, ...], ...]

    def _ratio(
        self, above: int, below: int, tiers: int, tier: Tier | None, layer: int | None
    ) -> Any:
        rows = self.sums if layer is None else (self.sums[layer],)
        which = range(tiers) if tier is None else (int(tier),)
        total = sum(row[below + n] for row in rows for n in which)
        part = sum(row[above + n] for row in rows for n in which)
        return part / total if total else math.nan

    def dropped_mass(self, tier: Tier | None = None, layer: int | None = None) -> float:
        """Mean routing mass of the router's experts that did not run; NaN without decisions."""
        return float(self._ratio(_DROPPED, _DECISIONS, 3, tier, layer))

    def cut_share(self, tier: Tier | None = None, layer: int | None = None) -> float:
        """Share of decisions in which an expert of the router's did not run."""
        return float(self._ratio(_CUT, _DECISIONS, 3, tier, layer))

    def agreement(self, tier: Tier | None = None, layer: int | None = None) -> float:
        """Of the first experts that table (FAST) or cache (CACHED) offered, the share among the
        router's leading ones; NaN where none was offered, as by policies without either."""
        if tier == Tier.LEARNED:
            return math.nan
        return float(self._ratio(_AGREED, _OFFERED, 2, tier, layer))

    def to_dict(self) -> dict[str, Any]:
        """For result files; None where there is nothing to take a mean of."""
        layers = range(len(self.sums))

        def number(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            "dropped_mass": number(self.dropped_mass()),
            "cut_share": number(self.cut_share()),
            "dropped_mass_by_tier": {n: number(self.dropped_mass(Tier[n.upper()])) for n in TIERS},
            "agreement_by_tier": {n: number(self.agreement(Tier[n.upper()])) for n in OFFERING},
            "dropped_mass_by_layer": [number(self.dropped_mass(layer=n)) for n in layers],
            "cut_share_by_layer": [number(self.cut_share(layer=n)) for n in layers],
            "agreement_by_layer": [
                {n: number(self.agreement(Tier[n.upper()], layer)) for n in OFFERING}
                for layer in layers
            ],
        }
