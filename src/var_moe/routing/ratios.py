"""How far a token's later experts fall behind its first, per layer, on calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.routing.shapes import check_keys


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


def _between(row: tuple[float, ...], share: float) -> float:
    place = share * (len(row) - 1)
    left = min(int(place), len(row) - 2)
    part = place - left
    return row[left] * (1 - part) + row[left + 1] * part
