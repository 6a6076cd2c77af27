"""Experts modules made by hand, decisions for them, and the definition of their output."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn


def silu(module, inner):
    gate, up = inner.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def as_gpt_oss(module, inner):
    gate, up = inner[..., ::2].clamp(max=module.limit), inner[..., 1::2]
    up = up.clamp(min=-module.limit, max=module.limit)
    return (up + 1) * gate * torch.sigmoid(module.alpha * gate)


def concatenated(module, inner):
    """The same without interleaved columns: the kernel must not take it for GPT-OSS's."""
    gate, up = inner.chunk(2, dim=-1)
    return (up.clamp(-module.limit, module.limit) + 1) * gate.clamp(max=module.limit).sigmoid()


def experts(
    gate: Callable[..., torch.Tensor] = silu,
    *,
    hidden: int = 32,
    inner: int = 24,
    number: int = 5,
    bias: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
):
    """What `use_experts_implementation` makes of a class, with random weights."""
    from transformers.integrations.moe import _default_apply_gate

    rng = torch.Generator().manual_seed(hidden * inner)

    def tensor(*sizes):
        return torch.randn(sizes, generator=rng).div(sizes[-1] ** 0.5).to(dtype)

    first, second = tensor(number, 2 * inner, hidden), tensor(number, hidden, inner)
    if transposed:
        first, second = first.transpose(1, 2).contiguous(), second.transpose(1, 2).contiguous()
    body = {"_apply_gate": _default_apply_gate if gate is silu else gate}
    module = type("Experts", (SimpleNamespace,), body)(
        gate_up_proj=first,
        down_proj=second,
        has_gate=True,
        has_bias=bias,
        is_transposed=transposed,
        has_post_expert_norm=False,
        num_experts=number,
        act_fn=nn.SiLU(),
        alpha=1.702,
        limit=1.0,
    )
    if bias:
        module.gate_up_proj_bias = tensor(number, 2 * inner)
        module.down_proj_bias = tensor(number, hidden)
    return module


def decision(tokens, top_k, number, seed, dropped=0.3):
    rng = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, number, generator=rng).argsort(dim=1)[:, :top_k]
    index = index.masked_fill(torch.rand(tokens, top_k, generator=rng) < dropped, -1)
    return index, torch.rand(tokens, top_k, generator=rng)


def inputs(tokens, hidden, dtype=torch.float32):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(9)).to(dtype)


def in_float64(module, rows, index, weight):
    """The definition, pair by pair."""
    wide = {
        name: value.double()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    out = torch.zeros(rows.shape, dtype=torch.float64)
    for token, chosen in enumerate(index.tolist()):
        for slot, expert in enumerate(chosen):
            if expert < 0:
                continue
            first, second = wide["gate_up_proj"][expert], wide["down_proj"][expert]
            if not module.is_transposed:
                first, second = first.t(), second.t()
            inner = rows[token].double() @ first
            if module.has_bias:
                inner = inner + wide["gate_up_proj_bias"][expert]
            pair = module._apply_gate(inner) @ second
            if module.has_bias:
                pair = pair + wide["down_proj_bias"][expert]
            out[token] += weight[token, slot].double() * pair
    return out
