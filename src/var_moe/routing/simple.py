"""Policies that need no calibration: controls, and cuts by the router's own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_moe.config import check_number
from var_moe.routing.base import RoutingPolicy, Sweep
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import (
    all_pairs,
    kept_pairs,
    leading_count,
    leading_slots,
    rank_slots,
)


class NativePolicy(RoutingPolicy):
    """The model's own routing, every pair executed: the control for all others."""

    cuts_only = True

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        return all_pairs(index, weight)


class FixedKPolicy(RoutingPolicy):
    """Run the first k experts of every token, rescaled to the full decision's sum.

    Args:
        k: experts per token, at least 1; from the model's own K on, nothing changes.
    """

    cuts_only = True

    def __init__(self, k: int) -> None:
        check_number("FixedKPolicy.k", k, integer=True, low=1)
        self.k = k

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        return {"k": {"type": "int", "low": 1, "high": top_k, "default": leading_count(top_k)}}

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        return {"": lambda strength: {"k": top_k - round(strength * (top_k - 1))}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if self.k >= index.shape[1]:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, self.k))


class RandomSkipPolicy(RoutingPolicy):
    """Each (layer, token) runs only its leading experts with probability ``share``.

    The control that a real policy has to beat at the same experts per token.

    Args:
        share: probability of a cut, in [0, 1].
        seed: of the random numbers, which start again at each `reset`.
    """

    cuts_only = True

    def __init__(self, share: float, *, seed: int = 0) -> None:
        check_number("RandomSkipPolicy.share", share, low=0, high=1)
        check_number("RandomSkipPolicy.seed", seed, integer=True, low=0)
        self.share = share
        self.seed = seed
        self._rngs: dict[torch.device, torch.Generator] = {}

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        return {"share": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.5}}

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        return {"": lambda strength: {"share": strength}}

    def reset(self) -> None:
        self._rngs.clear()

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        device = index.device
        if device not in self._rngs:
            self._rngs[device] = torch.Generator(device).manual_seed(self.seed)
        drawn = torch.rand(index.shape[0], generator=self._rngs[device], device=device)
        spared = (drawn >= self.share)[:, None]
        leading = leading_slots(index, weight, leading_count(index.shape[1]))
        return kept_pairs(index, weight, spared | leading)


class SERPolicy(RoutingPolicy):
    """Smart Expert Reduction: the first Kmin experts, and of the others those with w_j > t w_1.

    Source: I. Kawrakow, ik_llama.cpp, pull request #239 (2025), option ``-ser Kmin,t``. As there,
    t = 0 is the unmodified model and t = 1 runs exactly Kmin experts. Here the weights that the
    router hands to the experts stand for the probabilities; the kept ones are rescaled to the
    full decision's sum.

    Args:
        min_experts: Kmin, at least 1; from the model's own K on, nothing changes.
        threshold: t, relative to the first expert's weight, in [0, 1].
    """

    cuts_only = True

    def __init__(self, min_experts: int, threshold: float) -> None:
        check_number("SERPolicy.min_experts", min_experts, integer=True, low=1)
        check_number("SERPolicy.threshold", threshold, low=0, high=1)
        self.min_experts = min_experts
        self.threshold = threshold

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        # Kmin = K would leave nothing for the threshold to decide.
        high, default = max(1, top_k - 1), leading_count(top_k)
        return {
            "min_experts": {"type": "int", "low": 1, "high": high, "default": default},
            "threshold": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.4},
        }

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        return {"": lambda strength: {"min_experts": 1, "threshold": strength}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if self.threshold == 0 or self.min_experts >= index.shape[1]:
            return all_pairs(index, weight)
        full = weight.float()
        close = full > self.threshold * full.amax(dim=1, keepdim=True)
        return kept_pairs(index, weight, close | leading_slots(index, weight, self.min_experts))


class TopPPolicy(RoutingPolicy):
    """The smallest set of first experts whose routing mass is at least p.

    Source: Huang et al., "Harder Tasks Need More Experts: Dynamic Routing in MoE Models", 2024,
    arXiv:2403.07652. The paper trains with this routing, sums probabilities over all E experts
    and adds the chosen outputs unscaled. Here it cuts the K experts of a model trained with
    top-k, and the kept weights are rescaled to the full decision's sum.

    Args:
        p: routing mass to reach, in (0, 1]; 1 is the unmodified model.
    """

    cuts_only = True

    def __init__(self, p: float) -> None:
        check_number("TopPPolicy.p", p, low=0, high=1, open_low=True)
        self.p = p

    @classmethod
    def search_space(cls, top_k: int) -> dict[str, dict[str, Any]]:
        # The first expert alone has at least 1/K: a smaller p changes nothing more.
        low = 1 / top_k
        return {"p": {"type": "float", "low": low, "high": 1.0, "default": max(low, 0.8)}}

    @classmethod
    def sweeps(cls, top_k: int) -> dict[str, Sweep]:
        return {"": lambda strength: {"p": 1 - strength * (1 - 1 / top_k)}}

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if self.p == 1:  # in the sums, a tiny last weight could vanish
            return all_pairs(index, weight)
        rank = rank_slots(index, weight)  # (T, K)
        reached = weight.gather(1, rank).float().cumsum(dim=1)
        # An expert is needed if those before it fall short of p; the first always is.
        needed = torch.ones_like(rank, dtype=torch.bool)
        needed[:, 1:] = reached[:, :-1] < self.p * reached[:, -1:]
        return kept_pairs(index, weight, torch.empty_like(needed).scatter_(1, rank, needed))


class Overhead(RoutingPolicy):
    """Does the work of ``policy``, but runs the first ``count`` experts of every token.

    So the cost of decisions is timed apart from what they save.
    """

    def __init__(self, policy: RoutingPolicy, count: int) -> None:
        self._policy, self._count = policy, count
        self.context_window, self.compensation = policy.context_window, policy.compensation

    def begin(self, context: ForwardContext) -> None:
        self._policy.begin(context)

    def see(self, layer: int, hidden: Tensor) -> None:
        self._policy.see(layer, hidden)

    def reset(self) -> None:
        self._policy.reset()

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        self._policy.route(context, layer, index, weight)
        if self._count >= index.shape[1]:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, self._count))
