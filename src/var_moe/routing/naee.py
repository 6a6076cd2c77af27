"""NAEE's dynamic skipping: an expert far behind the first does not run.

Source: Lu et al., "Not All Experts are Equal: Efficient Expert Pruning and Skipping for
Mixture-of-Experts Large Language Models", ACL 2024, arXiv:2402.14800, and its code
(Lucky-Lance/Expert_Sparsity).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from var_moe.config import check_number
from var_moe.routing.base import Dial, RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import kept_pairs
from var_moe.routing.ratios import RatioQuantiles
from var_moe.routing.shapes import check_calibrated


class NAEEPolicy(RoutingPolicy):
    """Skip expert j where ``w_j < beta_l * w_1``, beta_l a quantile of that ratio in layer l.

    The paper has K = 2 and the median. Here any quantile q is one knob for all layers, and for
    K > 2 the ratios of all experts after the first are pooled: on calibration text every layer
    skips the share q of the pairs that it can. The kept weights are rescaled to the full
    decision's sum.

    Args:
        quantile: q in [0, 1]; 0 is the unmodified model, 0.5 the paper's median.
        ratios: calibrated quantiles of the same model.

    Raises:
        UsageError: the quantile is out of its range.
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
    def dials(cls, top_k: int) -> dict[str, Dial]:
        return {"": lambda strength: {"quantile": strength}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        check_calibrated(self, layer, index, layers=self.ratios.layers, top_k=self.ratios.top_k)
        full = weight.float()
        # beta <= 1: the first expert always runs.
        keep = full >= self.beta[layer] * full.amax(dim=1, keepdim=True)
        return kept_pairs(index, weight, keep)
