"""Which experts a policy runs for every token of a trace, and where two policies run the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from var_moe.routing.base import RoutingPolicy
from var_moe.tracing.policies import decisions

if TYPE_CHECKING:
    from var_moe.tracing.trace import RoutingTrace


def executed_experts(trace: RoutingTrace, policy: RoutingPolicy) -> Tensor:
    """The experts that ``policy`` runs, from empty caches; see `tracing.policies.decisions`.

    Returns:
        (L, N, K) int16 expert ids, descending, -1 where nothing runs.

    Raises:
        UsageError: the policy's compensation or damage model is not the trace's.
    """
    found = torch.full_like(trace.index, -1)
    with torch.inference_mode():
        for one in decisions(trace, policy):
            runs = one.routing.index[one.counted].to(torch.int16)
            ordered = runs.sort(dim=1, descending=True).values
            found[one.layer, one.position[one.counted], : ordered.shape[1]] = ordered
    return found


def share_alike(one: Tensor, other: Tensor) -> float:
    """Share of (layer, token) for which both run the same set of experts. (L, N, K) each."""
    return float((one == other).all(dim=2).double().mean())
