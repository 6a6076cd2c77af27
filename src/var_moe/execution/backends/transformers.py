"""transformers' own experts backends, given the pairs that are not dropped as a top-1 problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from var_moe.execution.backends.base import ExpertsBackend, each_pair, weighted_sum


class TransformersBackend(ExpertsBackend):
    """One of them: ``eager``, ``grouped_mm``, ``batched_mm``, ...

    Weights are applied outside, and the pairs summed as (T, K, D) over K: keeping all pairs is
    then bit-identical to ``grouped_mm``.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        original = type(module).forward.__wrapped__
        function: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(self.name, original)

        def products(rows: Tensor, experts: Tensor) -> Tensor:
            ones = torch.ones((len(rows), 1), dtype=rows.dtype, device=rows.device)
            return function(module, rows, experts, ones)

        outputs = each_pair(products, hidden, index)
        return weighted_sum(outputs, weight, hidden.dtype)
