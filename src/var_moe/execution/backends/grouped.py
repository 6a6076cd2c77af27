"""Our experts backend on a GPU: the host waits for nothing.

Rows are sorted by expert on the device, dropped pairs last and behind the offsets of the grouped
matrix product, which therefore leaves them out. So every shape is known to the host, whatever the
decision. For a few tokens, as in decoding, transformers' ``generate`` goes over to ``batched_mm``,
and so does this backend; a dropped pair then repeats an expert that its token runs anyway, with
the weight zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_moe.execution.backends.base import ExpertsBackend, activate, weighted_sum
from var_moe.models.moe_layers import biases_of, weights_of

DECODE_TOKENS = 32
"""A forward of at most so many tokens is run as decoding."""
_COPY_BYTES = 2**30  # ``batched_mm`` copies the weights of each pair: at most so much


class GroupedBackend(ExpertsBackend):
    """Keeping all pairs is bit-identical to ``grouped_mm``, or ``batched_mm`` for few tokens."""

    name = "grouped"

    def run(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        first, _ = weights_of(module)
        copied = index.numel() * first[0].numel() * first.element_size()
        if len(index) <= DECODE_TOKENS and copied <= _COPY_BYTES:
            return _batched(module, hidden, index, weight)
        experts, top_k = int(module.num_experts), index.shape[1]
        flat = index.reshape(-1)
        expert, order = torch.where(flat < 0, experts, flat).sort(stable=True)
        dropped = (expert == experts)[:, None]
        ends = torch.searchsorted(
            expert, torch.arange(experts, device=flat.device), right=True, out_int32=True
        )
        expert = expert.clamp(max=experts - 1)  # a bias is added to all rows
        rows = hidden[order // top_k]
        out = _products(module, rows, expert, ends, dropped)
        full = torch.zeros_like(out).index_copy(0, order, out).view(*index.shape, -1)
        return weighted_sum(full, weight, hidden.dtype)


def _products(module: Any, rows: Tensor, expert: Tensor, ends: Tensor, dropped: Tensor) -> Tensor:
    """The experts' outputs for (P, D) rows by expert, zero for those behind the last end."""
    from transformers.integrations.moe import _grouped_linear

    first, second = weights_of(module)
    first_bias, second_bias = [bias[expert] for bias in biases_of(module)] or (None, None)
    transposed = module.is_transposed
    gradients = torch.is_grad_enabled()  # what the product leaves unwritten must not reach them
    if gradients:
        rows = rows.masked_fill(dropped, 0)
    inner: Tensor = _grouped_linear(rows, first, ends, bias=first_bias, is_transposed=transposed)
    if gradients:
        inner = inner.masked_fill(dropped, 0)
    inner = activate(module, inner)
    out: Tensor = _grouped_linear(inner, second, ends, bias=second_bias, is_transposed=transposed)
    out = out.masked_fill(dropped, 0)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out).masked_fill(dropped, 0)
    return out


def _batched(module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    from transformers.integrations.moe import batched_mm_experts_forward

    dropped = index < 0
    own = index.amax(dim=1, keepdim=True).clamp(min=0)
    out: Tensor = batched_mm_experts_forward(
        module, hidden, torch.where(dropped, own, index), weight.masked_fill(dropped, 0)
    )
    return out
