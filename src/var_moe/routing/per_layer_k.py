"""Sharing out a budget of experts per token over the layers by what each of them loses.

After LExI (Chitty-Venkata et al., "LExI: Layer-Adaptive Active Experts for Efficient MoE Model
Inference", 2025, arXiv:2509.02753), which measures how much a layer's output changes for every
k and searches the allocation, and the layer level of Alloc-MoE (Liu et al., "Alloc-MoE:
Budget-Aware Expert Activation Allocation for Efficient Mixture-of-Experts Inference", 2026,
arXiv:2604.08133), which finds it by dynamic programming over sensitivities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.routing.base import RoutingPolicy, Sweep, check_top_k
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """The loss of running only the first k experts, layer by layer.

    Any measure will do whose sum over layers stands for the damage to the model. LExI takes the
    Frobenius norm of the change of a layer's output.

    Args:
        measure: what the numbers are, in a few words.
        loss: L rows of K values >= 0; ``loss[l][k - 1]`` belongs to k experts in layer l.
    """

    measure: str
    loss: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.loss or not self.loss[0]:
            raise UsageError("LayerSensitivity.loss = (): expected a row of K values per layer")
        for layer, row in enumerate(self.loss):
            where = f"LayerSensitivity.loss[{layer}]"
            if len(row) != self.top_k:
                raise UsageError(f"{where} = {row!r}: expected {self.top_k} values")
            for value in row:
                check_number(where, value, low=0)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.loss)

    @property
    def top_k(self) -> int:
        """K."""
        return len(self.loss[0])

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerSensitivity:
        """Read what `to_dict` gave; a missing or unknown key is a KeyError or TypeError."""
        return cls(**{**values, "loss": tuple(map(tuple, values["loss"]))})


def allocate_experts(loss: Sequence[Sequence[float]], total: int) -> tuple[int, ...]:
    """Experts per layer, ``total`` in all, of the smallest summed loss.

    Exact, by dynamic programming over the layers: losses need not be convex nor decreasing. Of
    equal ways it takes the most even one (smallest sum of squares), then the one that gives more
    to earlier layers.

    Args:
        loss: L rows of K values; ``loss[l][k - 1]`` belongs to k experts in layer l.
        total: experts to share out, from L (one per layer) to L * K.

    Returns:
        k per layer, each in [1, K].

    Raises:
        UsageError: the total is out of its range.
    """
    layers, top_k = len(loss), len(loss[0])
    check_number("total experts", total, integer=True, low=layers, high=layers * top_k)
    # Losses as whole numbers of one unit, so that equal sums are equal: denominators of floats
    # are powers of two, so the largest is a multiple of all.
    exact = [[Fraction(value) for value in row] for row in loss]
    unit = max(value.denominator for row in exact for value in row)
    whole = [[int(value * unit) for value in row] for row in exact]
    # With n experts in the layers from here on: (loss, sum of squares, -k of each layer).
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for row in reversed(whole):
        longer: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for spent, (cost, squares, later) in best.items():
            for k, added in enumerate(row[: total - spent], start=1):
                way = (cost + added, squares + k * k, (-k, *later))
                if spent + k not in longer or way < longer[spent + k]:
                    longer[spent + k] = way
        best = longer
    return tuple(-k for k in best[total][2])


class PerLayerKPolicy(RoutingPolicy):
    """The first k_l experts in layer l, all tokens alike, rescaled to the full decision's sum.

    Args:
        experts_per_token: the budget, a mean over layers, in [1, K]. A fraction gives some
            layers one expert more; what is not a whole number over all layers is left unspent.
        sensitivity: of the same model.
    """

    cuts_only = True

    def __init__(self, experts_per_token: float, *, sensitivity: LayerSensitivity) -> None:
        name = "PerLayerKPolicy.experts_per_token"
        check_number(name, experts_per_token, low=1, high=sensitivity.top_k)
        self.experts_per_token = experts_per_token
        self.sensitivity = sensitivity
        # A budget such as 5/3 over three layers must not lose an expert to rounding.
        total = math.floor(experts_per_token * sensitivity.layers + 1e-9)
        self.k = allocate_experts(sensitivity.loss, total)  # (L,)

    @property
    def made_for(self) -> Mapping[str, int]:
        return {"layers": self.sensitivity.layers}

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        high = float(top_k)
        entry = {"type": "float", "low": 1.0, "high": high, "default": (1 + high) / 2}
        return {"experts_per_token": entry}

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        return {"": lambda strength: {"experts_per_token": top_k - strength * (top_k - 1)}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        own = self.sensitivity
        check_top_k(self, index, own.top_k)
        k = self.k[layer]
        if k == own.top_k:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, k))
