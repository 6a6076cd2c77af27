"""What a policy was calibrated to, as named tensors and plain data, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.compensation import Compensation, ResidualMeans
from var_moe.routing.damage import DamageModel
from var_moe.routing.naee import RatioQuantiles
from var_moe.routing.per_layer_k import LayerSensitivity
from var_moe.routing.var import RoutingTable

Tensors = dict[str, Tensor]
_TABLE = tuple(field.name for field in fields(RoutingTable))
_PLAIN: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "ratios": RatioQuantiles.from_dict,
    "sensitivity": LayerSensitivity.from_dict,
}


def pack(calibration: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Tensors by name, and what says how they belong together.

    Args:
        calibration: by the names of `routing.registry.CALIBRATION`, with ``compensation`` where
            one was asked for; entries that are None are left out.

    Raises:
        UsageError: the damages were fitted with another compensation than the one asked for.
    """
    given = {name: value for name, value in calibration.items() if value is not None}
    tensors: Tensors = {}
    about: dict[str, Any] = {}
    if "table" in given:
        tensors |= {f"table.{name}": getattr(given["table"], name) for name in _TABLE}
        about["table"] = {}
    if "residuals" in given:
        means = given["residuals"]
        tensors |= {f"residuals.{layer}": part for layer, part in enumerate(means.table)}
        about["residuals"] = {"by_pair": means.by_pair, "experts": means.experts}
    for name in _PLAIN:
        if name in given:
            about[name] = given[name].to_dict()
    compensation = given.get("compensation")
    if "damage" in given:
        damage = given["damage"]
        tensors |= {f"damage.{name}": value for name, value in damage.tensors().items()}
        about["damage"] = {"compensated": damage.compensation is not None}
        if compensation is not None and _hash(damage.compensation) != compensation.hash:
            raise UsageError("the damages were fitted with another compensation than asked for")
        compensation = compensation or damage.compensation
    if compensation is not None:
        tensors |= compensation.named("compensation")
        about["compensation"] = {
            "asked_for": "compensation" in given,
            "by_pair": compensation.by_pair,
            "experts": compensation.experts,
            "layers": len(compensation.layers),
        }
    # Copies: what shares memory cannot be saved, and views drag their whole storage along.
    return {
        name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()
    }, about


def unpack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Any]:
    """The calibration that `pack` was given.

    Raises:
        KeyError: a tensor or an entry is missing; names it.
    """
    found: dict[str, Any] = {}
    layers = _count(tensors, "residuals")
    if "table" in about:
        found["table"] = RoutingTable(**{name: tensors[f"table.{name}"] for name in _TABLE})
    if "residuals" in about:
        parts = tuple(tensors[f"residuals.{layer}"] for layer in range(layers))
        found["residuals"] = ResidualMeans(table=parts, **about["residuals"])
    for name, read in _PLAIN.items():
        if name in about:
            found[name] = read(about[name])
    compensation = None
    if "compensation" in about:
        sizes = {name: about["compensation"][name] for name in ("layers", "by_pair", "experts")}
        compensation = Compensation.of_named(tensors, "compensation", **sizes)
        if about["compensation"]["asked_for"]:
            found["compensation"] = compensation
    if "damage" in about:
        with_it = compensation if about["damage"]["compensated"] else None
        found["damage"] = DamageModel.of_named(tensors, "damage", with_it)
    return found


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Identity of names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash(compensation: Compensation | None) -> str | None:
    return None if compensation is None else compensation.hash


def _count(tensors: Mapping[str, Tensor], kind: str) -> int:
    return sum(name.startswith(f"{kind}.") for name in tensors)
