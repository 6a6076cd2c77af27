"""What a routing policy is given for a forward and returns for a layer, and who observes that."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Tier(IntEnum):
    """Which path decided a (layer, token)."""

    FAST = 0  # the static table of the profile
    CACHED = 1  # the context cache
    LEARNED = 2  # the model's own router


@dataclass(frozen=True)
class Residual:
    """What is added to the layer's output in place of dropped experts: ``scale * table[row]``."""

    table: Tensor  # (R, D) vectors of this layer; the last row is zero
    row: Tensor  # (T,) int64, R - 1 where nothing is added
    scale: Tensor  # (T,) weight of what was dropped

    def added_to(self, out: Tensor) -> Tensor:
        """With the layer's output (T, D), in its dtype."""
        means, scale = self.table[self.row], self.scale[:, None].to(self.table.dtype)
        if out.dtype == means.dtype:
            return torch.addcmul(out, means, scale)
        return out + (means * scale).to(out.dtype)


@dataclass(frozen=True)
class Routing:
    """The decision for one layer and all tokens of a forward.

    ``index`` keeps the slot order of the router. ``offer`` and ``agrees`` are about the first
    expert that the static table or the cache named; None where the policy has neither.
    """

    index: Tensor  # (T, K) int64 expert ids, -1: not executed
    weight: Tensor  # (T, K) weights, ignored where index is -1
    tier: Tensor  # (T,) uint8, a Tier
    residual: Residual | None = None
    offer: Tensor | None = None  # (T,) uint8, the Tier that named it; LEARNED: neither did
    agrees: Tensor | None = None  # (T,) bool, whether it is among the router's leading experts


@dataclass(frozen=True)
class ForwardContext:
    """The tokens of one forward, row-major over (batch, sequence): the same for all layers.

    A token that is ``valid`` but not ``counted`` (the overlap of two windows) is routed and looks
    up in the cache, but inserts nothing and is in no statistics.
    """

    ids: Tensor  # (B, S) int64
    valid: Tensor  # (B, S) bool, False for padding
    counted: Tensor  # (B, S) bool, implies valid
    document: tuple[int, ...]  # (B,) document number per row
    prefix: Tensor | None = None  # (B, P) int64 ids of the document before the row, -1: none
    inserting: bool = True  # off in beam search, whose rows only look up in the cache
    _copies: dict[tuple[str, torch.device], Tensor] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def ids_on(self, device: torch.device) -> Tensor:
        """(T,) the ids on a layer's device: a model may be spread over several."""
        return self._on("ids", self.ids, device)

    def counted_on(self, device: torch.device) -> Tensor:
        """(T,) ``counted`` on a layer's device."""
        return self._on("counted", self.counted, device)

    def _on(self, name: str, values: Tensor, device: torch.device) -> Tensor:
        """``values``, flat, copied to each device once."""
        copy = self._copies.get((name, device))
        if copy is None:
            copy = self._copies[name, device] = values.reshape(-1).to(device)
        return copy

    @property
    def stays(self) -> Tensor:
        """(B, S) bool: tokens that enter the cache or refresh their key, and move time on."""
        return self.counted if self.inserting else torch.zeros_like(self.counted)

    @classmethod
    def of(cls, ids: Tensor, attention_mask: Tensor | None = None) -> ForwardContext:
        """Each row a document of its own; padding from ``attention_mask``."""
        if attention_mask is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        else:
            valid = attention_mask.to(device=ids.device, dtype=torch.bool)
        return cls(ids=ids, valid=valid, counted=valid, document=tuple(range(-ids.shape[0], 0)))

    @property
    def size(self) -> int:
        """T, padding included."""
        return self.ids.numel()


class Observer:
    """Follows the decisions of a routed model. Every method is optional."""

    def begin(self, context: ForwardContext) -> None:
        """A forward starts; one before it that `end` was not called for has failed."""

    def see(
        self, layer: int, context: ForwardContext, routing: Routing, index: Tensor, weight: Tensor
    ) -> None:
        """A layer is decided: ``routing``, for the router's own (T, K) index and weight."""

    def end(self) -> None:
        """The forward has ended."""

    def end_documents(self) -> None:
        """No document goes on."""

    def reset(self) -> None:
        """The session's counts start again from zero; it calls `end_documents` before."""

    @property
    def native(self) -> bool:
        """Whether the model's own routing is to be used from now on."""
        return False

    def report(self) -> dict[str, Any]:
        """Its part of the session's report, by field of `RoutingReport`."""
        return {}
