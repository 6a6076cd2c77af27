"""Damage-aware skipping: a decision is cut where that is predicted to cost less than tau.

Damage is the expected rise of the loss, in nats, by dropping a token's trailing experts in one
layer: a second-order (Fisher) saliency from one backward pass over calibration text, to which the
prediction is fitted (`calibration.fit_damage`). With one tau for all layers, the budget goes where
a cut costs least.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.routing.arrays import NUMPY, Array, Operations, operations
from var_moe.routing.base import RoutingPolicy, Sweep, check_top_k
from var_moe.routing.compensation import Compensation
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, learned_tier, rank_slots, shares

TAU_LOW, TAU_HIGH, TAU_DEFAULT = 1e-7, 1.0, 3e-3
_LEAST_MASS = 1e-6  # a share that float16 holds; its logarithm is finite


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """Terms of the prediction for all layers; those of one layer lack the first dimension."""

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

    def tensors(self) -> dict[str, Tensor]:
        """All terms by name."""
        return {name: getattr(self, name) for name in _Terms.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True)
class DamageModel(_Terms):
    """Predicts the damage D_k of running a token's first k experts alone, k = 1..K-1.

    With m the routing mass of what is dropped, the prediction in layer l is log-linear:

        log D_k = base[l, k] + slope[l, k] log m + curve[l, k] log(m)^2
                  + pair[l, first E + dropped]                      K = 2
                  + first[l, first] + sum_j (m_j / m) dropped[l, j]  K > 2
                  + token[l, id] + out[l] . silu(inner[l] h + bias[l])

    with h the layer's input: like the router, it is known before any expert runs.
    """

    compensation: Compensation | None = None  # in place when the damages were taken

    @property
    def layers(self) -> int:
        return self.base.shape[0]

    @property
    def top_k(self) -> int:
        return self.base.shape[1] + 1

    @property
    def experts(self) -> int:
        return round(self.pair.shape[1] ** 0.5) if self.top_k == 2 else self.first.shape[1]

    @cached_property
    def hash(self) -> str:
        """Identity of its values."""
        digest = hashlib.sha256(str(self.compensation and self.compensation.hash).encode())
        for tensor in self.tensors().values():
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def of_named(
        cls, tensors: Mapping[str, Tensor], prefix: str, compensation: Compensation | None
    ) -> DamageModel:
        """From tensors named ``<prefix>.<field>``; a KeyError names one that is missing."""
        own = {name: tensors[f"{prefix}.{name}"] for name in _Terms.__dataclass_fields__}
        return cls(**own, compensation=compensation)

    def layer(self, number: int, device: torch.device) -> LayerDamage:
        """One layer's part, on its device, in float32."""
        part = {name: t[number].to(device, torch.float32) for name, t in self.tensors().items()}
        return LayerDamage(**part, experts=self.experts)


@dataclass(frozen=True, kw_only=True)
class LayerDamage(_Terms):
    """One layer of a `DamageModel`."""

    experts: int

    def hint(self, hidden: Tensor) -> Tensor | None:
        """The part of log D_k that depends on the layer's input (T, D); None if none does. (T,)"""
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
        """Logarithm of D_k for k = 1..K-1, (T, K - 1).

        Experts ``index`` and their shares ``mass`` (T, K) are by rank; ``ids`` and ``hint`` (T,).
        """
        # Summed from the end: 1 minus what is kept would lose a tiny mass.
        tail = mass.flip(1).cumsum(dim=1).flip(1)[:, 1:].clamp(min=_LEAST_MASS)
        size = tail.log()
        damage = self.base + size * (self.slope + size * self.curve)
        if len(self.pair):
            damage = damage + self.pair[index[:, 0] * self.experts + index[:, 1]][:, None]
        else:
            each = mass * self.dropped[index]  # (T, K)
            mean = each.flip(1).cumsum(dim=1).flip(1)[:, 1:] / tail
            damage = damage + self.first[index[:, 0]][:, None] + mean
        rest = self.token[ids]
        if hint is not None:
            rest = rest + hint
        return damage + rest[:, None]


@dataclass(frozen=True)
class _PairTable:
    """One layer for K = 2, as arrays of the library that decides."""

    base: Array  # (1,)
    slope: Array  # (1,)
    curve: Array  # (1,)
    pair: Array  # (2 E E,) of the experts in slots 0 and 1, where the first is in slot 0 or 1
    token: Array  # (V,)


class DamagePolicy(RoutingPolicy):
    """Drop experts from the last on, while the predicted damage of the whole cut is below tau.

    Args:
        tau: nats of loss per (layer, token) decision; 0 is the unmodified model.
        damage: fitted on calibration text of the same model; its compensation, if it has one, is
            the policy's.
    """

    cuts_only = True

    def __init__(self, tau: float = TAU_DEFAULT, *, damage: DamageModel) -> None:
        check_number("DamagePolicy.tau", tau, low=0)
        self.tau = tau
        self.damage = damage
        self.compensation = damage.compensation
        self._parts: dict[tuple[int, torch.device], LayerDamage] = {}
        self._tables: dict[tuple[int, torch.device, Operations], _PairTable] = {}
        self._numbers: dict[int, dict[str, Array]] = {}
        self._hint: Tensor | None = None

    @property
    def made_for(self) -> Mapping[str, int]:
        fitted, (width, hidden) = self.damage, self.damage.inner.shape[1:]
        sizes = {"layers": fitted.layers, "experts": fitted.experts}
        sizes["vocabulary"] = fitted.token.shape[1]
        return sizes | {"hidden": hidden} if width else sizes

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        entry = {"type": "float", "low": TAU_LOW, "high": TAU_HIGH, "default": TAU_DEFAULT}
        return {"tau": {**entry, "log": True}}

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        return {"": lambda strength: {"tau": TAU_LOW ** (1 - strength) * TAU_HIGH**strength}}

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
        """Take a recorded `LayerDamage.hint` (T,) instead of the layer's input."""
        self._hint = hint

    def _part(self, layer: int, device: torch.device) -> LayerDamage:
        part = self._parts.get((layer, device))
        if part is None:
            part = self._parts[layer, device] = self.damage.layer(layer, device)
        return part

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        check_top_k(self, index, self.damage.top_k)
        if self.tau == 0 or index.shape[1] == 1:
            return all_pairs(index, weight)
        hint, self._hint = self._hint, None
        ids = context.ids_on(index.device)
        if len(index) == 1 and operations(weight) is NUMPY:
            return self._lone(layer, index, weight, int(ids), hint)
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

    def _table(self, layer: int, device: torch.device, ops: Operations) -> _PairTable:
        key = layer, device, ops
        table = self._tables.get(key)
        if table is None:
            part = self._part(layer, device)
            by_slot = part.pair.view(part.experts, part.experts)
            pair = torch.cat((part.pair, by_slot.t().flatten()))
            terms = (part.base, part.slope, part.curve, pair, part.token)
            table = self._tables[key] = _PairTable(*map(ops.of_tensor, terms))
        return table

    def _one_of_two(
        self, layer: int, index: Tensor, weight: Tensor, ids: Tensor, hint: Tensor | None
    ) -> Routing:
        """The same for K = 2 in fewer operations, which generation needs."""
        full = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        ops = operations(full)
        table = self._table(layer, index.device, ops)
        slots, heavy = ops.of_tensor(index), ops.of_tensor(full)
        own, other, one, two = slots[:, 0], slots[:, 1], heavy[:, 0], heavy[:, 1]
        swapped = (two > one) | ((two == one) & (other < own))  # the first expert is in slot 1
        total = one + two
        mass = ops.where(swapped, one, two) / ops.where(total == 0, 1.0, total)
        size = ops.log(mass.clip(min=_LEAST_MASS))
        rest = table.token[ops.of_tensor(ids)]
        if hint is not None:
            rest = rest + ops.of_tensor(hint)
        experts = self.damage.experts
        pair = table.pair[(swapped * experts + own) * experts + other]
        damage = table.base + size * (table.slope + size * table.curve) + pair + rest
        cut = damage < log(self.tau)
        drop = ops.stack(cut & swapped, cut & ~swapped)
        out = weight
        if self.compensation is None:  # with one, every pair keeps its own weight
            whole = weight.sum(dim=1, keepdim=True)
            out = torch.where(ops.to_tensor(cut)[:, None], whole, weight)
        return Routing(
            index=ops.to_tensor(ops.where(drop, -1, slots)),
            weight=out,
            tier=learned_tier(index),
        )

    def _lone(
        self, layer: int, index: Tensor, weight: Tensor, token: int, hint: Tensor | None
    ) -> Routing:
        """The same for one token on the CPU, as in generation: arrays would cost more."""
        numbers = self._numbers.get(layer)
        if numbers is None:
            tensors = self._part(layer, index.device).tensors()
            numbers = self._numbers[layer] = {name: t.numpy() for name, t in tensors.items()}
        slots, heavy = index[0].tolist(), weight[0].tolist()
        order = sorted(range(len(slots)), key=lambda slot: (-heavy[slot], slots[slot]))
        first, total, most = slots[order[0]], sum(heavy) or 1.0, log(self.tau)
        rest = numbers["token"][token] + (0.0 if hint is None else float(hint))
        kept, tail, each = len(order), 0.0, 0.0
        while kept > 1:
            expert, share = slots[order[kept - 1]], heavy[order[kept - 1]] / total
            tail += share
            mass = max(tail, _LEAST_MASS)
            size = log(mass)
            base, slope, curve = (numbers[name][kept - 2] for name in ("base", "slope", "curve"))
            damage = base + size * (slope + size * curve) + rest
            if len(order) == 2:
                damage += numbers["pair"][first * self.damage.experts + expert]
            else:
                each += share * numbers["dropped"][expert]
                damage += numbers["first"][first] + each / mass
            if not damage < most:
                break
            kept -= 1
        if kept == len(order):
            return all_pairs(index, weight)
        runs = [order.index(slot) < kept for slot in range(len(order))]
        if self.compensation is None:
            return kept_pairs(index, weight, torch.tensor([runs]))
        left = [expert if run else -1 for expert, run in zip(slots, runs, strict=True)]
        return Routing(index=torch.tensor([left]), weight=weight, tier=learned_tier(index))
