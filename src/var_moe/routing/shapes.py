"""Whether a calibration is whole, and belongs to the model at hand as far as shapes can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.base import RoutingPolicy


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


def check_model(policy: RoutingPolicy, sizes: Mapping[str, int]) -> None:
    """Raise UsageError unless a model of these sizes can be the one that was calibrated on."""
    for what, mine in policy.made_for.items():
        theirs = sizes[what]
        # A tokenizer may have more ids than its model takes.
        if mine < theirs if what == "vocabulary" else mine != theirs:
            raise UsageError(
                f"{type(policy).__name__}: calibrated for {what} = {mine}, the model has {theirs}; "
                "calibrate on this model"
            )


def check_keys(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Raise UsageError unless the keys are the fields of the dataclass ``kind``."""
    wrong = sorted(set(values) ^ {f.name for f in fields(kind)})
    if wrong:
        raise UsageError(f"{kind.__name__}: {wrong[0]!r} is missing or unknown")
