"""Our experts backend: a loop over experts on rows sorted by expert.

On CPU this is as fast as transformers' eager loop when all pairs are kept, and it has no
per-pair cost beyond its matrix products, so dropping pairs saves what it should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def sorted_experts(module: Any, hidden: Tensor, expert: Tensor) -> Tensor:
    """Each row through its expert, with unit weight.

    Args:
        module: an experts module as `use_experts_implementation` makes it.
        hidden: (P, D) inputs, one row per pair.
        expert: (P,) expert ids.

    Returns:
        (P, D) outputs.
    """
    order = expert.argsort()
    counts = torch.bincount(expert, minlength=module.num_experts).tolist()
    rows = order.split(counts)
    out = torch.empty_like(hidden)
    for number, row in enumerate(rows):
        if row.shape[0]:
            out[row] = _one_expert(module, hidden[row], number)
    return out


def _one_expert(module: Any, hidden: Tensor, number: int) -> Tensor:
    first = module.gate_up_proj if module.has_gate else module.up_proj
    first_bias = second_bias = None
    if module.has_bias:
        bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        first_bias, second_bias = bias[number], module.down_proj_bias[number]
    inner = _linear(hidden, first[number], first_bias, module.is_transposed)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = _linear(inner, module.down_proj[number], second_bias, module.is_transposed)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    return out


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(hidden, weight.t() if transposed else weight, bias)
