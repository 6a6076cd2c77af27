"""How far a token's later experts fall behind its first, per layer, on calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.routing.shapes import check_keys, same_tokens

BINS = 16384
"""Bins of the histogram, even in the fourth root of the ratio, which crowds towards zero where
the router is sure: a quantile is right to within 4/BINS, near zero to far less."""
LEVELS = 201
"""Quantiles that are kept: every half percent, both ends included."""


@dataclass(frozen=True, kw_only=True)
class RatioQuantiles:
    """Quantiles of ``w_j / w_1`` over the experts after the first, layer by layer.

    Args:
        top_k: K of the model.
        tokens: calibration tokens behind each layer.
        quantiles: L rows of values at evenly spaced levels from 0 to 1, each row non-decreasing
            in [0, 1].

    Raises:
        UsageError: names the field, what it holds and what is expected.
    """

    top_k: int
    tokens: int
    quantiles: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_number("RatioQuantiles.top_k", self.top_k, integer=True, low=1)
        check_number("RatioQuantiles.tokens", self.tokens, integer=True, low=1)
        if not self.quantiles:
            raise UsageError("RatioQuantiles.quantiles = (): expected a row for each layer")
        for layer, row in enumerate(self.quantiles):
            where = f"RatioQuantiles.quantiles[{layer}]"
            if len(row) < 2:
                raise UsageError(f"{where} = {row!r}: expected at least 2 values")
            for value in row:
                check_number(where, value, low=0, high=1)
            if list(row) != sorted(row):
                raise UsageError(f"{where}: expected values that do not decrease")

    @property
    def layers(self) -> int:
        """L."""
        return len(self.quantiles)

    def at(self, quantile: float) -> tuple[float, ...]:
        """The ratio at ``quantile`` in [0, 1] for each layer, between levels a straight line."""
        check_number("quantile", quantile, low=0, high=1)
        return tuple(_between(row, quantile) for row in self.quantiles)

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        rows = [list(row) for row in self.quantiles]
        return {"top_k": self.top_k, "tokens": self.tokens, "quantiles": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RatioQuantiles:
        """Read what `to_dict` gave; a missing or unknown key is a UsageError."""
        check_keys(cls, values)
        rows = tuple(tuple(row) for row in values["quantiles"])
        return cls(**{**values, "quantiles": rows})


class RatioHistogram:
    """Streaming counts of ``w_j / w_1``, on each layer's device, without waiting for it."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}  # layer -> (BINS,) int64
        self._tokens: dict[int, int] = {}
        self._top_k = 0

    def add(self, layer: int, index: Tensor, weight: Tensor) -> None:
        """Count one layer of one forward: (T, K) of the tokens that count, in any slot order.

        Raises:
            UsageError: K is not that of the batches before.
        """
        self._top_k = self._top_k or index.shape[1]
        if index.shape[1] != self._top_k:
            raise UsageError(f"layer {layer}: K = {index.shape[1]}, before it was {self._top_k}")
        ranked = weight.float().sort(dim=1, descending=True).values
        first = ranked[:, :1]
        # All weights zero: every expert ties with the first.
        ratio = torch.where(first > 0, ranked[:, 1:] / first, 1.0)  # (T, K - 1)
        bins = (ratio.sqrt().sqrt() * BINS).long().clamp(0, BINS - 1).reshape(-1)
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(BINS, dtype=torch.int64, device=bins.device)
        elif self._counts[layer].device != bins.device:  # read from a checkpoint
            self._counts[layer] = self._counts[layer].to(bins.device)
        self._counts[layer].scatter_add_(0, bins, torch.ones_like(bins))
        self._tokens[layer] = self._tokens.get(layer, 0) + index.shape[0]

    def quantiles(self) -> RatioQuantiles:
        """Read the counts (waits for the device).

        The ends are 0 and 1, whatever was seen: a quantile of 0 is to skip nothing on any text,
        1 everything that does not tie with the first.

        Raises:
            UsageError: nothing was counted, or not the same tokens in each layer.
        """
        layers = len(self._counts)
        return RatioQuantiles(
            top_k=self._top_k,
            tokens=same_tokens("ratios", self._tokens, layers=layers),
            quantiles=tuple(_quantiles(self._counts[layer]) for layer in range(layers)),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The counts: for checkpoints."""
        return {
            **{f"ratio_counts.{layer}": row.cpu() for layer, row in self._counts.items()},
            **{f"ratio_tokens.{layer}": torch.tensor(n) for layer, n in self._tokens.items()},
            "ratio_top_k": torch.tensor(self._top_k),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._top_k = int(state["ratio_top_k"])
        for name, value in state.items():
            kind, _, layer = name.partition(".")
            if kind == "ratio_counts":
                self._counts[int(layer)] = value.clone()
            elif kind == "ratio_tokens":
                self._tokens[int(layer)] = int(value)


def calibrate_ratios(batches: Iterable[tuple[int, Tensor, Tensor]]) -> RatioQuantiles:
    """Quantiles from (layer, index (T, K), weight (T, K)) of calibration text, in any order."""
    histogram = RatioHistogram()
    for layer, index, weight in batches:
        histogram.add(layer, index, weight)
    return histogram.quantiles()


def _quantiles(counts: Tensor) -> tuple[float, ...]:
    counts = counts.cpu().double()
    reached = counts.cumsum(dim=0)
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    if reached[-1] == 0:  # K = 1: there is nothing after the first expert
        return tuple(levels.tolist())
    wanted = levels[1:-1] * reached[-1]
    bins = torch.searchsorted(reached, wanted)  # the bin in which each level is reached
    inside = 1 - (reached[bins] - wanted) / counts[bins]
    return (0.0, *((bins + inside) / BINS).pow(4).tolist(), 1.0)


def _between(row: tuple[float, ...], share: float) -> float:
    place = share * (len(row) - 1)
    left = min(int(place), len(row) - 2)
    part = place - left
    return row[left] * (1 - part) + row[left + 1] * part
