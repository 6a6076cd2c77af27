"""What a policy decides and runs on some batches: tiers, executed pairs, each expert's load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from var_moe.analysis.clocks import PeakMemory
from var_moe.evaluation.throughput import backend_arm
from var_moe.execution.session import routed
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import RoutingReport
from var_moe.routing.decision import ForwardContext, Routing


class Loaded(RoutingPolicy):
    """Another policy, whose executed pairs are counted by expert."""

    def __init__(self, inner: RoutingPolicy, *, layers: int, experts: int) -> None:
        self._inner, self._experts = inner, experts
        self.context_window, self.compensation = inner.context_window, inner.compensation
        self.pairs = torch.zeros((layers, experts), dtype=torch.int64)  # (L, E)

    @property
    def drops_only(self) -> bool:
        return self._inner.drops_only

    def begin(self, context: ForwardContext) -> None:
        self._inner.begin(context)

    def see(self, layer: int, hidden: Tensor) -> None:
        self._inner.see(layer, hidden)

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        routing = self._inner.route(context, layer, index, weight)
        counts = torch.bincount(routing.index.reshape(-1) + 1, minlength=self._experts + 1)
        self.pairs[layer] += counts[1 : self._experts + 1].cpu()
        return routing

    def reset(self) -> None:
        self._inner.reset()
        self.pairs.zero_()


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What was decided and run.

    ``imbalance`` is the busiest expert's pairs over the mean of its layer, in the worst layer.
    """

    report: RoutingReport
    imbalance: float
    memory: dict[str, Any]


def run_policy(
    model: Any,
    batches: Sequence[Tensor],
    policy: RoutingPolicy,
    *,
    backend: str,
    layers: int,
    experts: int,
) -> Ran:
    """One pass over the batches, from empty caches."""
    device = next(model.parameters()).device
    counted = Loaded(policy, layers=layers, experts=experts)
    memory = PeakMemory(device)
    with torch.inference_mode(), routed(model, counted, backend=backend) as session:
        session.reset()
        for ids in batches:
            model(input_ids=ids.to(device), use_cache=False)
        report = session.report()
    pairs = counted.pairs.double()
    busiest = pairs.amax(dim=1) / pairs.mean(dim=1).clamp(min=1)
    return Ran(report=report, imbalance=float(busiest.max()), memory=memory.to_dict())


def run_baseline(model: Any, batches: Sequence[Tensor], *, backend: str) -> dict[str, Any]:
    """Peak memory of the unmodified model on the batches."""
    device = next(model.parameters()).device
    memory = PeakMemory(device)
    with torch.inference_mode(), backend_arm(model, backend)():
        for ids in batches:
            model(input_ids=ids.to(device), use_cache=False)
    return memory.to_dict()
