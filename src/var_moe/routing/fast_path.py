"""The static table: what the profile knows of each (layer, token id)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from var_moe.routing.arrays import TORCH, Array, Operations


@dataclass(frozen=True)
class RoutingTable:
    """A profile's rows as dense tensors, as the fast path needs them.

    Token ids that calibration never saw have a count of zero.
    """

    count: Tensor  # (L, V) float64 occurrences
    entropy: Tensor  # (L, V) float64 mean router entropy in nats
    index: Tensor  # (L, V, leading) int64 leading experts, first expert first
    weight: Tensor  # (L, V, leading) float32 their mean weights

    def eligible(self, frequency_threshold: float, entropy_threshold: float) -> Tensor:
        """(L, V) bool: frequent and predictable enough for the fast path."""
        seen = self.count > 0
        frequent = self.count >= frequency_threshold
        return seen & frequent & (self.entropy <= entropy_threshold)


@dataclass(frozen=True)
class ResidualMeans:
    """What a dropped expert would have added, on average, per unit of its weight.

    ``table[l]`` is keyed by ``(first, dropped)`` (row ``first * E + dropped``) when K = 2 and
    the budget allows, else by the first expert alone. The last row is zero.
    """

    table: tuple[Tensor, ...]  # L tensors (rows + 1, D)
    by_pair: bool
    experts: int

    def row(
        self, first: Array, dropped: Array | None, cut: Array, ops: Operations = TORCH
    ) -> Array:
        """Row per token: its pair or first expert where cut, else the zero row. (T,)"""
        if not self.by_pair:
            return ops.where(cut, first, self.experts)
        assert dropped is not None
        return ops.where(cut, first * self.experts + dropped, self.experts**2)
