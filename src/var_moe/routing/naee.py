"""NAEE's dynamic skipping: an expert far behind the first does not run.

Source: Lu et al., "Not All Experts are Equal: Efficient Expert Pruning and Skipping for
Mixture-of-Experts Large Language Models", ACL 2024, arXiv:2402.14800, and its code
(Lucky-Lance/Expert_Sparsity).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.routing.base import RoutingPolicy, Sweep, check_top_k
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import kept_pairs


@dataclass(frozen=True, kw_only=True)
class RatioQuantiles:
    """Per layer, quantiles of ``w_j / w_1`` over the experts after the first, on calibration text.

    Args:
        top_k: K of the model.
        tokens: calibration tokens behind each layer.
        quantiles: L rows of values at evenly spaced levels from 0 to 1, each row non-decreasing
            in [0, 1].
    """

    top_k: int
    tokens: int
    quantiles: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_number("RatioQuantiles.top_k", self.top_k, integer=True, low=1)
        check_number("RatioQuantiles.tokens", self.tokens, integer=True, low=1)
        if not self.quantiles:
            raise UsageError("RatioQuantiles.quantiles = (): expected a row for each layer")
        for layer, row in enumerate(self.quantiles):
            where = f"RatioQuantiles.quantiles[{layer}]"
            if len(row) < 2 or len(row) != len(self.quantiles[0]):
                raise UsageError(f"{where} = {row!r}: expected as many values in each, at least 2")
            for value in row:
                check_number(where, value, low=0, high=1)
            if list(row) != sorted(row):
                raise UsageError(f"{where}: expected values that do not decrease")

    @property
    def layers(self) -> int:
        """L."""
        return len(self.quantiles)

    def at(self, quantile: float) -> tuple[float, ...]:
        """Per layer, the ratio at ``quantile`` in [0, 1], interpolated linearly."""
        check_number("quantile", quantile, low=0, high=1)
        place = quantile * (len(self.quantiles[0]) - 1)
        left = min(int(place), len(self.quantiles[0]) - 2)
        part = place - left
        return tuple(row[left] * (1 - part) + row[left + 1] * part for row in self.quantiles)

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RatioQuantiles:
        """Read what `to_dict` gave; a missing or unknown key is a KeyError or TypeError."""
        return cls(**{**values, "quantiles": tuple(map(tuple, values["quantiles"]))})


class NAEEPolicy(RoutingPolicy):
    """Skip expert j where ``w_j < beta_l * w_1``, beta_l a quantile of that ratio in layer l.

    The paper has K = 2 and the median. Here any quantile q is one knob for all layers, and for
    K > 2 the ratios of all experts after the first are pooled: on calibration text every layer
    skips the share q of the pairs that it can. The kept weights are rescaled to the full
    decision's sum.

    Args:
        quantile: q in [0, 1]; 0 is the unmodified model, 0.5 the paper's median.
        ratios: calibrated quantiles of the same model.
    """

    cuts_only = True

    def __init__(self, quantile: float, *, ratios: RatioQuantiles) -> None:
        check_number("NAEEPolicy.quantile", quantile, low=0, high=1)
        self.quantile = quantile
        self.ratios = ratios
        self.beta = ratios.at(quantile)  # (L,) in [0, 1]

    @property
    def made_for(self) -> Mapping[str, int]:
        return {"layers": len(self.beta)}

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        return {"quantile": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.5}}

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        return {"": lambda strength: {"quantile": strength}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        check_top_k(self, index, self.ratios.top_k)
        full = weight.float()
        # beta <= 1: the first expert always runs.
        keep = full >= self.beta[layer] * full.amax(dim=1, keepdim=True)
        return kept_pairs(index, weight, keep)
