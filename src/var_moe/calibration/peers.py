"""What peers' policies need from calibration text, gathered in the profile's own pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from var_moe.routing.layer_sensitivity import LayerSensitivity
from var_moe.routing.ratios import RatioHistogram, RatioQuantiles
from var_moe.routing.shapes import check_keys, same_tokens


@dataclass(frozen=True, kw_only=True)
class PeerCalibration:
    """Inputs of the policies `naee` and `per_layer_k`, of one model on one text."""

    ratios: RatioQuantiles
    sensitivity: LayerSensitivity

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {"ratios": self.ratios.to_dict(), "sensitivity": self.sensitivity.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeerCalibration:
        """Read what `to_dict` gave; a missing or unknown key is a UsageError."""
        check_keys(cls, values)
        return cls(
            ratios=RatioQuantiles.from_dict(values["ratios"]),
            sensitivity=LayerSensitivity.from_dict(values["sensitivity"]),
        )


class OutputChange:
    """Streaming root mean square of how much a layer's output changes with fewer experts.

    Per layer and k: the norm over the hidden size of the output of the first k experts
    (rescaled to the full decision's weight) minus the full output, squared and averaged over
    tokens. It is the Frobenius norm that LExI (arXiv:2509.02753) takes, per token and on
    calibration text instead of random inputs.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # layer -> (K,) float64
        self._tokens: dict[int, int] = {}

    def add(self, layer: int, outputs: Tensor, weight: Tensor) -> None:
        """Add one layer of one forward; slots are in rank order.

        Args:
            layer: MoE layer number.
            outputs: (T, K, D) unweighted outputs of every pair.
            weight: (T, K) router weights.
        """
        weight = weight.float()
        parts = (outputs.float() * weight[:, :, None]).cumsum(dim=1)  # (T, K, D)
        kept = weight.cumsum(dim=1)
        scale = kept[:, -1:] / torch.where(kept == 0, 1.0, kept)
        change = (parts * scale[:, :, None] - parts[:, -1:]).double().square().sum(dim=2)
        row = change.sum(dim=0).cpu()
        row[-1] = 0.0  # all K experts: no change, whatever the rounding
        self._sums[layer] = self._sums.get(layer, torch.zeros_like(row)) + row
        self._tokens[layer] = self._tokens.get(layer, 0) + outputs.shape[0]

    def sensitivity(self) -> LayerSensitivity:
        """Read the means.

        Raises:
            UsageError: nothing was added, or not the same tokens in each layer.
        """
        layers = len(self._sums)
        count = same_tokens("output change", self._tokens, layers=layers)
        rows = ((self._sums[layer] / count).sqrt() for layer in range(layers))
        return LayerSensitivity(
            measure="root mean square change of the layer's output",
            loss=tuple(tuple(row.tolist()) for row in rows),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The sums: for checkpoints."""
        return {
            **{f"output_change.{layer}": row for layer, row in self._sums.items()},
            **{f"output_tokens.{layer}": torch.tensor(n) for layer, n in self._tokens.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            kind, _, layer = name.partition(".")
            if kind == "output_change":
                self._sums[int(layer)] = value.clone()
            elif kind == "output_tokens":
                self._tokens[int(layer)] = int(value)


class PeerStatistics:
    """The running sums behind a `PeerCalibration`."""

    def __init__(self) -> None:
        self._ratios = RatioHistogram()
        self._changes = OutputChange()

    def add(self, layer: int, index: Tensor, weight: Tensor, outputs: Tensor) -> None:
        """Add one layer of one forward: (T, K), (T, K), (T, K, D), slots in rank order."""
        self._ratios.add(layer, index, weight)
        self._changes.add(layer, outputs, weight)

    def calibration(self) -> PeerCalibration:
        """Read the sums."""
        return PeerCalibration(
            ratios=self._ratios.quantiles(), sensitivity=self._changes.sensitivity()
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The sums: for checkpoints."""
        return {**self._ratios.state_dict(), **self._changes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._ratios.load_state_dict(state)
        self._changes.load_state_dict(state)
