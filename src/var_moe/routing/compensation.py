"""Learned compensation: what stands in for experts that do not run.

Where experts are dropped, the layer's output gets, per unit of the weight w that was dropped,

    v[first, dropped] + B silu(A h + a)

with h the layer's input, v a vector per (first, dropped) expert, or per dropped expert where that
would need too much memory, and A, B a map of rank r for all experts. Kept pairs have the router's
own weights: the compensation stands for the dropped part, so nothing is rescaled. Rank 0 are the
residual means of a profile. It is fitted by `calibration.fit_compensation`.

Low-rank stand-ins are known for whole pruned experts (MC-SMoE, arXiv:2310.01334; residual
restoration, ResMoE, arXiv:2503.06881); here one stands in for whatever a decision drops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from var_moe.errors import UsageError
from var_moe.routing.arrays import TORCH, Array, Operations


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


@dataclass(frozen=True)
class LayerCompensation:
    """One layer's part. ``down``, ``bias`` and ``up`` are None at rank 0."""

    vectors: Tensor  # (rows + 1, D) per unit of dropped weight; the last row is zero
    down: Tensor | None = None  # (r, D) A
    bias: Tensor | None = None  # (r,) a
    up: Tensor | None = None  # (D, r) B

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerCompensation:
        """The same on the layer's device, in its dtype."""
        return self.mapped(lambda tensor: tensor.to(device, dtype))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> LayerCompensation:
        """The same with each tensor changed."""
        return LayerCompensation(**{name: change(t) for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """By name, those that there are."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def correction(self, hidden: Tensor) -> Tensor | None:
        """B silu(A h + a) for (T, D) inputs, per unit of dropped weight; None at rank 0."""
        if self.down is None or self.up is None:
            return None
        return F.linear(F.silu(F.linear(hidden, self.down, self.bias)), self.up)

    def add(self, out: Tensor, hidden: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        """The layer's output with what stands in for the dropped experts. (T, D)

        Args:
            out: (T, D) output of the kept pairs, with the router's own weights.
            hidden: (T, D) input of the layer.
            row, weight: (T, J) what is dropped, of `Compensation.dropped`.
        """
        weight = weight.to(out.dtype)
        total = weight if weight.shape[1] == 1 else weight.sum(dim=1, keepdim=True)
        if self.down is not None and self.up is not None:
            inner = F.silu(F.linear(hidden, self.down, self.bias)) * total
            out = torch.addmm(out, inner, self.up.t())
        if weight.shape[1] == 1:
            return torch.addcmul(out, self.vectors.index_select(0, row[:, 0]), weight)
        return out + F.embedding_bag(row, self.vectors, mode="sum", per_sample_weights=weight)


@dataclass(frozen=True)
class Compensation:
    """The compensation of all layers of one model.

    Args:
        layers: L parts.
        by_pair: vectors are keyed by ``first * E + dropped`` (else by the dropped expert).
        experts: E.
    """

    layers: tuple[LayerCompensation, ...]
    by_pair: bool
    experts: int

    @property
    def rank(self) -> int:
        """r; 0 has vectors alone."""
        down = self.layers[0].down
        return 0 if down is None else down.shape[0]

    @classmethod
    def of_residual_means(cls, means: ResidualMeans) -> Compensation:
        """Rank 0: a profile's residual means per pair.

        Raises:
            UsageError: they are keyed by the first expert alone.
        """
        if not means.by_pair:
            raise UsageError(
                "residual means per first expert are no compensation: expected them per pair"
            )
        layers = tuple(LayerCompensation(table) for table in means.table)
        return cls(layers=layers, by_pair=True, experts=means.experts)

    @classmethod
    def empty(cls, *, layers: int, experts: int, hidden: int) -> Compensation:
        """Rank 0 with zero vectors per dropped expert: the start of a fit for K > 2."""
        part = LayerCompensation(torch.zeros((experts + 1, hidden)))
        return cls(layers=(part,) * layers, by_pair=False, experts=experts)

    @cached_property
    def hash(self) -> str:
        """Identity of its values."""
        tensors = (tensor for layer in self.layers for tensor in layer.tensors().values())
        digest = hashlib.sha256(f"{self.by_pair} {self.experts}".encode())
        for tensor in tensors:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def rows(self, index: Tensor, first: Tensor) -> Tensor:
        """Row of ``vectors`` for each dropped expert: index (T, K), first (T,) -> (T, K)"""
        return first[:, None] * self.experts + index if self.by_pair else index

    def dropped(self, index: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What is dropped from the router's (T, K) decision where the slots ``kept`` run.

        Returns:
            Rows of the vectors (T, J) and dropped weights (T, J), zero where nothing is dropped;
            J = K, but 1 for K = 2, where at most one expert is.
        """
        if index.shape[1] != 2:
            return self.rows(index, first_expert(index, weight)), weight.masked_fill(kept, 0)
        # At most one of two is dropped; the other is the first, or the one that runs.
        swapped = ~kept[:, 0]
        lost = torch.where(swapped, index[:, 0], index[:, 1])
        row = lost
        if self.by_pair:
            row = torch.where(swapped, index[:, 1], index[:, 0]) * self.experts + lost
        gone = weight.masked_fill(kept, 0).sum(dim=1, keepdim=True)
        return row[:, None], gone

    def named(self, prefix: str) -> dict[str, Tensor]:
        """All tensors, for a file: ``<prefix>.<layer>.<field>``."""
        return {
            f"{prefix}.{number}.{name}": tensor
            for number, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }

    @classmethod
    def of_named(
        cls, tensors: Mapping[str, Tensor], prefix: str, *, layers: int, by_pair: bool, experts: int
    ) -> Compensation:
        """Read what `named` gave, among other tensors; a KeyError names missing vectors."""
        parts = []
        for number in range(layers):
            part = f"{prefix}.{number}"
            low = (tensors.get(f"{part}.{name}") for name in ("down", "bias", "up"))
            parts.append(LayerCompensation(tensors[f"{part}.vectors"], *low))
        return cls(layers=tuple(parts), by_pair=by_pair, experts=experts)

    def check(self, *, layers: int, experts: int, hidden: int) -> None:
        """Refuse another model's: a UsageError names both shapes."""
        mine = (len(self.layers), self.experts, self.layers[0].vectors.shape[1])
        if mine != (layers, experts, hidden):
            raise UsageError(
                f"compensation for (layers, experts, hidden size) = {mine} does not fit a model of "
                f"{(layers, experts, hidden)}; fit one with `var-moe fit-compensation`"
            )


@dataclass(frozen=True, eq=False)
class StandIn:
    """What stands in for the dropped experts of one layer, on its device and in its dtype."""

    compensation: Compensation
    layer: LayerCompensation

    def added_to(
        self, out: Tensor, hidden: Tensor, index: Tensor, weight: Tensor, kept: Tensor
    ) -> Tensor:
        """The (T, D) output of the slots ``kept`` (T, K) with it; see `Compensation.dropped`."""
        return self.layer.add(out, hidden, *self.compensation.dropped(index, weight, kept))


def first_expert(index: Tensor, weight: Tensor) -> Tensor:
    """The heaviest expert of each token, the lower id of equals: (T, K), (T, K) -> (T,)"""
    heaviest = weight.amax(dim=1, keepdim=True)
    return index.masked_fill(weight < heaviest, torch.iinfo(index.dtype).max).amin(dim=1)
