"""Verifiable Adaptive Routing: fast path, then cache, then the model's own router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from var_moe.config import SEARCH_SPACE, VARConfig
from var_moe.errors import UsageError
from var_moe.routing.base import Dial, RoutingPolicy
from var_moe.routing.clock import Clock, TokenClock
from var_moe.routing.context_cache import ContextCache, Hits
from var_moe.routing.decision import Residual, Routing, Tier, TokenBatch
from var_moe.routing.fast_path import ResidualMeans, RoutingTable
from var_moe.routing.keys import context_keys
from var_moe.routing.ranking import leading_count, rank_slots, rescaled, shares


@dataclass(frozen=True)
class _Layer:
    """One layer's part of the profile, on the device that the layer runs on."""

    expected: Tensor | None  # (V,) first expert of the table where a token id is on the fast path,
    # else -1; None where no token id is
    index: Tensor  # (V, leading) leading experts of the table
    weight: Tensor  # (V, leading)
    residual: Tensor | None  # (rows + 1, D)


class VARPolicy(RoutingPolicy):
    """The three tiers as one policy, in plain or verified mode (see `VARConfig`).

    Args:
        config: the thresholds.
        table: the static table of a profile of the same model.
        residuals: residual means of the same profile; needed where the config uses them.
        clock: time for the cache's entries; by default virtual, a thousand tokens a second.

    Raises:
        UsageError: the config uses residual means, and none are given.
    """

    def __init__(
        self,
        config: VARConfig,
        table: RoutingTable,
        *,
        residuals: ResidualMeans | None = None,
        clock: Clock | None = None,
    ) -> None:
        if config.uses_residuals and residuals is None:
            raise UsageError(
                "this VARConfig adds residual means: give VARPolicy the profile's "
                "(residuals=profile.residuals), or set residuals=False in the config"
            )
        self.config = config
        self.table = table
        self.residuals = residuals if config.uses_residuals else None
        self.cache = ContextCache(
            size=config.cache_size,
            ttl_seconds=config.cache_ttl_seconds,
            clock=clock or TokenClock(),
        )
        self.context_window = config.context_window_size
        self._eligible = table.eligible(config.frequency_threshold, config.entropy_threshold)
        self._any_eligible = self._eligible.any(dim=1).tolist()
        self._layers: dict[int, _Layer] = {}
        self._ids: dict[torch.device, Tensor] = {}  # (T,) this forward's ids, per device

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        return {name: dict(entry) for name, entry in SEARCH_SPACE.items()}

    @classmethod
    def dials(cls, top_k: int) -> dict[str, Dial]:
        ends = {name: (entry["low"], entry["high"]) for name, entry in SEARCH_SPACE.items()}
        # Which end of each range cuts little, and which cuts much.
        falling = ("frequency_threshold", "confidence_threshold", "context_window_size")
        mild = {name: high if name in falling else low for name, (low, high) in ends.items()}
        hard = {name: low if name in falling else high for name, (low, high) in ends.items()}

        def presets(strength: float) -> dict[str, Any]:
            """All six thresholds together, in the direction of the presets."""
            values = {k: mild[k] + strength * (hard[k] - mild[k]) for k in mild}
            return {
                k: round(v) if SEARCH_SPACE[k]["type"] == "int" else v for k, v in values.items()
            }

        def confidence(strength: float) -> dict[str, Any]:
            """The confidence threshold alone, table and cache as good as off."""
            return {**mild, "confidence_threshold": 1 - strength / 2}

        return {"presets": presets, "confidence": confidence}

    @classmethod
    def build(cls, settings: Mapping[str, Any], calibration: Mapping[str, Any]) -> Self:
        return cls(VARConfig.from_dict(settings), **calibration)

    def reset(self) -> None:
        self.cache.clear()

    def begin(self, batch: TokenBatch) -> None:
        ids = batch.ids.reshape(-1)
        self._ids = {ids.device: ids}
        keys = context_keys(batch, self.config.context_window_size)
        documents = None
        if self.config.cache_scope == "document":
            # Rows without a number are documents of their own, and end with the forward.
            documents = [n if n >= 0 else -1 - row for row, n in enumerate(batch.document)]
        self.cache.begin(keys, batch.valid, batch.stays, documents)

    def _on(self, device: torch.device) -> Tensor:
        """The forward's token ids on a layer's device; a model may be spread over several."""
        if device not in self._ids:
            self._ids[device] = next(iter(self._ids.values())).to(device)
        return self._ids[device]

    def _part(self, layer: int, device: torch.device) -> _Layer:
        """The layer's part of the profile, moved to its device when first needed there."""
        part = self._layers.get(layer)
        if part is None or part.index.device != device:
            means = self.residuals
            index, expected = self.table.index[layer], None
            if self._any_eligible[layer]:
                expected = torch.where(self._eligible[layer], index[:, 0], -1).to(device)
            part = self._layers[layer] = _Layer(
                expected=expected,
                index=index.to(device),
                weight=self.table.weight[layer].to(device),
                residual=None if means is None else means.table[layer].to(device),
            )
        return part

    def route(self, layer: int, index: Tensor, weight: Tensor) -> Routing:
        leading = rank_slots(index, weight)[:, : leading_count(index.shape[1])]  # slots
        lead_index, lead_weight = index.gather(1, leading), weight.gather(1, leading)
        kept, total = lead_weight.sum(dim=1), weight.sum(dim=1)
        part, ids = self._part(layer, index.device), self._on(index.device)
        expected = None if part.expected is None else part.expected[ids]  # (T,)
        if leading.shape[1] == index.shape[1]:
            confident = torch.ones_like(kept, dtype=torch.bool)  # mass 1, whatever the rounding
        else:
            confident = kept / total >= self.config.confidence_threshold
        if self.config.mode == "plain":
            hits = self.cache.layer(layer, lead_index, lead_weight, confident)
            return self._plain(part, ids, index, weight, expected, hits)

        # Verified: the table or the slot only licenses the cut; its first expert must be among
        # those that the router itself puts first. A refused licence makes the token LEARNED.
        known = self.cache.layer(layer, lead_index[:, :1], None, confident).first()
        by_table: int | Tensor = int(Tier.CACHED)
        if expected is not None:
            fast = expected >= 0
            known = torch.where(fast, expected, known)
            by_table = torch.where(fast, int(Tier.FAST), int(Tier.CACHED))
        licensed = (lead_index == known[:, None]).any(dim=1)
        cut = (licensed | confident)[:, None]
        keep = torch.zeros_like(index, dtype=torch.bool).scatter_(1, leading, True)
        residual = self._residual(part, lead_index, index, keep, cut[:, 0], total - kept)
        if residual is None:
            weight = torch.where(cut, rescaled(weight, kept, total), weight)
        # Else the mean stands for what was dropped, and what is kept has its own weight.
        return Routing(
            index=torch.where(keep | ~cut, index, -1),
            weight=weight,
            tier=torch.where(licensed, by_table, int(Tier.LEARNED)).to(torch.uint8),
            residual=residual,
        )

    def _plain(
        self,
        part: _Layer,
        ids: Tensor,
        index: Tensor,
        weight: Tensor,
        expected: Tensor | None,
        hits: Hits,
    ) -> Routing:
        """Documented VAR: the stored experts run unseen, in the first slots."""
        lead = hits.index.shape[1]
        tier = torch.where(hits.hit, int(Tier.CACHED), int(Tier.LEARNED))
        stored_index, stored_weight = hits.index, hits.weight
        assert stored_weight is not None
        if expected is not None:
            fast = expected >= 0
            tier = torch.where(fast, int(Tier.FAST), tier)
            stored_index = torch.where(fast[:, None], part.index[ids], stored_index)
            table_weight = part.weight[ids].to(weight.dtype)
            stored_weight = torch.where(fast[:, None], table_weight, stored_weight)
        replaced = (tier != Tier.LEARNED)[:, None]
        scaled = shares(stored_weight) * weight.sum(dim=1, keepdim=True)
        out_index = torch.where(replaced, -1, index)
        out_index[:, :lead] = torch.where(replaced, stored_index, out_index[:, :lead])
        out_weight = weight.clone()
        out_weight[:, :lead] = torch.where(replaced, scaled, weight[:, :lead])
        return Routing(index=out_index, weight=out_weight, tier=tier.to(torch.uint8))

    def _residual(
        self,
        part: _Layer,
        lead_index: Tensor,
        index: Tensor,
        keep: Tensor,
        cut: Tensor,
        dropped_weight: Tensor,
    ) -> Residual | None:
        if self.residuals is None or part.residual is None or lead_index.shape == index.shape:
            return None
        first, dropped = lead_index[:, 0], None
        if self.residuals.by_pair:  # K = 2: the one that is not kept
            dropped = torch.where(keep[:, 0], index[:, 1], index[:, 0])
        row = self.residuals.row(first, dropped, cut)
        return Residual(table=part.residual, row=row, scale=dropped_weight)
