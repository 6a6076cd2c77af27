"""Streaming statistics per (layer, token id), merged batch by batch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class _Moments:
    """Count, mean and summed squared deviation per cell (Chan, Golub, LeVeque 1979)."""

    mean: Tensor  # (L, R)
    m2: Tensor  # (L, R)

    @classmethod
    def zeros(cls, layers: int, rows: int) -> _Moments:
        return cls(*(torch.zeros((layers, rows), dtype=torch.float64) for _ in range(2)))

    def merge(self, layer: int, rows: Tensor, old: Tensor, new: Tensor, value: Tensor) -> None:
        """Add ``value`` (T,) of cells ``rows`` (T,); ``old``/``new`` (R,) counts before/of it."""
        size = old.shape[0]
        total = torch.zeros(size, dtype=torch.float64).index_add_(0, rows, value)
        batch_mean = total / new.clamp(min=1)
        squares = (value - batch_mean[rows]).square()
        batch_m2 = torch.zeros(size, dtype=torch.float64).index_add_(0, rows, squares)
        count = (old + new).clamp(min=1)
        delta = batch_mean - self.mean[layer]
        seen = new > 0
        self.mean[layer] += torch.where(seen, delta * new / count, 0.0)
        self.m2[layer] += torch.where(seen, batch_m2 + delta.square() * old * new / count, 0.0)

    def grow(self, rows: int) -> None:
        self.mean, self.m2 = _grown(self.mean, rows), _grown(self.m2, rows)


def _grown(values: Tensor, rows: int, fill: float = 0.0) -> Tensor:
    shape = list(values.shape)
    shape[1] = rows - shape[1]
    return torch.cat((values, values.new_full(shape, fill)), dim=1)


class RoutingStatistics:
    """Statistics of router decisions, one row per token id seen; memory follows the vocabulary.

    Per (layer, token id): occurrences; mean, deviation, minimum and maximum of the router
    entropy (nats); mean and deviation of the confidence; how often each expert came first and
    the summed routing mass of each expert among those chosen.
    """

    def __init__(self, *, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts
        self.tokens = 0
        self._row_of = np.full(0, -1, dtype=np.int64)
        self.token_ids: list[int] = []
        self._allocate(256)

    def _allocate(self, rows: int) -> None:
        shape = (self.layers, rows)
        self._rows = rows
        self.count = torch.zeros(shape, dtype=torch.float64)
        self.entropy = _Moments.zeros(*shape)
        self.confidence = _Moments.zeros(*shape)
        self.min_entropy = torch.full(shape, torch.inf, dtype=torch.float64)
        self.max_entropy = torch.full(shape, -torch.inf, dtype=torch.float64)
        self.first = torch.zeros((*shape, self.experts), dtype=torch.float64)
        self.mass = torch.zeros((*shape, self.experts), dtype=torch.float64)

    def rows(self, ids: Tensor) -> Tensor:
        """Row numbers of token ids, new ones appended. (T,) int64"""
        wanted = ids.cpu().numpy()
        top = int(wanted.max(initial=-1)) + 1
        if top > self._row_of.shape[0]:
            more = np.full(max(top, 2 * self._row_of.shape[0]), -1, dtype=np.int64)
            more[: self._row_of.shape[0]] = self._row_of
            self._row_of = more
        distinct = np.unique(wanted)
        unseen = distinct[self._row_of[distinct] < 0]
        if unseen.size:
            start = len(self.token_ids)
            self._row_of[unseen] = np.arange(start, start + unseen.size)
            self.token_ids.extend(int(i) for i in unseen)
            if len(self.token_ids) > self._rows:
                self._grow(max(2 * self._rows, len(self.token_ids)))
        return torch.from_numpy(self._row_of[wanted])

    def _grow(self, rows: int) -> None:
        self._rows = rows
        for name in ("count", "first", "mass"):
            setattr(self, name, _grown(getattr(self, name), rows))
        self.min_entropy = _grown(self.min_entropy, rows, torch.inf)
        self.max_entropy = _grown(self.max_entropy, rows, -torch.inf)
        self.entropy.grow(rows)
        self.confidence.grow(rows)

    def add(
        self,
        layer: int,
        rows: Tensor,
        *,
        entropy: Tensor,
        confidence: Tensor,
        index: Tensor,
        mass: Tensor,
    ) -> None:
        """Add one layer of one forward.

        Args:
            layer: MoE layer number.
            rows: (T,) row of each token, from `rows`.
            entropy: (T,) router entropy in nats.
            confidence: (T,) routing mass of the leading experts.
            index: (T, K) experts by rank, the first expert first.
            mass: (T, K) their routing mass.
        """
        entropy, confidence = entropy.double().cpu(), confidence.double().cpu()
        index, mass = index.cpu(), mass.double().cpu()
        ones = torch.ones_like(entropy)
        new = torch.zeros(self._rows, dtype=torch.float64).index_add_(0, rows, ones)
        self.entropy.merge(layer, rows, self.count[layer], new, entropy)
        self.confidence.merge(layer, rows, self.count[layer], new, confidence)
        self.min_entropy[layer].scatter_reduce_(0, rows, entropy, "amin")
        self.max_entropy[layer].scatter_reduce_(0, rows, entropy, "amax")
        self.count[layer] += new
        cell = rows[:, None] * self.experts + index  # (T, K)
        self.first[layer].view(-1).index_add_(0, cell[:, 0], ones)
        self.mass[layer].view(-1).index_add_(0, cell.reshape(-1), mass.reshape(-1))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors: for checkpoints."""
        seen = len(self.token_ids)
        state = {
            "tokens": torch.tensor(self.tokens),
            "token_ids": torch.tensor(self.token_ids, dtype=torch.int64),
        }
        for name, value in self._tensors().items():
            state[name] = value[:, :seen].contiguous()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        ids = state["token_ids"]
        self._allocate(max(256, ids.shape[0]))
        # In one go: rows are numbered in the order of being seen.
        self.token_ids = ids.tolist()
        self._row_of = np.full(max(self.token_ids, default=-1) + 1, -1, dtype=np.int64)
        self._row_of[ids.numpy()] = np.arange(ids.shape[0])
        self.tokens = int(state["tokens"])
        for name, value in self._tensors().items():
            value[:, : ids.shape[0]] = state[name]

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "count": self.count,
            "min_entropy": self.min_entropy,
            "max_entropy": self.max_entropy,
            "first": self.first,
            "mass": self.mass,
            "entropy_mean": self.entropy.mean,
            "entropy_m2": self.entropy.m2,
            "confidence_mean": self.confidence.mean,
            "confidence_m2": self.confidence.m2,
        }
