"""Verifiable Adaptive Routing: fast path, then cache, then the model's own router."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from var_moe.config import PRESETS, SEARCH_SPACE, VARConfig
from var_moe.errors import UsageError
from var_moe.routing.arrays import Array, Operations, operations
from var_moe.routing.base import RoutingPolicy, Sweep
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.context_cache import ContextCache, Hits
from var_moe.routing.decision import ForwardContext, Residual, Routing, Tier
from var_moe.routing.keeping import leading_count, rank_slots, rescaled, shares
from var_moe.routing.keys import context_keys
from var_moe.routing.lru import Clock

_FAST, _CACHED, _LEARNED = (int(tier) for tier in (Tier.FAST, Tier.CACHED, Tier.LEARNED))


@dataclass(frozen=True)
class RoutingTable:
    """The static table: a profile's rows as dense tensors. Unseen token ids have count zero."""

    count: Tensor  # (L, V) float64 occurrences
    entropy: Tensor  # (L, V) float64 mean router entropy in nats
    index: Tensor  # (L, V, leading) int64 leading experts, first expert first
    weight: Tensor  # (L, V, leading) float32 their mean weights

    def eligible(self, frequency_threshold: float, entropy_threshold: float) -> Tensor:
        """(L, V) bool: frequent and predictable enough for the fast path."""
        frequent = (self.count > 0) & (self.count >= frequency_threshold)
        return frequent & (self.entropy <= entropy_threshold)


@dataclass(frozen=True)
class _Layer:
    """One layer's part of the profile, on the layer's device."""

    # (V,) the table's first expert, -1 for ids off the fast path; None where all are
    expected: Tensor | None
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
            clock=clock or Clock(),
        )
        self.context_window = config.context_window_size
        self._eligible = table.eligible(config.frequency_threshold, config.entropy_threshold)
        self._any_eligible = self._eligible.any(dim=1).tolist()
        self._layers: dict[tuple[int, torch.device], _Layer] = {}

    @property
    def made_for(self) -> Mapping[str, int]:
        layers, vocabulary = self.table.count.shape
        sizes = {"layers": layers, "vocabulary": vocabulary}
        if self.residuals is not None:
            width = self.residuals.table[0].shape[1]
            sizes |= {"experts": self.residuals.experts, "hidden": width}
        return sizes

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        return {name: dict(entry) for name, entry in SEARCH_SPACE.items()}

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        ends = {name: (entry["low"], entry["high"]) for name, entry in SEARCH_SPACE.items()}
        # Settings that cut less the higher they are.
        falling = ("frequency_threshold", "confidence_threshold", "context_window_size")
        mild = {name: high if name in falling else low for name, (low, high) in ends.items()}
        hard = {name: low if name in falling else high for name, (low, high) in ends.items()}

        def at(name: str, strength: float) -> float:
            value: float = mild[name] + strength * (hard[name] - mild[name])
            return round(value) if SEARCH_SPACE[name]["type"] == "int" else value

        return {
            # All six settings together, in the direction of the presets.
            "presets": lambda strength: {name: at(name, strength) for name in mild},
            # The confidence threshold alone, with table and cache at their mildest.
            "confidence": lambda strength: {**mild, "confidence_threshold": 1 - strength / 2},
        }

    @property
    def drops_only(self) -> bool:
        return self.config.mode == "verified"

    @property
    def documents_apart(self) -> bool:
        return self.config.cache_scope == "document" or self.config.cache_size == 0

    @property
    def adds_residual(self) -> bool:
        return self.residuals is not None or super().adds_residual

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        return PRESETS

    @classmethod
    def needed(cls, settings: Mapping[str, Any], needs: Collection[str]) -> tuple[str, ...]:
        uses_residuals = VARConfig.from_dict(settings).uses_residuals
        return tuple(name for name in needs if uses_residuals or name != "residuals")

    @classmethod
    def per_document(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "cache_scope": "document"}

    @classmethod
    def cost_settings(
        cls, settings: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        config = VARConfig.from_dict(settings)
        # Verified, with no token in the table: confidence alone cuts all decisions, or none.
        nothing = VARConfig(
            frequency_threshold=2**62, confidence_threshold=1.0, residuals=config.uses_residuals
        )
        return nothing.to_dict(), nothing.replace(confidence_threshold=1e-9).to_dict()

    @classmethod
    def build(cls, settings: Mapping[str, Any], calibration: Mapping[str, Any]) -> Self:
        return cls(VARConfig.from_dict(settings), **calibration)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any], calibrated: Collection[str]) -> None:
        VARConfig.from_dict(settings)

    def reset(self) -> None:
        self.cache.clear()

    def begin(self, context: ForwardContext) -> None:
        keys = context_keys(context, self.config.context_window_size)
        documents = None
        if self.config.cache_scope == "document":
            # A row without a number is a document of its own, and ends with the forward.
            documents = [n if n >= 0 else -1 - row for row, n in enumerate(context.document)]
        self.cache.begin(keys, context.valid, context.stays, documents)

    def _part(self, layer: int, device: torch.device) -> _Layer:
        """The layer's part of the profile, copied to its device once."""
        part = self._layers.get((layer, device))
        if part is None:
            index, means, expected = self.table.index[layer], self.residuals, None
            if self._any_eligible[layer]:
                expected = torch.where(self._eligible[layer], index[:, 0], -1).to(device)
            part = self._layers[layer, device] = _Layer(
                expected=expected,
                index=index.to(device),
                weight=self.table.weight[layer].to(device),
                residual=None if means is None else means.table[layer].to(device),
            )
        return part

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        ops, part = operations(weight), self._part(layer, index.device)
        tensors = (context.ids_on(index.device), index, weight)
        # A weight sum of zero gives NaN, which is not confident, and no warning.
        with np.errstate(invalid="ignore"):
            return self._decide(ops, layer, part, *(ops.of_tensor(each) for each in tensors))

    def _decide(
        self, ops: Operations, layer: int, part: _Layer, ids: Array, index: Array, weight: Array
    ) -> Routing:
        leading = rank_slots(index, weight, ops)[:, : leading_count(index.shape[1])]  # slots
        if leading.shape[1] != part.index.shape[1]:
            raise UsageError(
                f"VARPolicy: calibrated for {part.index.shape[1]} leading experts, the model's K = "
                f"{index.shape[1]} has {leading.shape[1]}; calibrate on this model"
            )
        lead_index, lead_weight = ops.take(index, leading), ops.take(weight, leading)
        kept, total = lead_weight.sum(1), weight.sum(1)
        expected = None if part.expected is None else ops.of_tensor(part.expected)[ids]  # (T,)
        if leading.shape[1] == index.shape[1]:
            confident = lead_index[:, 0] >= 0  # all: the mass is 1, whatever the rounding
        else:
            confident = kept / total >= self.config.confidence_threshold
        if self.config.mode == "plain":
            hits = self.cache.layer(layer, lead_index, lead_weight, confident)
            return self._plain(ops, part, ids, index, weight, lead_index, expected, hits)

        # Verified: table and slot only license the cut, if their first expert is among the
        # router's leading ones. Otherwise the token is LEARNED.
        known = self.cache.layer(layer, lead_index[:, :1], None, confident).first(ops)
        by_table: Array | int = _CACHED
        if expected is not None:
            fast = expected >= 0
            known = ops.where(fast, expected, known)
            by_table = ops.where(fast, _FAST, _CACHED)
        licensed = (lead_index == known[:, None]).any(1)
        cut = licensed | confident
        drop = ~ops.marked(index, leading) & cut[:, None]
        residual = None
        if self.residuals is None or part.residual is None or lead_index.shape == index.shape:
            weight = ops.where(cut[:, None], rescaled(weight, kept, total, ops), weight)
        else:  # the mean stands for the dropped weight, and nothing is rescaled
            # By pair, K is 2: the one that is dropped where one is.
            dropped = ops.where(drop[:, 0], index[:, 0], index[:, 1])
            row = self.residuals.row(lead_index[:, 0], dropped, cut, ops)
            residual = Residual(part.residual, ops.to_tensor(row), ops.to_tensor(total - kept))
        return Routing(
            index=ops.to_tensor(ops.where(drop, -1, index)),
            weight=ops.to_tensor(weight),
            tier=ops.small(ops.where(licensed, by_table, _LEARNED)),
            residual=residual,
            offer=ops.small(ops.where(known >= 0, by_table, _LEARNED)),
            agrees=ops.to_tensor(licensed),
        )

    def _plain(
        self,
        ops: Operations,
        part: _Layer,
        ids: Array,
        index: Array,
        weight: Array,
        lead_index: Array,
        expected: Array | None,
        hits: Hits,
    ) -> Routing:
        """Documented VAR: the stored experts run unseen, in the first slots."""
        lead = hits.index.shape[1]
        tier = ops.where(hits.hit, _CACHED, _LEARNED)
        stored_index, stored_weight = hits.index, hits.weight
        if expected is not None:
            fast = expected >= 0
            tier = ops.where(fast, _FAST, tier)
            stored_index = ops.where(fast[:, None], ops.of_tensor(part.index)[ids], stored_index)
            stored_weight = ops.where(fast[:, None], ops.of_tensor(part.weight)[ids], stored_weight)
        replaced = (tier != _LEARNED)[:, None]
        total = weight.sum(1)
        out_index = ops.where(replaced, -1, index)
        out_index[:, :lead] = ops.where(replaced, stored_index, index[:, :lead])
        scaled = shares(stored_weight, ops) * total[:, None]
        out_weight = ops.where(replaced, 0.0, weight)
        out_weight[:, :lead] = ops.where(replaced, scaled, weight[:, :lead])
        tiers = ops.small(tier)
        return Routing(
            index=ops.to_tensor(out_index),
            weight=ops.to_tensor(out_weight),
            tier=tiers,
            offer=tiers,
            agrees=ops.to_tensor(replaced[:, 0] & (lead_index == stored_index[:, :1]).any(1)),
        )
