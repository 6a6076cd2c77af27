"""A pass over text that runs all pairs and looks at each decision, experts by rank.

Profiles, traces, and damages without a backward pass are made in such passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from var_moe.evaluation.batching import logits_of
from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import weighted_sum
from var_moe.execution.dispatch import dispatched
from var_moe.models.moe_layers import RouterLogits
from var_moe.routing.decision import ForwardContext
from var_moe.routing.keeping import rank_slots


@dataclass(frozen=True, kw_only=True)
class LayerDecisions:
    """One layer's decisions for the n tokens of a forward that count."""

    layer: int
    module: nn.Module
    hidden: Tensor  # (T, D) the layer's input
    outputs: Tensor  # (T, K, D) of each pair without its weight, by slot
    at: Tensor  # (n,) the tokens that count
    ids: Tensor  # (n,) their ids, on the CPU
    rank: Tensor  # (n, K) slots by rank
    index: Tensor  # (n, K) experts by rank
    weight: Tensor  # (n, K) the router's weights by rank
    entropy: Tensor  # (n,) of the router, in nats

    @cached_property
    def ranked_outputs(self) -> Tensor:
        """Outputs without their weights, by rank. (n, K, D)"""
        each = self.rank[:, :, None].expand(-1, -1, self.outputs.shape[2])
        return self.outputs[self.at].gather(1, each)


class AllPairs(ABC):
    """The experts session of such a pass over a transformers model with L ``layers``."""

    def __init__(self, model: Any, layers: int, backend: str) -> None:
        self.model = model
        self._logits = RouterLogits(model, layers)
        self._backend = open_backend(backend)
        self._at = self._ids = torch.empty(0, dtype=torch.int64)

    @abstractmethod
    def see(self, decided: LayerDecisions) -> None:
        """Take notes of one layer, without gradients."""

    def watched(self, decided: LayerDecisions, out: Tensor) -> Tensor:
        """What the layer gives to the rest of the model: its output ``out`` (T, D)."""
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, the model's forwards are to be made by `forward`.

        A model whose experts can't be dispatched or routers watched is a UsageError.
        """
        with dispatched(self.model, self), self._logits:
            yield

    def forward(self, batch: ForwardContext, **options: Any) -> Tensor:
        """Logits of one forward. (B, S, V)"""
        self._at = batch.counted.reshape(-1).nonzero().squeeze(1)
        self._ids = batch.ids[batch.counted].cpu()
        return logits_of(self.model, batch, **options)

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: run every pair, and look at the decisions."""
        outputs = self._backend.pairs(module, hidden, index)
        out = weighted_sum(outputs, weight, hidden.dtype)
        with torch.no_grad():
            at = self._at.to(index.device)
            rank = rank_slots(index[at], weight[at])
            decided = LayerDecisions(
                layer=layer,
                module=module,
                hidden=hidden.detach(),
                outputs=outputs.detach(),
                at=at,
                ids=self._ids,
                rank=rank,
                index=index[at].gather(1, rank),
                weight=weight[at].gather(1, rank),
                entropy=self._logits.entropy(layer, index, weight)[at],
            )
            self.see(decided)
        return self.watched(decided, out)
