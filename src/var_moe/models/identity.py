"""Which model something was made with, and whether it is the one at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from var_moe.errors import UsageError
from var_moe.models.moe_layers import experts_modules, router_fingerprint

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

FINGERPRINT_TOLERANCE = 0.005  # a dtype's rounding stays far below, another training far above
_SAMPLE = 4096  # entries of a weight
# How far the numbers of a weight may differ: where both were loaded in one dtype, by how an
# adapter's merging rounds; else by the dtypes' rounding.
SAME_DTYPE_TOLERANCE, OTHER_DTYPE_TOLERANCE = 0.001, 0.02

# What two models must have in common, by its name in a head, and what it is called.
_SHAPE = {
    "tokenizer_hash": "tokenizer",
    "layers": "number of MoE layers",
    "experts": "number of experts",
    "top_k": "top-k",
}


def identity(loaded: LoadedModel) -> dict[str, Any]:
    """What a file's head says of its model: name, revision, tokenizer, sizes and routers."""
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "tokenizer_hash": loaded.tokenizer_hash,
        **_shape(loaded.model, loaded.top_k),
    }


def identity_of_model(model: Any) -> dict[str, Any]:
    """The same of a `LoadedModel`, or as far as a bare transformers model tells it."""
    from var_moe.models.checks import top_k_of
    from var_moe.models.loading import LoadedModel

    if isinstance(model, LoadedModel):
        return identity(model)
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return {"model": name, **_shape(model, top_k_of(model.config.get_text_config(), name))}


def weights_fingerprint(model: Any) -> list[float]:
    """A number for each matrix: tells a fine-tuned model from the one that it was.

    It is a fixed sum of entries from all over the matrix, relative to their norm: a change of 1%
    moves it by about 0.01. What is offloaded or quantised is left out.
    """
    found = []
    for weight in model.parameters():
        plain = weight.is_floating_point() and weight.element_size() > 1
        if weight.dim() > 1 and plain and weight.numel() and weight.device.type != "meta":
            # An odd step goes through all columns.
            step = weight.numel() // _SAMPLE | 1
            part = weight.detach().reshape(-1)[::step].double().cpu()
            total = part @ torch.arange(len(part), dtype=torch.float64).cos()
            found.append(round(float(total / part.norm().clamp(min=1e-30)), 6))
    return found


def _shape(model: Any, top_k: int) -> dict[str, Any]:
    modules = experts_modules(model)
    return {
        "routers": router_fingerprint(model),
        "weights": weights_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "layers": len(modules),
        "experts": int(getattr(modules[0][1], "num_experts", 0)) if modules else 0,
        "top_k": top_k,
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """In which way two heads are not of one model, in words; None where they are.

    Names may differ: a folder and a Hub id can hold the same model.
    """
    for field, words in _SHAPE.items():
        if one[field] != other[field]:
            return f"another {words}"
    mine, theirs = one.get("routers", []), other.get("routers", [])
    comparable = len(mine) == len(theirs) > 0
    if comparable and not np.allclose(mine, theirs, rtol=FINGERPRINT_TOLERANCE):
        return "the routers have other weights"
    mine, theirs = one.get("weights", []), other.get("weights", [])
    alike = one.get("dtype") == other.get("dtype")
    tolerance = SAME_DTYPE_TOLERANCE if alike else OTHER_DTYPE_TOLERANCE
    comparable = len(mine) == len(theirs) > 0
    if comparable and not np.allclose(mine, theirs, rtol=0, atol=tolerance):
        return "the routers are the same, other weights are not"
    return None


def check_fits(what: str, head: Mapping[str, Any], loaded: LoadedModel) -> None:
    """Refuse a ``what`` ("profile", "trace") that another model made.

    Raises:
        UsageError: names the model of the head and the one at hand.
    """
    fault = difference(head, identity(loaded))
    if fault:
        raise UsageError(
            f"{what} of model {head['model']!r} does not fit model {loaded.name!r}: {fault}; "
            f"make one with `var-moe {what} --model {loaded.name}`"
        )
