"""What an experts backend is, and what several of them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_moe.routing.compensation import StandIn


class ExpertsBackend(ABC):
    """Runs the experts of one model.

    A backend may hold scratch memory and copies of weights. It serves one session at a time, and
    may serve many after each other: whoever makes it keeps what it holds until `close`.
    """

    name: str

    @abstractmethod
    def run(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """One layer's output: its executed pairs, summed by weight. (T, D)

        Args:
            module: an experts module as `use_experts_implementation` makes it.
            hidden: (T, D) inputs.
            index: (T, K) expert ids, -1 where a pair is dropped.
            weight: (T, K) weights, ignored where a pair is dropped.
        """

    def run_with(
        self,
        module: Any,
        hidden: Tensor,
        index: Tensor,
        weight: Tensor,
        kept: Tensor,
        stand_in: StandIn,
    ) -> Tensor:
        """One layer's output with what stands in for its dropped pairs. (T, D)

        Args:
            module, hidden: see `run`.
            index, weight: (T, K) the router's decision; kept pairs have its own weights.
            kept: (T, K) the same experts, -1 where a pair is dropped.
            stand_in: what is added for dropped pairs.
        """
        return stand_in.added_to(
            self.run(module, hidden, kept, weight), hidden, index, weight, kept >= 0
        )

    def pairs(self, module: Any, hidden: Tensor, index: Tensor) -> Tensor:
        """The output of each pair without its weight, zero where it is dropped. (T, K, D)"""

        def run(rows: Tensor, experts: Tensor) -> Tensor:
            return self.run(module, rows, experts, torch.ones_like(rows[:, :1]))

        return each_pair(run, hidden, index)

    def exact(self) -> ExpertsBackend:
        """The backend that rounds as the unmodified model does; where this one does, itself."""
        return self

    def begin(self) -> None:  # noqa: B027 - optional by design
        """A session starts: copies of weights may be out of date."""

    def close(self) -> None:  # noqa: B027 - optional by design
        """Give back scratch memory and copies; a later run makes them anew."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def each_pair(run: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, index: Tensor) -> Tensor:
    """`ExpertsBackend.pairs` by ``run``: (P, D) inputs and (P, 1) expert ids -> (P, D)."""
    tokens, top_k = index.shape
    flat = index.reshape(-1)
    kept = (flat >= 0).nonzero().squeeze(1)  # waits for the device
    out = run(hidden[kept // top_k], flat[kept, None])
    if len(kept) < len(flat):
        out = out.new_zeros((len(flat), out.shape[1])).index_copy_(0, kept, out)
    return out.view(tokens, top_k, -1)


def weighted_sum(outputs: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (T, K, D) by (T, K) weights as transformers' ``grouped_mm`` does. (T, D)"""
    return (outputs * weight.unsqueeze(-1)).sum(dim=1).to(dtype)


def activate(module: Any, inner: Tensor, *, in_place: bool = False) -> Tensor:
    """What an expert makes of its first product, (P, I) or with a gate (P, 2 I) -> (P, I)."""
    if module.has_gate and in_place and is_plain_silu(module):
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate, inplace=True).mul_(up)
    out: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return out


def is_plain_silu(module: Any) -> bool:
    """silu(gate) * up, and nothing else."""
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    if type(module)._apply_gate is not _default_apply_gate:
        return False  # such a class need not have an act_fn
    return isinstance(module.act_fn, (SiLUActivation, nn.SiLU))
