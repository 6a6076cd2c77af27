"""Damage-aware skipping: a decision is cut where that is predicted to cost less than tau.

The prediction is VAR's static table with the quantity that matters in place of entropy: the
expected rise of the loss, in nats, by dropping a token's trailing experts in one layer. It is
fitted (`calibration.fit_damage`) to the second-order (Fisher) estimates that one backward pass
over calibration text gives. With one tau for all layers, the budget goes where a cut costs least.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import log
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.routing.arrays import NUMPY, Array, Operations, operations
from var_moe.routing.base import Dial, RoutingPolicy, check_calibrated
from var_moe.routing.compensation import Compensation
from var_moe.routing.decision import ForwardContext, Routing, Tier
from var_moe.routing.keeping import all_pairs, kept_pairs, rank_slots, shares

TAU_LOW, TAU_HIGH, TAU_DEFAULT = 1e-7, 1.0, 3e-3
_LEAST_MASS = 1e-6  # a share that float16 holds; its logarithm is finite


@dataclass(frozen=True, kw_only=True)
class DamageModel:
    """Predicts the damage D_k of running a token's first k experts alone, k = 1..K-1.

    With m the routing mass of what is dropped, the prediction in layer l is log-linear:

        log D_k = base[l, k] + slope[l, k] log m + curve[l, k] log(m)^2
                  + pair[l, first E + dropped]                      K = 2
                  + first[l, first] + sum_j (m_j / m) dropped[l, j]  K > 2
                  + token[l, id] + out[l] . silu(inner[l] h + bias[l])

    with h the layer's input: like the router, it is known before any expert runs.
    """

    base: Tensor  # (L, K - 1)
    slope: Tensor  # (L, K - 1)
    curve: Tensor  # (L, K - 1)
    pair: Tensor  # (L, E * E), K = 2; else (L, 0)
    first: Tensor  # (L, E), K > 2; else (L, 0)
    dropped: Tensor  # (L, E), K > 2; else (L, 0)
    token: Tensor  # (L, V)
    inner: Tensor  # (L, H, D); H = 0: no look at the layer's input
    bias: Tensor  # (L, H)
    out: Tensor  # (L, H)
    compensation: Compensation | None = None  # in place when the damages were taken

    @property
    def layers(self) -> int:
        """L."""
        return self.base.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.base.shape[1] + 1

    @property
    def experts(self) -> int:
        """E."""
        return round(self.pair.shape[1] ** 0.5) if self.top_k == 2 else self.first.shape[1]

    @cached_property
    def hash(self) -> str:
        """Identity of its values."""
        digest = hashlib.sha256(str(self.compensation and self.compensation.hash).encode())
        for tensor in self.tensors().values():
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if isinstance(value, Tensor)}

    @classmethod
    def of_named(
        cls, tensors: Mapping[str, Tensor], prefix: str, compensation: Compensation | None
    ) -> DamageModel:
        """From tensors that are named ``<prefix>.<field>``.

        Raises:
            KeyError: one is missing; names it.
        """
        names = (field.name for field in fields(cls) if field.name != "compensation")
        own = {name: tensors[f"{prefix}.{name}"] for name in names}
        return cls(**own, compensation=compensation)

    def layer(self, number: int, device: torch.device) -> LayerDamage:
        """One layer's part, on its device, in float32."""
        part = {name: t[number].to(device, torch.float32) for name, t in self.tensors().items()}
        return LayerDamage(**part, experts=self.experts)


@dataclass(frozen=True, kw_only=True)
class LayerDamage:
    """One layer of a `DamageModel`; its tensors lack the first dimension."""

    base: Tensor
    slope: Tensor
    curve: Tensor
    pair: Tensor
    first: Tensor
    dropped: Tensor
    token: Tensor
    inner: Tensor
    bias: Tensor
    out: Tensor
    experts: int

    def hint(self, hidden: Tensor) -> Tensor | None:
        """What the layer's input (T, D) says; None where the model does not look at it. (T,)"""
        if not len(self.out):
            return None
        kind = hidden.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # as precise as in the fit
                return self.hint(hidden)
        return F.silu(F.linear(hidden.float(), self.inner, self.bias)) @ self.out

    def log_damage(
        self, index: Tensor, mass: Tensor, ids: Tensor, hint: Tensor | None = None
    ) -> Tensor:
        """Logarithm of D_k for k = 1..K-1.

        Args:
            index: (T, K) experts by rank.
            mass: (T, K) their shares of the token's weights.
            ids: (T,) token ids.
            hint: (T,) see `hint`.

        Returns:
            (T, K - 1)
        """
        # Summed from the end: what is dropped may be a vanishing part of one.
        tail = mass.flip(1).cumsum(dim=1).flip(1)[:, 1:].clamp(min=_LEAST_MASS)
        size = tail.log()
        found = self.base + size * (self.slope + size * self.curve)
        if len(self.pair):
            found = found + self.pair[index[:, 0] * self.experts + index[:, 1]][:, None]
        else:
            each = mass * self.dropped[index]  # (T, K)
            mean = each.flip(1).cumsum(dim=1).flip(1)[:, 1:] / tail
            found = found + self.first[index[:, 0]][:, None] + mean
        rest = self.token[ids]
        if hint is not None:
            rest = rest + hint
        return found + rest[:, None]


class DamagePolicy(RoutingPolicy):
    """Drop trailing experts as long as the predicted damage stays below tau.

    Experts are dropped one after another from the last, while the damage of the whole cut stays
    below tau.

    Args:
        tau: nats of loss per (layer, token) decision; 0 is the unmodified model.
        damage: fitted on calibration text of the same model; its compensation, if it has one, is
            the policy's.

    Raises:
        UsageError: tau is out of its range.
    """

    cuts_only = True

    def __init__(self, tau: float = TAU_DEFAULT, *, damage: DamageModel) -> None:
        check_number("DamagePolicy.tau", tau, low=0)
        self.tau = tau
        self.damage = damage
        self.compensation = damage.compensation
        self._parts: dict[tuple[int, torch.device], LayerDamage] = {}
        self._tables: dict[tuple[int, torch.device, bool], dict[str, Array]] = {}
        self._hint: Tensor | None = None

    @property
    def made_for(self) -> Mapping[str, int]:
        fitted = self.damage
        looks = {"hidden": fitted.inner.shape[2]} if fitted.inner.shape[1] else {}
        words = fitted.token.shape[1]
        return {"layers": fitted.layers, "experts": fitted.experts, "vocabulary": words, **looks}

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        entry = {"type": "float", "low": TAU_LOW, "high": TAU_HIGH, "default": TAU_DEFAULT}
        return {"tau": {**entry, "log": True}}

    @classmethod
    def dials(cls, top_k: int) -> dict[str, Dial]:
        def dial(strength: float) -> dict[str, Any]:
            return {"tau": TAU_LOW ** (1 - strength) * TAU_HIGH**strength}

        return {"": dial}

    def compensated(self, compensation: Compensation | None) -> Self:
        fitted_with = self.damage.compensation
        if (compensation and compensation.hash) != (fitted_with and fitted_with.hash):
            raise UsageError(
                "DamagePolicy: its damages were fitted "
                + ("with another compensation" if fitted_with else "without a compensation")
                + "; fit them with the one that it is to be used with"
            )
        return super().compensated(compensation)

    def see(self, layer: int, hidden: Tensor) -> None:
        self._hint = self._part(layer, hidden.device).hint(hidden)

    def see_hint(self, hint: Tensor | None) -> None:
        """What `see` would find, where a trace has recorded it. (T,)"""
        self._hint = hint

    def _part(self, layer: int, device: torch.device) -> LayerDamage:
        part = self._parts.get((layer, device))
        if part is None:
            part = self._parts[layer, device] = self.damage.layer(layer, device)
        return part

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        check_calibrated(self, layer, index, layers=self.damage.layers, top_k=self.damage.top_k)
        if self.tau == 0 or index.shape[1] == 1:
            return all_pairs(index, weight)
        hint, self._hint = self._hint, None
        ids = context.ids_on(index.device)
        if index.shape[1] == 2:
            return self._one_of_two(layer, index, weight, ids, hint)
        part = self._part(layer, index.device)
        rank = rank_slots(index, weight)  # (T, K)
        mass = shares(weight.gather(1, rank).float())
        damage = part.log_damage(index.gather(1, rank), mass, ids, hint)
        too_much = damage >= log(self.tau)  # (T, K - 1), k = 1..K-1
        # An expert runs if some cut that leaves it out, or leaves out less, is too much.
        runs = too_much.flip(1).cumsum(dim=1).flip(1) > 0
        needed = torch.cat((torch.ones_like(runs[:, :1]), runs), dim=1)
        return kept_pairs(index, weight, torch.empty_like(needed).scatter_(1, rank, needed))

    def _one_of_two(
        self, layer: int, index: Tensor, weight: Tensor, ids: Tensor, hint: Tensor | None
    ) -> Routing:
        """The same for K = 2 in few operations, which is what counts in generation."""
        full = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        ops = operations(full)
        part = self._columns(layer, index.device, ops)
        tokens, slots, heavy = (ops.of_tensor(t) for t in (ids, index, full))
        swapped = rank_slots(slots, heavy, ops)[:, 0] == 1  # the first expert is in slot 1
        total = heavy.sum(1)
        light = ops.where(swapped, heavy[:, 0], heavy[:, 1])
        mass = light / ops.where(total == 0, 1.0, total)
        first = ops.where(swapped, slots[:, 1], slots[:, 0])
        dropped = ops.where(swapped, slots[:, 0], slots[:, 1])
        size = ops.library.log(ops.at_least(mass, _LEAST_MASS))
        damage = part["base"] + size * (part["slope"] + size * part["curve"])
        rest = part["token"][tokens]
        if hint is not None:
            rest = rest + ops.of_tensor(hint)
        damage = damage + part["pair"][first * self.damage.experts + dropped] + rest
        cut = damage < log(self.tau)
        drop = ops.stack(cut & swapped, cut & ~swapped)
        out = weight
        if self.compensation is None:  # with one, every pair keeps its own weight
            whole = weight.sum(dim=1, keepdim=True)
            out = torch.where(ops.to_tensor(cut)[:, None], whole, weight)
        return Routing(
            index=ops.to_tensor(ops.where(drop, -1, slots)),
            weight=out,
            tier=torch.full_like(index[:, 0], Tier.LEARNED, dtype=torch.uint8),
        )

    def _columns(self, layer: int, device: torch.device, ops: Operations) -> dict[str, Array]:
        """The layer's tables as `_one_of_two` needs them."""
        key = (layer, device, ops is NUMPY)
        found = self._tables.get(key)
        if found is None:
            part = self._part(layer, device)
            names = ("base", "slope", "curve", "pair", "token")
            found = {name: ops.of_tensor(getattr(part, name)) for name in names}
            self._tables[key] = found
        return found
