"""Whether a calibration belongs to the model at hand, as far as shapes can tell."""

from __future__ import annotations

from torch import Tensor

from var_moe.errors import UsageError


def check_calibrated(policy: object, layer: int, index: Tensor, *, layers: int, top_k: int) -> None:
    """Raise UsageError unless ``layer`` and the K of ``index`` (T, K) are those calibrated."""
    name = type(policy).__name__
    if index.shape[1] != top_k:
        raise UsageError(
            f"{name}: calibrated for K = {top_k}, the model has K = {index.shape[1]}; "
            "calibrate on this model"
        )
    if layer >= layers:
        raise UsageError(
            f"{name}: calibrated for {layers} MoE layers, the model has a layer {layer}; "
            "calibrate on this model"
        )
